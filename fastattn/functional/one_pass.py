"""The elementwise steps between the products of a layer: one pass of a CPU kernel forward, and one backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import backends
from fastattn.ops.direct import Way, way

_LEAST = 1 << 12  # elements: below, autograd's way through Python costs more than the pass saves
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(*tensors: Tensor) -> bool:
    """Whether the elementwise kernels take these tensors.

    They must be plain contiguous CPU tensors of one dtype, float32 or half precision, the first one not small. Traces
    and transforms take PyTorch's operators.
    """
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) for x in tensors)
        and first.is_cpu
        and first.dtype in _DTYPES
        and first.numel() >= _LEAST
        and all(x.dtype == first.dtype and x.is_contiguous() for x in tensors)
        and backends.cpu.library.problem() is None
        and way(tensors) is not Way.DISPATCHER
    )


def recorded(*tensors: Tensor) -> bool:
    """Whether the elementwise kernels take a call that autograd records.

    Calls without gradient stay with PyTorch, so that in generation a row has the same bits in every batch; see
    ``batch_invariant``.
    """
    return torch.is_grad_enabled() and served(*tensors) and any(x.requires_grad for x in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension: x (..., E), weight (E,); of x's shape."""
    if not recorded(x, weight) or weight.shape != x.shape[-1:]:
        return F.rms_norm(x, tuple(weight.shape), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape (Shazeer 2020, arXiv:2002.05202)."""
    if not recorded(gate, up) or gate.shape != up.shape:
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    """PyTorch's operators compute derivatives that are themselves differentiated, or batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty(x.shape, dtype=x.dtype)
        backends.cpu.rms_norm(y, x, weight, eps)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        if way((dy, x, weight)) is Way.AT_ONCE:
            dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=x.dtype)
            backends.cpu.rms_norm_gradients(dx, dweight, dy.contiguous(), x, weight, ctx.eps)
            return dx, dweight, None
        inverse = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normal, scaled = x * inverse, dy * weight
        dx = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse
        return dx, (dy * normal).reshape(-1, x.shape[-1]).sum(0), None


class _Swiglu(torch.autograd.Function):
    """Derivatives work as in `_RMSNorm`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        backends.cpu.gate(y, gate, up)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if way((dy, gate, up)) is Way.AT_ONCE:
            dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(gate.shape, dtype=gate.dtype)
            backends.cpu.gate_gradients(dgate, dup, dy.contiguous(), gate, up)
            return dgate, dup
        part = gate.sigmoid()
        return dy * up * part * (1 + gate * (1 - part)), dy * gate * part
