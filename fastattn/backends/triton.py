"""The fused Triton kernels, on CUDA and ROCm devices; on CPU tensors only where Triton interprets them, for tests."""

import functools
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn.spec import UNDIVIDED, AttentionSpec, CacheSpec, Gradients, Operands, Options, Rotary, target

# A constant, because a trace cannot ask for it.
_TRITON_MISSING = importlib.util.find_spec("triton") is None


HEAD_DIMS = (256, 256)
"""The largest D and Dv."""
CACHED_HEAD_DIMS = (576, 512)
"""The largest over a KV cache: those of multi-head latent attention, whose values are the first columns of the keys."""


def reasons(spec: AttentionSpec) -> list[str]:
    return _reasons(spec.q, spec.v.shape[3], HEAD_DIMS)


def cache_reasons(spec: CacheSpec) -> list[str]:
    reasons = _reasons(spec.q, spec.v_cache.shape[3], HEAD_DIMS if spec.num_splits == UNDIVIDED else CACHED_HEAD_DIMS)
    eight_bits = spec.k_cache.dtype == torch.float8_e4m3fn and spec.q.device.type == "cuda"
    if eight_bits and (target.rocm() or target.capability(spec.q.device) < (8, 9)):
        reasons.append("a float8_e4m3fn cache needs an NVIDIA GPU of compute capability 8.9 or newer")
    if (
        spec.num_splits == UNDIVIDED
    ):  # it is the kernel for prompts: it has no pages, and visits tiles at a window's left side in another order
        not_served = {
            "block_table": spec.block_table, "mask": spec.mask, "bias": spec.bias, "k_scale": spec.k_scale,
            "cu_seqlens_q": spec.cu_seqlens_q, "a window to the left": spec.left,
            "kv_start": spec.kv_start,
        }  # fmt: skip
        reasons += [
            f"batch_invariant 'rows' is served without {name}" for name, x in not_served.items() if x is not None
        ]
    return reasons


def forward(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options
) -> None:
    _launchers().forward.attention_forward(out, lse, statistics, q, k, v, operands, options)


def backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    _launchers().backward.attention_backward(gradients, dout, dlse, q, k, v, out, statistics, operands, options)


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    append = _launchers().append.kv_cache_append
    append(k_cache, v_cache, k, v, lens, block_table, cu_seqlens_q, k_scale, v_scale)


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    if spec.num_splits == UNDIVIDED:
        _attend_undivided(out, lse, spec)
        return
    _launchers().decode.attention_kvcache(out, lse, spec)


def append_and_attend(out: Tensor, lse: Tensor, spec: CacheSpec, rotary: Rotary | None = None) -> None:
    """`kv_cache_append` of what ``spec`` adds, then `attention_kvcache`; divided keys may be turned on the way."""
    if spec.num_splits == UNDIVIDED and spec.k is not None and spec.v is not None:
        kv_cache_append(spec.k_cache, spec.v_cache, spec.k, spec.v, spec.lens, None)
        _attend_undivided(out, lse, spec)
        return
    _launchers().decode.append_and_attend(out, lse, spec, rotary)


def _attend_undivided(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Attention over a contiguous cache by the kernel for prompts, so that a row has the same bits as in a prompt."""
    operands = Operands(
        alibi_slopes=spec.alibi_slopes, sinks=spec.sinks, seqused_k=spec.lens + (spec.added or 0)
    )  # fmt: skip
    k, v = spec.k_cache.transpose(1, 2), spec.v_cache.transpose(1, 2)
    options = Options(spec.left, spec.right, None, spec.scale, spec.softcap)
    forward(out, lse, lse.new_empty((2, *lse.shape)), spec.q, k, v, operands, options)


def splits(spec: CacheSpec) -> int:
    """Into how many parts the decode kernel divides the keys."""
    return _launchers().decode.splits_of(spec)


@functools.cache
def _launchers() -> Any:
    """The modules of `fastattn.kernels` that launch."""
    from fastattn.kernels import append, backward, decode, forward

    return SimpleNamespace(append=append, backward=backward, decode=decode, forward=forward)


def statistics_unit(operands: Operands) -> float:
    """The natural logarithm that one unit of the maximum in `statistics` stands for: see `fastattn.kernels.scores`."""
    return 1.4426950408889634 if operands.bias is None and operands.alibi_slopes is None else 1.0


def _reasons(q: Tensor, v_dim: int, largest: tuple[int, int]) -> list[str]:
    reasons = []
    if _TRITON_MISSING:
        reasons.append("the triton package is not installed")
    if q.device.type == "cuda":
        if not target.rocm() and target.capability(q.device) < (8, 0):
            major, minor = target.capability(q.device)
            reasons.append(f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}")
    elif not (q.device.type == "cpu" and _interpreting()):
        reasons.append(f"runs on CUDA and ROCm devices, the tensors are on {q.device.type!r}")
    if q.dtype == torch.float64:
        reasons.append("it has no float64")
    if q.shape[3] > largest[0] or v_dim > largest[1]:
        expected = "head dims up to 256" if largest == HEAD_DIMS else "D up to {} and Dv up to {}".format(*largest)
        reasons.append(f"{expected}, got D = {q.shape[3]}, Dv = {v_dim}")
    return reasons


def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors. Slow: for tests of the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
