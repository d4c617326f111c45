"""Dropout of whole tensors on a CPU by a vectorised kernel that stores no mask."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import backends, ops
from fastattn.functional.one_pass import served
from fastattn.ops.batching import one_by_one


def dropout(x: Tensor, p: float) -> Tensor:
    """`torch.nn.functional.dropout` of x in training.

    With the compiled CPU kernels it draws one number from the default generator. Forward and backward derive each
    element's bits from that number, the row and the column. So it drops other elements than PyTorch would, with the
    same probability. Small tensors, other dtypes, subclasses, traces and transforms take PyTorch's function.

    Args:
        x: any shape and dtype.
        p: probability that an element becomes 0; the others are divided by 1 - p.
    """
    if not 0.0 < p < 1.0 or not served(x):
        return F.dropout(x, p)
    return _Dropout.apply(x, p, int(ops.draw_seed(x.device)))


class _Dropout(torch.autograd.Function):
    """Dropout with fixed bits is linear, so every derivative is the function itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        y = torch.empty(x.shape, dtype=x.dtype)
        backends.cpu.dropout(y, x.contiguous(), p, seed)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, None, None]:
        return one_by_one(lambda dy: _Dropout.apply(dy, ctx.p, ctx.seed), dy), None, None
