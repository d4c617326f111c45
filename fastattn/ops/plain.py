"""The forward operator in PyTorch's own operators, for runtimes that know no others, such as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.schema import Forward, lse_dtype, unflatten
from fastattn.spec import CacheSpec


def decompositions() -> dict[Any, Callable[..., Any]]:
    """fastattn's operators in terms of PyTorch's: a table for ``ExportedProgram.run_decompositions``.

    Use it for an exported program that contains fastattn's operators and is to run outside PyTorch.
    ``torch.onnx.export`` of a model needs no table. The decomposed program holds all scores of a call in memory,
    O(Lq x Lk).

    Returns:
        {operator: function}. The functions raise ValueError for ``dropout_p`` and packed sequences, which PyTorch's
        operators cannot express.
    """
    return {torch.ops.fastattn.attention_forward.default: forward}


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, statistics) of the forward operator, from its arguments."""
    return run(unflatten(Forward, args))


def run(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, statistics), computed in at least float32, as in every backend.

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
    """Whether torch.onnx is exporting a model."""
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.compiler.assume_constant_result sets this, but calling it here would import torch._dynamo. Dynamo on its own
# takes PyTorch's function to return False.
_in_onnx_export._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def refuse_cache(spec: CacheSpec) -> None:
    """Raise the error for exporting a call over a KV cache to ONNX.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"k_cache: {tuple(spec.k_cache.shape)} is written in place, which ONNX cannot express; "
        "export a call of fastattn.attention, with all keys and values among the inputs"
    )
