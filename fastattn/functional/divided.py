"""A sequence whose tokens are divided among processes, as functions and layers see it.

Whoever divides one says so here, `fastattn.distributed` that is. Then a call of attention is one over the whole
sequence, and layers ask where their tokens stand instead of counting them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Division(Protocol):
    """What functions and layers ask. Every process asks the same, in the same order: answers take messages."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **options: Any) -> Any:
        """`fastattn.attention` of this process's queries, for dropout heads ``first_head`` and on, over all keys."""
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
        """All processes' totals by all their counts; its gradients are to be averaged over the processes."""
        ...


_entered: list[Division] = []  # of the process, not of a thread: a backward pass that computes anew has its own threads


def current() -> Division | None:
    """The division that holds now."""
    return _entered[-1] if _entered else None


@contextlib.contextmanager
def entered(division: Division) -> Iterator[None]:
    """Let it hold inside of ``with``."""
    enter(division)
    try:
        yield
    finally:
        leave(division)


def enter(division: Division) -> None:
    """Let it hold until `leave`."""
    _entered.append(division)


def leave(division: Division) -> None:
    """The end of the last `enter` of the same."""
    if division in _entered:
        del _entered[len(_entered) - 1 - _entered[::-1].index(division)]


def refuse(name: str, got: str) -> None:
    """Raise ValueError where a sequence is divided: what is meant counts on one process having all of it."""
    if _entered:
        raise ValueError(
            f"{name}: expected a sequence that is not divided among processes, got {got}; call it outside of "
            "context_parallel, for a model of ContextParallel with its weights in a model without"
        )
