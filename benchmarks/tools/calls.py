"""The calls for which kernels are compiled ahead of time: features, and functions that launch kernels with them."""

import dataclasses
import functools
from typing import Any

import torch

from fastattn.kernels import append, backward, config, decode, forward
from fastattn.spec import CacheSpec, Gradients, Operands, Options, Rotary


@dataclasses.dataclass(frozen=True)
class Feature:
    """The arguments of one call on which the compiled code depends. Lengths and head groups do not change it."""

    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    window: bool = False
    mask: str = ""  # "full", "padding" or none
    bias: bool = False
    aligned: bool = False  # rows of a mask or bias begin at multiples of 16 elements
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    part: bool = False  # a part of a larger call, with the dropout bits of that call
    q_offset_tensor: bool = False
    packed: bool = False  # sequences, and queries of a KV cache
    used: bool = False  # uses only the first of packed keys
    kv_start: bool = False  # the first key of each entry that takes part
    block_mask: bool = False
    page: int = 0  # of a KV cache, 0 if it is contiguous
    queries: int = 1  # for each key head of a KV cache there are twice as many rows
    quantised: torch.dtype | None = None  # a KV cache of this dtype, with a scale for each token and head
    rotary: bool = False  # positions of what a KV cache is given
    narrow_values: bool = False  # Dv is two thirds of D, as in multi-head latent attention
    odd_dim: bool = False  # five columns fewer: no power of two, and rows that start at no multiple of 16 bytes


FEATURES = {
    "plain": Feature(),
    "causal": Feature(causal=True),
    "window": Feature(causal=True, window=True),
    "mask": Feature(mask="full"),
    "padding": Feature(mask="padding"),
    "mask_aligned": Feature(mask="full", aligned=True),
    "bias": Feature(bias=True),
    "bias_aligned": Feature(bias=True, aligned=True),
    "alibi": Feature(causal=True, alibi=True),
    "softcap": Feature(causal=True, softcap=True),
    "sinks": Feature(causal=True, sinks=True),
    "dropout": Feature(dropout=True),
    "dropout_part": Feature(dropout=True, part=True),
    "q_offset": Feature(causal=True, q_offset_tensor=True),
    "packed": Feature(causal=True, packed=True),
    "used_keys": Feature(causal=True, packed=True, used=True),
    "kv_start": Feature(causal=True, kv_start=True),
    "block_mask": Feature(block_mask=True),
    "paged": Feature(page=16),  # for one query, which is the last one: causal forbids nothing
    "chunk": Feature(causal=True, queries=64),
    "packed_cache": Feature(causal=True, packed=True, page=16, queries=64),
    "tree": Feature(mask="full", queries=64),
    "int8": Feature(quantised=torch.int8),
    "fp8": Feature(quantised=torch.float8_e4m3fn),
    "rotary": Feature(causal=True, rotary=True),
    "narrow_values": Feature(causal=True, narrow_values=True),
    "odd_dim": Feature(odd_dim=True),
    "fp32": Feature(dtype=torch.float32),
    "everything": Feature(
        causal=True, window=True, mask="full", bias=True, alibi=True, softcap=True, sinks=True, dropout=True,
        q_offset_tensor=True, block_mask=True, page=16, queries=64,
    ),
}  # fmt: skip
CACHE_ONLY = ("paged", "chunk", "packed_cache", "tree", "int8", "fp8", "rotary")
"""Features that only calls over a KV cache have."""


def value_dim(dim: int, feature: Feature) -> int:
    """Dv of a call with head dim ``dim``."""
    return dim * 2 // 3 if feature.narrow_values else dim


def launch_cache_kernels(kernel: config.Kernel, dim: int, feature: Feature) -> None:
    """`launch_kernels` for those that work on a KV cache."""
    empty = functools.partial(torch.empty, device="meta", dtype=feature.dtype)
    batch, heads, kv_heads, length = 2, 4, 2, 1008
    dim -= 5 if feature.odd_dim else 0
    shape = (batch, length, kv_heads, dim)
    table = None
    if feature.page:
        shape = (batch * length // feature.page, feature.page, kv_heads, dim)
        table = empty(batch, length // feature.page, dtype=torch.int32)
    k_cache, v_cache = (empty(shape, dtype=feature.quantised or feature.dtype) for _ in "kv")
    scales = [empty(shape[:3], dtype=torch.float32) if feature.quantised else None for _ in "kv"]
    lens = empty(batch, dtype=torch.int32)
    starts = empty(batch + 1, dtype=torch.int32) if feature.packed else None
    if kernel == "append":
        k, v = (empty(1 if feature.packed else batch, kv_heads, 1, dim) for _ in "kv")
        if not feature.rotary:
            append.kv_cache_append(k_cache, v_cache, k, v, lens, table, starts, *scales)
            return
        q, turned = (empty(batch, heads, 1, dim) for _ in range(2))
        cos, sin = (empty(length, dim // 2, dtype=torch.float32) for _ in range(2))
        rotary = Rotary(cos, sin, interleaved=False)
        append.append_rows(k_cache, v_cache, k, v, lens, table, starts, rotary=rotary, q=q, turned_q=turned)
        return
    q = empty(batch, heads, feature.queries, dim)
    if feature.packed:
        q = empty(1, heads, batch * feature.queries, dim)
    mask = bias = None
    if feature.mask:
        mask = empty(batch, 1, feature.queries if feature.mask == "full" else 1, length, dtype=torch.bool)
    if feature.bias:
        bias = empty(1, heads, feature.queries, length)
    spec = CacheSpec(
        q, k_cache, v_cache, None, None, empty(1, heads, dtype=torch.float32) if feature.alibi else None,
        empty(heads, dtype=torch.float32) if feature.sinks else None, lens, table,
        added=None if feature.packed else 1, length=None, left=256 if feature.window else None,
        right=0 if feature.causal else None, scale=dim**-0.5, softcap=30.0 if feature.softcap else None,
        num_splits=4 if kernel == "combine" else 1, return_lse=True, cu_seqlens_q=starts, mask=mask,
        bias=bias, mask_start=None if mask is None and bias is None else empty(batch, dtype=torch.int32),
        k_scale=scales[0], v_scale=scales[1], kv_start=empty(batch, dtype=torch.int32) if feature.kv_start else None,
    )  # fmt: skip
    decode.attention_kvcache(torch.empty_like(q), empty(q.shape[:3], dtype=torch.float32), spec)


def launch_kernels(kernel: config.Kernel, dim: int, feature: Feature) -> None:
    """Call the launcher that ``kernel`` belongs to, with arguments that have shapes and strides but no memory."""
    if kernel in ("decode", "combine", "append"):
        launch_cache_kernels(kernel, dim, feature)
        return
    empty = functools.partial(torch.empty, device="meta", dtype=feature.dtype)
    batch, heads, kv_heads, length = 2, 4, 2, 1008 if feature.aligned else 1001
    dim -= 5 if feature.odd_dim else 0
    entries = 1 if feature.packed else batch
    v_dim = value_dim(dim, feature)
    q, out = (empty(entries, heads, length, columns) for columns in (dim, v_dim))
    k, v = (empty(entries, kv_heads, length, columns) for columns in (dim, v_dim))
    statistics = empty(2, entries, heads, length, dtype=torch.float32)
    given: dict[str, Any] = {}
    if feature.packed:
        given |= {name: empty(batch + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if feature.used:
        given["seqused_k"] = empty(batch, dtype=torch.int32)
    if feature.kv_start:
        given["kv_start"] = empty(batch, dtype=torch.int32)
    if feature.block_mask:
        index = functools.partial(torch.empty, device="meta", dtype=torch.int32)
        lines, cells, table = index(1, 1, 8, 3), index(64, 2), index(1, 1, 8, 8)
        given["block_mask"] = [lines, cells, lines, cells, table, index(66, 128, 128).to(torch.uint8)]
    if feature.mask:
        given["mask"] = empty(batch, 1, length if feature.mask == "full" else 1, length, dtype=torch.bool)
    if feature.bias:
        given["bias"] = empty(1, heads, length, length)
    if feature.alibi:
        given["alibi_slopes"] = empty(1, heads, dtype=torch.float32)
    if feature.sinks:
        given["sinks"] = empty(heads, dtype=torch.float32)
    if feature.q_offset_tensor:
        given["q_offset_tensor"] = empty(batch, dtype=torch.int64)
    if feature.dropout:
        given["seed"] = empty(7 if feature.part else 1, dtype=torch.int64)
    operands = Operands(**given)
    options = Options(
        left=256 if feature.window else None, right=0 if feature.causal else None,
        q_offset=None if feature.packed else 0, scale=dim**-0.5, softcap=30.0 if feature.softcap else None,
        dropout_p=0.1 if feature.dropout else 0.0,
    )  # fmt: skip
    if kernel == "forward":
        forward.attention_forward(out, statistics[0], statistics, q, k, v, operands, options)
        return
    learned = (operands.bias, operands.alibi_slopes, operands.sinks)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    gradients = Gradients(dq, dk, dv, *(None if x is None else torch.empty_like(x) for x in learned))
    backward.attention_backward(gradients, out, statistics[0], q, k, v, out, statistics, operands, options)
