"""What functions and layers ask while the tokens of a sequence are divided among processes.

`fastattn.distributed` registers a division here. While it holds, a call of attention covers the whole sequence, and
layers ask where their tokens stand instead of counting them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Division(Protocol):
    """The answers. Every process must ask the same questions in the same order, because some answers take messages."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **options: Any) -> Any:
        """`fastattn.attention` of this process's queries over all keys. Dropout counts heads from ``first_head``."""
        ...

    def attention_varlen(self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **options: Any) -> Any:
        """`fastattn.attention_varlen`, likewise; ``cu_seqlens`` are those of the whole, here and below."""
        ...

    def whole(self, length: int, cu_seqlens: Tensor | None = None) -> int:
        """The tokens of all processes, where this one has ``length``."""
        ...

    def positions(self, length: int, device: torch.device, cu_seqlens: Tensor | None = None) -> Tensor:
        """Where each of this process's tokens stands in the whole, int64 (length,)."""
        ...

    def next_labels(self, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The label after that of each token, wherever it is kept; -100 after the last of a document or of all.

        labels: (..., length).
        """
        ...

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """The sum of all totals divided by the sum of all counts. Average its gradients over the processes."""
        ...


# Per process, not per thread: activation checkpointing computes again in autograd's threads.
_entered: list[Division] = []


def current() -> Division | None:
    """The division in force, or None."""
    return _entered[-1] if _entered else None


@contextlib.contextmanager
def entered(division: Division) -> Iterator[None]:
    """Put a division in force inside ``with``."""
    enter(division)
    try:
        yield
    finally:
        leave(division)


def enter(division: Division) -> None:
    """Put a division in force until `leave`."""
    _entered.append(division)


def leave(division: Division) -> None:
    """Undo the last `enter`."""
    if division in _entered:
        del _entered[len(_entered) - 1 - _entered[::-1].index(division)]


def refuse(name: str, got: str) -> None:
    """Raise ValueError while a sequence is divided: this argument needs all of it on one process."""
    if _entered:
        raise ValueError(
            f"{name}: expected a sequence that is not divided among processes, got {got}; call it outside of "
            "context_parallel, for a model of ContextParallel with its weights in a model without"
        )
