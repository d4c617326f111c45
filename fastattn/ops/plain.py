"""The forward operator in PyTorch's own operators, for what runs programs and knows no others, such as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.schema import Forward, lse_dtype, unflatten
from fastattn.spec import CacheSpec


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What fastattn's operators are in PyTorch's: a table for ``ExportedProgram.run_decompositions``.

    For a program that leaves PyTorch and was exported with fastattn's operators in it. ``torch.onnx.export`` of a
    model needs no table. All scores of a call are in memory at once then, O(Lq x Lk).

    Returns:
        {operator: function}. The functions raise ValueError for what has no such form: ``dropout_p`` and packed
        sequences.
    """
    return {torch.ops.fastattn.attention_forward.default: forward}


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, statistics) of the forward operator, from its arguments."""
    return run(unflatten(Forward, args))


def run(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, statistics), computed in float32 at least, as every backend does.

    Raises:
        ValueError: dropout or packed sequences.
    """
    if call.options.dropout_p > 0.0:
        raise ValueError(
            f"dropout_p: expected 0 in a program of PyTorch's operators alone, got {call.options.dropout_p}; "
            "export the model in evaluation mode"
        )
    if call.operands.cu_seqlens_q is not None:
        raise ValueError(
            "cu_seqlens_q: packed sequences cannot be expressed in PyTorch's operators alone; "
            "use fastattn.attention with a mask"
        )
    dtype = lse_dtype(call.q.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    out, lse = backends.module("reference").definition.attention(q, k, v, call.operands, call.options)
    return out.to(call.q.dtype), lse, backends.statistics_of(lse, call.operands, call.backend)


def wanted() -> bool:
    """Whether a model is on its way to ONNX."""
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result sets; calling that here would import torch._dynamo. Dynamo itself takes
# PyTorch's function for False.
_in_onnx_export._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def refuse_cache(spec: CacheSpec) -> None:
    """Raise for a call over a KV cache on its way to ONNX.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"k_cache: {tuple(spec.k_cache.shape)} is written in place, which ONNX cannot express; "
        "export a call of fastattn.attention, with all keys and values among the inputs"
    )
