"""The fused CPU kernels of ``csrc/cpu``: everything the operator does, forward, backward and over a KV cache.

A call is packed into bytes, field by field as `csrc/cpu/interface.h` declares them, and crosses in one ctypes call.
"""

import ctypes
import itertools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.cpu import library
from fastattn.spec import AttentionSpec, CacheSpec, Gradients, Operands, Options
from fastattn.spec.cache_operands import dequantised, over_keys, scale_rows

_OPEN = -(1 << 63)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_CACHE_DTYPES = {torch.int8: 4, torch.float8_e4m3fn: 5}
_WIDEST = 1 << 16

# The structs of the interface: every field has 8 bytes.
_ATTENTION = struct.Struct("@2q20q2q8q3q3d")
_OPERANDS = struct.Struct("@10q5q3q3q3q1q6q2q5q")
_GRADIENTS = struct.Struct("@5q1q15q3q")
_DECODE = struct.Struct("@2q20q8q6q3q3q2d4q")
_APPEND = struct.Struct("@2q20q4q5q3q2q")
_SCORE_TERMS = struct.Struct("@10q3q1q")
_QUANTISED = struct.Struct("@1q10q1q2q")
_DROPOUT = struct.Struct("@2q2q4q1d")
_ROTATE = struct.Struct("@2q2q2q4q5q")
_ABSENT = (0,) * 5

# A prompt goes to the kernel with taller tiles, whose keys it packs first: from this many query rows of a key head on.
_TALL = 32


def statistics_unit(operands: Operands) -> float:
    """The statistics are in base 2, whatever the operands."""
    return math.log2(math.e)


def reasons(spec: AttentionSpec) -> list[str]:
    return _reasons(spec.q, spec.v.shape[3])


def cache_reasons(spec: CacheSpec) -> list[str]:
    reasons = _reasons(spec.q, spec.v_cache.shape[3])
    if spec.k_scale is not None and spec.q.dtype == torch.float64:
        reasons.append("float64 over a quantised cache is served by the reference backend")
    return reasons


def _reasons(q: Tensor, v_dim: int) -> list[str]:
    if q.device.type != "cpu":  # nothing else is said: no other argument would change it
        return [f"runs on CPUs, the tensors are on {q.device.type!r}"]
    reasons = []
    if torch.compiler.is_compiling():  # which cannot load it: the call itself then says what is wrong with it
        if not library.PRESENT:
            reasons.append(library.MISSING)
    elif problem := library.problem():
        reasons.append(problem)
    if q.shape[3] > _WIDEST or v_dim > _WIDEST:
        reasons.append(f"head dims up to {_WIDEST}, got D = {q.shape[3]}, Dv = {v_dim}")
    return reasons


def forward(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options
) -> None:
    """Fill ``out`` (B, Hq, Lq, Dv), any strides, ``lse`` (B, Hq, Lq) and ``statistics`` (2, B, Hq, Lq), contiguous.

    Raises:
        MemoryError: there is none for the packed tiles.
    """
    attention = _pack_attention(out, lse, statistics, q, k, v, options)
    packed, _kept = _pack_operands(operands, q)
    if status := library.load().fastattn_cpu_forward(attention, packed):
        library.check(status)


def backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    """Fill the gradients that are not None, each of the shape of its input.

    Raises:
        MemoryError: there is none for the packed tiles.
    """
    attention = _pack_attention(out, statistics, statistics, q, k, v, options)
    packed, _kept = _pack_operands(operands, q)
    learned = (gradients.dbias, gradients.dalibi_slopes, gradients.dsinks)
    fill = [None if x is None else _compute(x, statistics.dtype, x.numel() > 0) for x in learned]
    dlse = None if dlse is None else dlse.to(statistics.dtype).contiguous()
    arguments = _GRADIENTS.pack(
        dout.data_ptr(), *dout.stride(), _address(dlse),
        gradients.dq.data_ptr(), *gradients.dq.stride(), gradients.dk.data_ptr(), *gradients.dk.stride(),
        gradients.dv.data_ptr(), *gradients.dv.stride(), *map(_address, fill),
    )  # fmt: skip
    if status := library.load().fastattn_cpu_backward(attention, packed, arguments):
        library.check(status)
    for gradient, computed in zip(learned, fill, strict=True):
        if gradient is not None and computed is not None and computed is not gradient:
            gradient.copy_(computed)


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``k`` and ``v`` (B, H, L, D) into the caches from position ``lens[b]`` on, where the cache has a place.

    With ``cu_seqlens_q`` they are (1, H, total, D), one entry after the other. With scales the caches are quantised.
    """
    arguments, _kept = pack_append(k_cache, v_cache, k, v, lens, block_table, cu_seqlens_q, k_scale, v_scale)
    if status := library.load().fastattn_cpu_append(arguments):
        library.check(status)


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Fill ``out`` (B, Hq, Lq, Dv), any strides, and ``lse`` (B, Hq, Lq), contiguous.

    ``spec.num_splits`` means nothing here: the keys are divided by shapes and lengths.
    """
    q_len = spec.q.shape[2]
    lens, shortest, longest, starts = spec.lens, q_len, q_len, _int32(spec.cu_seqlens_q)
    if starts is not None:
        queries = starts.diff()
        shortest, longest = (int(x) for x in queries.aminmax())
        lens = lens if spec.added is not None else lens + queries
    least = least_tall(spec)
    if longest >= least:
        attend = _attend_tall
        if spec.k_scale is not None or spec.mask is not None or spec.bias is not None:
            attend = _attend_tall_by_entry
        attend(out, lse, spec, lens if spec.added is None else lens + spec.added, least)
    if shortest >= least:
        return
    arguments, _kept = pack_decode(out, lse, spec, lens, starts)
    if status := library.load().fastattn_cpu_decode(arguments):
        library.check(status)


def rotate(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Fill y (rows, heads, head_dim) with x, of which dimension i is turned with i + head_dim / 2; elements adjacent.

    Row r takes row ``r % positions`` of cos and sin, float32 (positions, head_dim / 2) and contiguous. ``back`` turns
    the other way.
    """
    if status := library.load().fastattn_cpu_rotate(pack_rotate(y, x, cos, sin, None, back)):
        library.check(status)


def pack_rotate(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, back: bool = False) -> bytes:
    """The struct of `rotate`; ``position`` int64 (rows,) says which row of the tables each row takes."""
    return _ROTATE.pack(
        *team(), x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), cos.data_ptr(), sin.data_ptr(),
        _address(position), cos.shape[0], DTYPES[x.dtype], *x.shape, back,
    )  # fmt: skip


def dropout(y: Tensor, x: Tensor, p: float, seed: int) -> None:
    """Fill ``y`` with what dropout leaves of x (..., width), both contiguous.

    The bits are those of the reference's `dropout_keep` for batch entry 0, head 0, the row and the column.
    """
    width = x.shape[-1]
    arguments = _DROPOUT.pack(*team(), x.data_ptr(), y.data_ptr(), seed, DTYPES[x.dtype], x.numel() // width, width, p)
    if status := library.load().fastattn_cpu_dropout(arguments):
        library.check(status)


def _attend_tall(out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, least: int) -> None:
    """The batch entries that have at least so many queries, by the kernel with taller tiles, which packs its keys.

    It reads them where they are, page by page. ``lens``: keys of each entry.
    """
    capacity = spec.capacity if spec.k_cache.shape[0] else 0
    k, v = spec.k_cache.transpose(1, 2), spec.v_cache.transpose(1, 2)
    table, (pages, page_size, _) = _pages(spec.k_cache, spec.block_table)
    operands = Operands(
        alibi_slopes=spec.alibi_slopes, sinks=spec.sinks, cu_seqlens_q=spec.cu_seqlens_q,
        seqused_k=lens.clamp(0, capacity),
    )  # fmt: skip
    options = Options(spec.left, spec.right, None, spec.scale, spec.softcap)
    statistics = lse.new_empty((2, *lse.shape))
    attention = _pack_attention(out, lse, statistics, spec.q, k, v, options, capacity)
    packed, _kept = _pack_operands(operands, spec.q, (*_table(table), pages, page_size, least))
    if status := library.load().fastattn_cpu_forward(attention, packed):
        library.check(status)


def _attend_tall_by_entry(out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, least: int) -> None:
    """`_attend_tall` where the kernel could not read the cache or a mask where they are: on a copy of each entry's."""
    q_len, starts = spec.q.shape[2], [0] * spec.entries if spec.mask_start is None else spec.mask_start.tolist()
    rows = [(0, q_len)] * spec.entries
    if spec.cu_seqlens_q is not None:
        rows = list(itertools.pairwise(spec.cu_seqlens_q.tolist()))
    for entry, (length, (first, end)) in enumerate(zip(lens.tolist(), rows, strict=True)):
        if end - first < least:
            continue
        one, length = slice(entry, entry + 1), min(max(length, 0), spec.capacity)
        k, v = (
            dequantised(cache, scale, spec.block_table, one, length, spec.q.dtype).to(spec.q.dtype)
            for cache, scale in ((spec.k_cache, spec.k_scale), (spec.v_cache, spec.v_scale))
        )
        mask, bias, slopes = (
            x if x is None or x.shape[0] == 1 else x[one] for x in (spec.mask, spec.bias, spec.alibi_slopes)
        )
        operands = Operands(
            over_keys(mask, starts[entry], length, True), over_keys(bias, starts[entry], length, 0.0), slopes,
            spec.sinks,
        )  # fmt: skip
        options = Options(spec.left, spec.right, length - (end - first), spec.scale, spec.softcap)
        batch = one if spec.cu_seqlens_q is None else slice(None)
        own_lse = lse.new_empty((1, lse.shape[1], end - first))
        q, own_out = spec.q[batch, :, first:end], out[batch, :, first:end]
        forward(own_out, own_lse, lse.new_empty((2, *own_lse.shape)), q, k, v, operands, options)
        lse[batch, :, first:end] = own_lse


# Packing


def least_tall(spec: CacheSpec) -> int:
    """From how many queries on a batch entry goes to the kernel with taller tiles."""
    return -(-_TALL // (spec.q.shape[1] // spec.v_cache.shape[2]))


def pack_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[bytes, tuple[Any, ...]]:  # fmt: skip
    """(the struct of `kv_cache_append`, what was made for it, to be kept until the call returns)."""
    _, kv_heads, new_len, head_dim = k.shape
    lens, starts = lens.to(torch.int64).contiguous(), _int32(cu_seqlens_q)
    table, pages = _pages(k_cache, block_table)
    address = quantised = 0
    if k_scale is not None:
        address, quantised = _pack_quantised(k_cache, k_scale, v_cache, v_scale, k.dtype)
    packed = _APPEND.pack(
        *team(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), k_cache.data_ptr(), *k_cache.stride(),
        v_cache.data_ptr(), *v_cache.stride(), lens.data_ptr(), *_table(table), k.element_size(),
        lens.shape[0], kv_heads, new_len, head_dim, v.shape[3], *pages, _address(starts), address,
    )  # fmt: skip
    return packed, (lens, starts, table, quantised)


def pack_decode(
    out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, starts: Tensor | None
) -> tuple[bytes, tuple[Any, ...]]:  # fmt: skip
    """(the struct of `attention_kvcache` for entries with few queries, what was made for it)."""
    _, q_heads, q_len, head_dim = spec.q.shape
    kv_heads, v_dim = spec.v_cache.shape[2:]
    lens = lens.to(torch.int64).contiguous()
    table, pages = _pages(spec.k_cache, spec.block_table)
    slopes = None if spec.alibi_slopes is None else _compute(spec.alibi_slopes, lse.dtype)
    sinks = None if spec.sinks is None else _compute(spec.sinks, lse.dtype)
    q, k_cache, v_cache = spec.q, spec.k_cache, spec.v_cache
    terms = quantised = None
    terms_address = address = 0
    if spec.mask is not None or spec.bias is not None:
        terms_address, terms = _pack_score_terms(spec)
    if spec.k_scale is not None:
        address, quantised = _pack_quantised(k_cache, spec.k_scale, v_cache, spec.v_scale, q.dtype)
    packed = _DECODE.pack(
        *team(), q.data_ptr(), *q.stride(), k_cache.data_ptr(), *k_cache.stride(), v_cache.data_ptr(),
        *v_cache.stride(), out.data_ptr(), *out.stride(), lse.data_ptr(), lens.data_ptr(), *_table(table),
        _address(slopes), 0 if slopes is None or slopes.shape[0] == 1 else q_heads, _address(sinks), DTYPES[q.dtype],
        spec.entries, q_heads, kv_heads, q_len, head_dim, v_dim, *pages, spec.added or 0, _side(spec.left),
        _side(spec.right), spec.scale, spec.softcap or 0.0, _address(starts), least_tall(spec) - 1,
        terms_address, address,
    )  # fmt: skip
    return packed, (lens, starts, table, slopes, sinks, terms, quantised)


def _pack_score_terms(spec: CacheSpec) -> tuple[int, tuple[Any, ...]]:
    """(address of the struct of mask and bias, what it lies in and points to)."""
    mask, bias = spec.mask, spec.bias
    start = None if spec.mask_start is None else spec.mask_start.to(torch.int64).contiguous()
    packed = _SCORE_TERMS.pack(
        *_view(mask), *_view(bias), 0 if mask is None else mask.shape[3],
        0 if bias is None else bias.shape[3], 0 if bias is None else DTYPES[bias.dtype], _address(start),
    )  # fmt: skip
    return _placed(packed, mask, bias, start)


def _pack_quantised(
    k_cache: Tensor, k_scale: Tensor | None, v_cache: Tensor, v_scale: Tensor | None, dtype: torch.dtype
) -> tuple[int, tuple[Any, ...]]:  # fmt: skip
    """(address of the struct of a quantised cache or 0, what it lies in and points to); ``dtype`` is that of rows."""
    if k_scale is None or v_scale is None:
        return 0, ()
    views: list[int] = []
    for scale, cache in ((k_scale, k_cache), (v_scale, v_cache)):
        views += (scale.data_ptr(), *scale_rows(scale, cache).stride(), 0)
    packed = _QUANTISED.pack(
        _CACHE_DTYPES[k_cache.dtype], *views, DTYPES[dtype], k_scale.ndim == 3, v_scale.ndim == 3
    )  # fmt: skip
    return _placed(packed, k_scale, v_scale)


def _placed(packed: bytes, *tensors: Tensor | None) -> tuple[int, tuple[Any, ...]]:
    """(address of a struct, its memory and the tensors that it points to)."""
    memory = ctypes.create_string_buffer(packed, len(packed))
    return ctypes.addressof(memory), (memory, *tensors)


def team() -> tuple[int, int]:
    """Threads of a call, and who runs them."""
    if library.forked():
        return 1, 0
    return torch.get_num_threads(), library.parallel_address()


def _side(side: int | None) -> int:
    return _OPEN if side is None else side


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pack_attention(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options,
    capacity: int | None = None,
) -> bytes:  # fmt: skip
    """``capacity``: positions of each batch entry of a cache, where k and v are one."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    kv_len = kv_len if capacity is None else capacity
    left, right, q_offset, scale, softcap, dropout_p = options
    return _ATTENTION.pack(
        *team(), q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), out.data_ptr(),
        *out.stride(), lse.data_ptr(), statistics.data_ptr(), DTYPES[q.dtype], batch, q_heads, kv_heads, q_len, kv_len,
        head_dim, v_dim, _side(left), _side(right), _side(q_offset), scale, softcap or 0.0, dropout_p,
    )  # fmt: skip


def _pack_operands(
    operands: Operands, q: Tensor, cache: tuple[int, ...] = (0,) * 5
) -> tuple[bytes | None, list[Tensor]]:  # fmt: skip
    """(the struct, or None without operands; the tensors it points to, to be kept until the call returns).

    ``cache``: the last five fields of the struct.
    """
    mask, bias, slopes, sinks, q_offset, seed, cu_seqlens_q, cu_seqlens_k, seqused_k, blocks = operands
    if not blocks and all(x is None for x in operands[:-1]):
        return None, []
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    slopes = None if slopes is None else _compute(slopes, compute)
    sinks = None if sinks is None else _compute(sinks, compute)
    q_offset = None if q_offset is None else q_offset.to(torch.int64).contiguous()
    cu_seqlens_q, cu_seqlens_k, seqused_k = map(_int32, (cu_seqlens_q, cu_seqlens_k, seqused_k))
    blocks = [x.contiguous() for x in blocks]
    table = blocks[4] if blocks else None
    dropout_origin = 0 if seed is None or seed.numel() == 1 else seed[1:].data_ptr()
    packed = _OPERANDS.pack(
        *_view(mask), *_view(bias), 0 if bias is None else DTYPES[bias.dtype],
        *((0,) * 4 if bias is None else bias.shape), _address(slopes),
        0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1], _address(sinks), _address(q_offset),
        _address(seed), dropout_origin, _address(cu_seqlens_q), _address(cu_seqlens_k), _address(seqused_k),
        0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        *(map(_address, blocks) if blocks else (0,) * 6), *((0, 0) if table is None else table.shape[:2]), *cache,
    )  # fmt: skip
    tensors = (mask, bias, slopes, sinks, q_offset, seed, cu_seqlens_q, cu_seqlens_k, seqused_k)
    return packed, [x for x in tensors if x is not None] + blocks


def _view(operand: Tensor | None) -> tuple[int, ...]:
    """Address and strides; 0 where it broadcasts."""
    if operand is None:
        return _ABSENT
    strides = (0 if n == 1 else s for s, n in zip(operand.stride(), operand.shape, strict=True))
    return operand.data_ptr(), *strides


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _compute(tensor: Tensor, dtype: torch.dtype, fresh: bool = False) -> Tensor:
    """Contiguous and in the compute type: the tensor itself, or a copy; ``fresh`` asks for the copy's memory alone."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype) if fresh else tensor.to(dtype).contiguous()


def _pages(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """(table with adjacent entries; pages, page size or 0, positions per batch entry)."""
    if block_table is None:
        return None, (cache.shape[0], 0, cache.shape[1])
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    return table, (cache.shape[0], cache.shape[1], table.shape[1] * cache.shape[1])


def _table(table: Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.data_ptr(), table.stride(0))
