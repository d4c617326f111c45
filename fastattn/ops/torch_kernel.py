"""Add second derivatives to PyTorch's CPU kernel, which lacks them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from fastattn.ops import autograd
from fastattn.ops.schema import Backward, Forward
from fastattn.spec import Operands, Options

_NODE = "ScaledDotProductFlashAttentionForCpuBackward0"
_NODES = "ScaledDotProduct"  # the names of all fused kernels begin with it


def add_second_derivative(out: Tensor) -> None:
    """Make the gradients of ``out`` differentiable under ``create_graph=True``.

    ``out`` is the kernel's result or a slice of it.

    Where that is impossible, a second derivative raises an error that says what to do.
    """
    node: Any = out.grad_fn
    if node is not None and node.name() == "SliceBackward0":
        node = node.next_functions[0][0]
    if node is None:
        return
    name = node.name()
    if name == _NODE:
        node.register_hook(_differentiable)
    elif name.startswith(_NODES):
        node.register_hook(functools.partial(_once, why=f"by PyTorch's {name}"))


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated, and the reason."""

    @staticmethod
    def forward(ctx: Any, why: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.why = why
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            f"fastattn: no second derivative of attention on the torch backend {ctx.why}; pass backend='reference'"
        )


def _once(gradients: tuple[Tensor | None, ...], _: Any, why: str) -> Any:
    """A hook: replace gradients by ones whose derivative raises. None keeps them."""
    return _Once.apply(why, *gradients) if torch.is_grad_enabled() else None


def _differentiable(gradients: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
    """A hook: replace the kernel's gradients, which have no derivative, by the reference's. None keeps them."""
    if not torch.is_grad_enabled() or given[0] is None:
        return None
    try:  # private names of PyTorch, tested with 2.11 and 2.13; another version may change them
        node: Any = torch._C._current_autograd_node()
        q, k, v, mask = node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask
        scale, causal = node._saved_scale, node._saved_is_causal
    except CheckpointError:  # a checkpoint recomputes them once per backward pass, and the kernel took them
        return _once(gradients, given, "inside torch.utils.checkpoint")
    except AttributeError as error:
        return _once(gradients, given, f"with PyTorch {torch.__version__} ({error})")
    operands = Operands(block_mask=[])
    if mask is not None:  # the kernel's float mask
        mask = mask[(None,) * (4 - mask.ndim)]
        allowed = mask != -torch.inf
        operands = Operands(allowed, mask.masked_fill(~allowed, 0.0), block_mask=[])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(None, 0 if causal else None, 0, scale, None)
    out, statistics = autograd.constants(Forward(q, k, v, operands, options, "reference"))
    backward = Backward(given[0], None, q, k, v, out, statistics, operands, options, "reference", [False] * 3)
    of_q, of_k, of_v, *others = gradients
    dq, dk, dv, *_ = autograd.call_backward(backward)
    found = zip((of_q, of_k, of_v), (dq, dk, dv), strict=True)
    return *(None if old is None else new for old, new in found), *others
