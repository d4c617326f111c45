"""Fill the structs of `csrc/cpu/interface.h` from tensors, field by field.

Each function returns the bytes. If it makes tensors or structs, it returns these too, to be kept until the call
returns.
"""

import ctypes
import struct
import sys
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.cpu import library
from fastattn.spec import CacheSpec, Gradients, Operands, Options
from fastattn.spec.cache_operands import scale_rows

_OPEN = -(1 << 63)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_CACHE_DTYPES = {torch.int8: 4, torch.float8_e4m3fn: 5}

# The structs of the interface: every field has 8 bytes.
ATTENTION = struct.Struct("@2q20q2q8q3q3d")
OPERANDS = struct.Struct("@10q5q3q3q4q1q6q2q5q")
GRADIENTS = struct.Struct("@5q1q15q3q")
DECODE = struct.Struct("@2q20q8q6q3q3q2d5q")
APPEND = struct.Struct("@2q20q4q5q3q2q")
SCORE_TERMS = struct.Struct("@10q3q1q")
QUANTISED = struct.Struct("@1q10q1q2q")
DROPOUT = struct.Struct("@2q2q4q1d")
RMS_NORM = struct.Struct("@2q5q3q1d")
GATE = struct.Struct("@2q5q3q")
ROTATE = struct.Struct("@2q2q2q4q5q2q")
_ABSENT = (0,) * 5
_WORD = 8
_BY_ADDRESS = struct.Struct("@3q32sq32sq32sq32s2q112s")
"""ATTENTION, where what stands between two addresses is one piece."""

# From this many query rows per key head on, a prompt goes to the kernel with taller tiles, which packs keys first.
_TALL = 32


def pack_attention(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options,
    capacity: int | None = None,
) -> bytes:  # fmt: skip
    """The struct of `attention`. ``capacity``: positions per batch entry, if k and v are a cache."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    kv_len = kv_len if capacity is None else capacity
    left, right, q_offset, scale, softcap, dropout_p = options
    return ATTENTION.pack(
        *team(), q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), out.data_ptr(),
        *out.stride(), lse.data_ptr(), statistics.data_ptr(), DTYPES[q.dtype], batch, q_heads, kv_heads, q_len, kv_len,
        head_dim, v_dim, _side(left), _side(right), _side(q_offset), scale, softcap or 0.0, dropout_p,
    )  # fmt: skip


def pack_operands(
    operands: Operands, q: Tensor, cache: tuple[int, ...] = (0,) * 5
) -> tuple[bytes | None, list[Tensor]]:  # fmt: skip
    """(the struct, or None without operands; the tensors it points to, to be kept until the call returns).

    ``cache``: the last five fields of the struct.
    """
    *single, blocks = operands
    if not blocks and all(x is None for x in single):
        return None, []
    mask, bias, slopes, sinks, q_offset, seed, cu_seqlens_q, cu_seqlens_k, seqused_k, kv_start = single
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    slopes = None if slopes is None else in_compute_dtype(slopes, compute)
    sinks = None if sinks is None else in_compute_dtype(sinks, compute)
    q_offset, kv_start = _int64(q_offset), _int64(kv_start)
    cu_seqlens_q, cu_seqlens_k, seqused_k = map(int32, (cu_seqlens_q, cu_seqlens_k, seqused_k))
    blocks = [x.contiguous() for x in blocks]
    table = blocks[4] if blocks else None
    dropout_origin = 0 if seed is None or seed.numel() == 1 else seed[1:].data_ptr()
    packed = OPERANDS.pack(
        *_view(mask), *_view(bias), 0 if bias is None else DTYPES[bias.dtype],
        *((0,) * 4 if bias is None else bias.shape), _address(slopes),
        0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1], _address(sinks), _address(q_offset),
        _address(seed), dropout_origin, _address(cu_seqlens_q), _address(cu_seqlens_k), _address(seqused_k),
        _address(kv_start), 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        *(map(_address, blocks) if blocks else (0,) * 6), *((0, 0) if table is None else table.shape[:2]), *cache,
    )  # fmt: skip
    tensors = (mask, bias, slopes, sinks, q_offset, seed, cu_seqlens_q, cu_seqlens_k, seqused_k, kv_start)
    return packed, [x for x in tensors if x is not None] + blocks


class Repeated:
    """`pack_attention` and `pack_operands` of calls that differ in addresses alone: all else is packed once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.kept: tuple[bytes, ...] | None = None

    def pack(
        self, out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[bytes, bytes | None]:  # fmt: skip
        """The structs. ``mask`` may lack dimensions; it is the only operand."""
        if self.kept is None:
            _, _, _, of_q, _, of_k, _, of_v, _, of_out, _, _, numbers = _BY_ADDRESS.unpack(
                pack_attention(out, lse, statistics, q, k, v, self.options)
            )
            operands = Operands(None if mask is None else mask[(None,) * (4 - mask.ndim)])
            self.kept = of_q, of_k, of_v, of_out, numbers, (pack_operands(operands, q)[0] or b"")[_WORD:]
        of_q, of_k, of_v, of_out, numbers, of_mask = self.kept
        packed = _BY_ADDRESS.pack(
            *team(), q.data_ptr(), of_q, k.data_ptr(), of_k, v.data_ptr(), of_v, out.data_ptr(), of_out,
            lse.data_ptr(), statistics.data_ptr(), numbers,
        )  # fmt: skip
        return packed, None if mask is None else mask.data_ptr().to_bytes(_WORD, sys.byteorder) + of_mask


def pack_gradients(gradients: Gradients, learned: list[Tensor | None], dout: Tensor, dlse: Tensor | None) -> bytes:
    """``learned``: dbias, dalibi_slopes and dsinks, contiguous and in the dtype of the statistics."""
    return GRADIENTS.pack(
        dout.data_ptr(), *dout.stride(), _address(dlse),
        gradients.dq.data_ptr(), *gradients.dq.stride(), gradients.dk.data_ptr(), *gradients.dk.stride(),
        gradients.dv.data_ptr(), *gradients.dv.stride(), *map(_address, learned),
    )  # fmt: skip


def pack_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[bytes, tuple[Any, ...]]:  # fmt: skip
    """(the struct of `kv_cache_append`, the tensors made for it, to be kept until the call returns)."""
    _, kv_heads, new_len, head_dim = k.shape
    lens, starts = lens.to(torch.int64).contiguous(), int32(cu_seqlens_q)
    table, pages = pages_of(k_cache, block_table)
    address = quantised = 0
    if k_scale is not None:
        address, quantised = _pack_quantised(k_cache, k_scale, v_cache, v_scale, k.dtype)
    packed = APPEND.pack(
        *team(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), k_cache.data_ptr(), *k_cache.stride(),
        v_cache.data_ptr(), *v_cache.stride(), lens.data_ptr(), *table_fields(table), k.element_size(),
        lens.shape[0], kv_heads, new_len, head_dim, v.shape[3], *pages, _address(starts), address,
    )  # fmt: skip
    return packed, (lens, starts, table, quantised)


def least_tall(spec: CacheSpec) -> int:
    """The least number of queries with which a batch entry goes to the kernel with taller tiles."""
    return -(-_TALL // (spec.q.shape[1] // spec.v_cache.shape[2]))


def pack_decode(
    out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, starts: Tensor | None
) -> tuple[bytes, tuple[Any, ...]]:  # fmt: skip
    """(the struct of `attention_kvcache` for entries with few queries, the tensors made for it)."""
    _, q_heads, q_len, head_dim = spec.q.shape
    kv_heads, v_dim = spec.v_cache.shape[2:]
    lens = lens.to(torch.int64).contiguous()
    table, pages = pages_of(spec.k_cache, spec.block_table)
    slopes = None if spec.alibi_slopes is None else in_compute_dtype(spec.alibi_slopes, lse.dtype)
    sinks = None if spec.sinks is None else in_compute_dtype(spec.sinks, lse.dtype)
    q, k_cache, v_cache = spec.q, spec.k_cache, spec.v_cache
    kv_start = _int64(spec.kv_start)
    terms = quantised = None
    terms_address = address = 0
    if spec.mask is not None or spec.bias is not None:
        terms_address, terms = _pack_score_terms(spec)
    if spec.k_scale is not None:
        address, quantised = _pack_quantised(k_cache, spec.k_scale, v_cache, spec.v_scale, q.dtype)
    packed = DECODE.pack(
        *team(), q.data_ptr(), *q.stride(), k_cache.data_ptr(), *k_cache.stride(), v_cache.data_ptr(),
        *v_cache.stride(), out.data_ptr(), *out.stride(), lse.data_ptr(), lens.data_ptr(), *table_fields(table),
        _address(slopes), 0 if slopes is None or slopes.shape[0] == 1 else q_heads, _address(sinks), DTYPES[q.dtype],
        spec.entries, q_heads, kv_heads, q_len, head_dim, v_dim, *pages, spec.added or 0, _side(spec.left),
        _side(spec.right), spec.scale, spec.softcap or 0.0, _address(starts), least_tall(spec) - 1,
        terms_address, address, _address(kv_start),
    )  # fmt: skip
    return packed, (lens, starts, table, slopes, sinks, terms, quantised, kv_start)


def _pack_score_terms(spec: CacheSpec) -> tuple[int, tuple[Any, ...]]:
    """(address of the struct of mask and bias, its memory and the tensors that it points to)."""
    mask, bias = spec.mask, spec.bias
    start = _int64(spec.mask_start)
    packed = SCORE_TERMS.pack(
        *_view(mask), *_view(bias), 0 if mask is None else mask.shape[3],
        0 if bias is None else bias.shape[3], 0 if bias is None else DTYPES[bias.dtype], _address(start),
    )  # fmt: skip
    return _placed(packed, mask, bias, start)


def _pack_quantised(
    k_cache: Tensor, k_scale: Tensor | None, v_cache: Tensor, v_scale: Tensor | None, dtype: torch.dtype
) -> tuple[int, tuple[Any, ...]]:  # fmt: skip
    """(address of the struct of a quantised cache or 0, its memory and tensors); ``dtype`` is that of rows."""
    if k_scale is None or v_scale is None:
        return 0, ()
    views: list[int] = []
    for scale, cache in ((k_scale, k_cache), (v_scale, v_cache)):
        views += (scale.data_ptr(), *scale_rows(scale, cache).stride(), 0)
    packed = QUANTISED.pack(
        _CACHE_DTYPES[k_cache.dtype], *views, DTYPES[dtype], k_scale.ndim == 3, v_scale.ndim == 3
    )  # fmt: skip
    return _placed(packed, k_scale, v_scale)


def pack_rotate(
    y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, back: bool = False,
    interleaved: bool = False,
) -> bytes:  # fmt: skip
    """The struct of `rotate` and `turn`; ``position`` int64 (rows,) gives each row's row of the tables."""
    return ROTATE.pack(
        *team(), x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), cos.data_ptr(), sin.data_ptr(),
        _address(position), cos.shape[0], DTYPES[x.dtype], *x.shape, back, 2 * cos.shape[1], interleaved,
    )  # fmt: skip


def pack_dropout(y: Tensor, x: Tensor, p: float, seed: int) -> bytes:
    """The struct of `dropout`."""
    width = x.shape[-1]
    return DROPOUT.pack(*team(), x.data_ptr(), y.data_ptr(), seed, DTYPES[x.dtype], x.numel() // width, width, p)


def pack_rms_norm(
    y: Tensor, x: Tensor, weight: Tensor, eps: float, dy: Tensor | None, dweight: Tensor | None
) -> bytes:  # fmt: skip
    """The struct of `rms_norm` and its gradients."""
    width = x.shape[-1]
    return RMS_NORM.pack(
        *team(), x.data_ptr(), weight.data_ptr(), _address(dy), y.data_ptr(), _address(dweight), DTYPES[x.dtype],
        x.numel() // width, width, eps,
    )  # fmt: skip


def pack_gate(y: Tensor, gate: Tensor, up: Tensor, dy: Tensor | None, dup: Tensor | None) -> bytes:
    """The struct of `gate` and its gradients."""
    return GATE.pack(
        *team(), gate.data_ptr(), up.data_ptr(), _address(dy), y.data_ptr(), _address(dup), DTYPES[gate.dtype],
        gate.numel() // gate.shape[-1], gate.shape[-1],
    )  # fmt: skip


def team() -> tuple[int, int]:
    """The number of threads of a call, and the address of the function that runs them."""
    if library.forked():
        return 1, 0
    return torch.get_num_threads(), library.parallel_address()


def _placed(packed: bytes, *tensors: Tensor | None) -> tuple[int, tuple[Any, ...]]:
    """(address of a struct, its memory and the tensors that it points to)."""
    memory = ctypes.create_string_buffer(packed, len(packed))
    return ctypes.addressof(memory), (memory, *tensors)


def _view(operand: Tensor | None) -> tuple[int, ...]:
    """Address and strides; the stride is 0 along a dimension that broadcasts."""
    if operand is None:
        return _ABSENT
    strides = (0 if n == 1 else s for s, n in zip(operand.stride(), operand.shape, strict=True))
    return operand.data_ptr(), *strides


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _side(side: int | None) -> int:
    return _OPEN if side is None else side


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def in_compute_dtype(tensor: Tensor, dtype: torch.dtype, fresh: bool = False) -> Tensor:
    """The tensor, or a copy, contiguous and in the compute type. With ``fresh``, a copy is only allocated."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype) if fresh else tensor.to(dtype).contiguous()


def pages_of(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """(table with adjacent entries; pages, page size or 0, positions per batch entry)."""
    if block_table is None:
        return None, (cache.shape[0], 0, cache.shape[1])
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    return table, (cache.shape[0], cache.shape[1], table.shape[1] * cache.shape[1])


def table_fields(table: Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.data_ptr(), table.stride(0))
