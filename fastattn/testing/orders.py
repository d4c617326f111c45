"""Sums in another order: what float64's own rounding does, which its specification shares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class OtherOrders(TorchFunctionMode):
    """Inside of ``with`` every product of matrices has its rows, columns and terms in a random order.

    Its result is the same but for rounding. So are the gradients, which sum over rows and over columns.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        a, b = args
        rows, terms, columns = (
            torch.randperm(n, generator=self._generator).to(a.device) for n in (*a.shape[-2:], b.shape[-1])
        )
        found = func(a[..., rows[:, None], terms], b[..., terms[:, None], columns])
        return found[..., rows.argsort()[:, None], columns.argsort()]
