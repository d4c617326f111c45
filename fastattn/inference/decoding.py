"""What every search shares: the checked call, what it returns, and the check of the model's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastattn.nn import KVCache

__all__ = ["Decoding", "Generated", "NonFinite"]


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        tokens: int64 (N, T), the new tokens, a stop token included; after it padding. T is the largest of `lengths`.
        lengths: int64 (N,), new tokens of each row.
        scores: float32 (N,), log-probability of each row's tokens: by the model, whatever the sampling; of beam search
            divided by length ** length_penalty.
        no_cuda_graph: why steps were launched one by one, or None where a CUDA graph was replayed.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    no_cuda_graph: str | None = None

    def tolist(self) -> list[list[int]]:
        """The tokens of each row without padding."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[:length] for row, length in rows]


@dataclass
class Decoding:
    """A checked call: the model as two functions, and their starting point."""

    prefill: Callable[..., Tensor]
    """(tokens (N, L), cache, lengths) -> logits (N, V) after them."""
    step: Callable[..., Tensor]
    """(tokens (N, 1), cache=, lengths=) -> logits (N, 1, V)."""
    make_cache: Callable[[], KVCache]
    target: Tensor
    lengths: Tensor | None
    max_new_tokens: int
    vocab_size: int
    stop: Tensor | None
    keeps_cache: bool
    """The cache is the caller's: rows that have ended must not grow in it."""
    no_cuda_graph: str | None = None
    """Why steps are launched one by one; None: a graph may be replayed."""


class NonFinite:
    """Finds rows whose logits allow no next token: NaN, +inf, or all -inf.

    On the CPU a step raises at once. On other devices that would make the host wait, so the search raises at its end.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, bad: Tensor) -> None:
        """Note the rows (N,) that have not ended and whose log-sum-exp is not finite."""
        self._bad = bad if self._bad is None else self._bad | bad
        if bad.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise if a row was bad.

        Raises:
            ValueError: naming the rows.
        """
        if self._bad is not None and bool(self._bad.any()):
            rows = self._bad.nonzero().flatten().tolist()
            raise ValueError(f"model: expected finite logits, got NaN or infinity in row {', '.join(map(str, rows))}")
