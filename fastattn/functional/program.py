"""Programs of the CPU library: operations on few rows as one call, for steps of generation. There is no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.direct import Way, way
from fastattn.spec import make_cache_spec

__all__ = ["Program", "at_once", "reason_against"]

MOST_ROWS = 16
"""Up to this many rows, reading the weights bounds a product; beyond, PyTorch's product may be faster."""


class Program(backends.Program):
    """See `fastattn.backends.cpu.program.Program`, whose attention takes the arguments of the public function."""

    def attention_with_kvcache(self, out: Tensor, *tensors: Tensor, cache_lens: Tensor, **options: Any) -> None:
        """`fastattn.attention_with_kvcache` into ``out`` (B, Hq, 1, Dv), any strides.

        Args:
            tensors: q, of one query per entry, k_cache, v_cache, k, v.
            cache_lens: int64 (B,), as it is when the program runs; the cache has room then.
            options: of the function, but those of its result.
        """
        spec = make_cache_spec(*tensors, cache_lens=cache_lens, **options)
        self.attend(out, torch.empty(out.shape[:3]), spec._replace(length=None))


def reason_against(parameters: Sequence[Tensor], rows: int) -> str | None:
    """Why a program should not compute with these parameters, for so many rows; None: it may."""
    kinds = {(p.dtype, p.device.type) for p in parameters}
    if len(kinds) != 1:
        return f"parameters of one dtype on one device are expected, these are of {len(kinds)}"
    ((dtype, device),) = kinds
    if device != "cpu":
        return f"it runs on CPUs, the parameters are on {device!r}"
    if problem := backends.cpu.library.problem():
        return problem
    if dtype not in Program.DTYPES:
        return f"{dtype} is not served"
    if rows > MOST_ROWS:
        return f"it serves up to {MOST_ROWS} rows, here are {rows}"
    if not all(p.is_contiguous() and type(p) is torch.nn.Parameter for p in parameters):
        return "a parameter is not a plain one"
    if not at_once(parameters):
        return "somebody records or transforms what is computed"
    return None


def at_once(tensors: Sequence[Tensor] = ()) -> bool:
    """Whether nothing observes PyTorch's operators: no gradient, autocast, mode, profiler or trace."""
    return way(tensors) is Way.AT_ONCE and not torch.is_autocast_enabled("cpu")
