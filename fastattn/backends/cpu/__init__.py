"""The fused CPU kernels of ``csrc/cpu``: all features of the operator, forward, backward and over a KV cache.

`packing` packs a call into bytes, which one ctypes call passes to the library.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.cpu import library, packing
from fastattn.spec import UNDIVIDED, AttentionSpec, CacheSpec, Gradients, Operands, Options
from fastattn.spec.cache_operands import dequantised, over_keys

_WIDEST = 1 << 16


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
    if q.device.type != "cpu":  # the only reason: no other argument would change it
        return [f"runs on CPUs, the tensors are on {q.device.type!r}"]
    reasons = []
    if torch.compiler.is_compiling():  # tracing cannot load the library; the call itself then raises
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
    attention = packing.pack_attention(out, lse, statistics, q, k, v, options)
    packed, _kept = packing.pack_operands(operands, q)
    if status := library.load().fastattn_cpu_forward(attention, packed):
        library.check(status)


def repeated_forward(options: Options) -> Callable[..., None]:
    """`forward` for calls whose tensors have the sizes, dtypes and strides of the first one, in less time.

    It takes out, lse, statistics, q, k, v and a mask or None, which may lack dimensions.
    """
    pack, run = packing.Repeated(options).pack, library.load().fastattn_cpu_forward

    def call(*tensors: Any) -> None:
        if status := run(*pack(*tensors)):
            library.check(status)

    return call


def backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    """Fill the gradients that are not None, each of the shape of its input.

    Raises:
        MemoryError: there is none for the packed tiles.
    """
    attention = packing.pack_attention(out, statistics, statistics, q, k, v, options)
    packed, _kept = packing.pack_operands(operands, q)
    learned = (gradients.dbias, gradients.dalibi_slopes, gradients.dsinks)
    fill = [None if x is None else packing.in_compute_dtype(x, statistics.dtype, x.numel() > 0) for x in learned]
    dlse = None if dlse is None else dlse.to(statistics.dtype).contiguous()
    arguments = packing.pack_gradients(gradients, fill, dout, dlse)
    if status := library.load().fastattn_cpu_backward(attention, packed, arguments):
        library.check(status)
    for gradient, computed in zip(learned, fill, strict=True):
        if gradient is not None and computed is not None and computed is not gradient:
            gradient.copy_(computed)


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``k`` and ``v`` (B, H, L, D) into the caches from position ``lens[b]`` on, up to its capacity.

    With ``cu_seqlens_q`` they are (1, H, total, D), one entry after the other. With scales, the caches are quantised.
    """
    arguments, _kept = packing.pack_append(k_cache, v_cache, k, v, lens, block_table, cu_seqlens_q, k_scale, v_scale)
    if status := library.load().fastattn_cpu_append(arguments):
        library.check(status)


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Fill ``out`` (B, Hq, Lq, Dv), any strides, and ``lse`` (B, Hq, Lq), contiguous.

    Shapes and lengths decide how the kernel divides keys. It ignores ``spec.num_splits`` unless that is `UNDIVIDED`.
    """
    q_len = spec.q.shape[2]
    lens, shortest, longest, starts = spec.lens, q_len, q_len, packing.int32(spec.cu_seqlens_q)
    if starts is not None:
        queries = starts.diff()
        shortest, longest = (int(x) for x in queries.aminmax())
        lens = lens if spec.added is not None else lens + queries
    least = 0 if spec.num_splits == UNDIVIDED else packing.least_tall(spec)
    if longest >= least:
        attend = _attend_tall
        if spec.k_scale is not None or spec.mask is not None or spec.bias is not None:
            attend = _attend_tall_by_entry
        attend(out, lse, spec, lens if spec.added is None else lens + spec.added, least)
    if shortest >= least:
        return
    arguments, _kept = packing.pack_decode(out, lse, spec, lens, starts)
    if status := library.load().fastattn_cpu_decode(arguments):
        library.check(status)


def rotate(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Fill y (rows, heads, head_dim) with x, rotating dimension i with i + head_dim / 2; elements are adjacent.

    Row r uses row ``r % positions`` of cos and sin, float32 (positions, head_dim / 2) and contiguous. ``back`` rotates
    the other way.
    """
    if status := library.load().fastattn_cpu_rotate(packing.pack_rotate(y, x, cos, sin, None, back)):
        library.check(status)


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `turn` takes x and the tables."""
    tables = all(table.dtype == torch.float32 and table.is_contiguous() for table in (cos, sin))
    return tables and cos.numel() > 0 and x.dtype != torch.float64


def turn(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, L, D) turned by its positions (B, L), cut to those of the tables, float32 (positions, R / 2).

    The first R numbers of each head turn: 2 i with 2 i + 1 if ``interleaved``, else i with i + R / 2.
    """
    batch, heads, length, head_dim = x.shape
    rows = x.transpose(1, 2).reshape(batch * length, heads, head_dim)
    if rows.stride()[1:] != (head_dim, 1):
        rows = rows.contiguous()
    y, position = torch.empty(rows.shape, dtype=x.dtype), position.reshape(-1)
    if status := library.load().fastattn_cpu_rotate(
        packing.pack_rotate(y, rows, cos, sin, position, interleaved=interleaved)
    ):
        library.check(status)
    return y.view(batch, length, heads, head_dim).transpose(1, 2)


def dropout(y: Tensor, x: Tensor, p: float, seed: int) -> None:
    """Fill ``y`` with dropout of x (..., width), both contiguous.

    The bits are those of the reference's `dropout_keep` for batch entry 0, head 0, the row and the column.
    """
    if status := library.load().fastattn_cpu_dropout(packing.pack_dropout(y, x, p, seed)):
        library.check(status)


def rms_norm(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Fill y with x / sqrt(mean(x ** 2) + eps) * weight; x (..., width) and all else contiguous."""
    if status := library.load().fastattn_cpu_rms_norm(packing.pack_rms_norm(y, x, weight, eps, None, None)):
        library.check(status)


def rms_norm_gradients(dx: Tensor, dweight: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Fill dx and dweight, the gradients of `rms_norm` where dy is that of y; all contiguous.

    Raises:
        MemoryError: there is no memory for the sums over rows.
    """
    if status := library.load().fastattn_cpu_rms_norm(packing.pack_rms_norm(dx, x, weight, eps, dy, dweight)):
        library.check(status)


def gate(y: Tensor, gate: Tensor, up: Tensor) -> None:
    """Fill y with silu(gate) * up, all of one shape and contiguous."""
    if status := library.load().fastattn_cpu_gate(packing.pack_gate(y, gate, up, None, None)):
        library.check(status)


def gate_gradients(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """Fill dgate and dup, the gradients of `gate` where dy is that of y; all contiguous."""
    if status := library.load().fastattn_cpu_gate(packing.pack_gate(dgate, gate, up, dy, dup)):
        library.check(status)


def _attend_tall(out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, least: int) -> None:
    """Compute the batch entries with at least this many queries by the kernel with taller tiles, which packs its keys.

    It reads them in place, page by page. ``lens``: keys of each entry.
    """
    capacity = spec.capacity if spec.k_cache.shape[0] else 0
    k, v = spec.k_cache.transpose(1, 2), spec.v_cache.transpose(1, 2)
    table, (pages, page_size, _) = packing.pages_of(spec.k_cache, spec.block_table)
    operands = Operands(
        alibi_slopes=spec.alibi_slopes, sinks=spec.sinks, cu_seqlens_q=spec.cu_seqlens_q,
        seqused_k=lens.clamp(0, capacity), kv_start=spec.kv_start,
    )  # fmt: skip
    options = Options(spec.left, spec.right, None, spec.scale, spec.softcap)
    statistics = lse.new_empty((2, *lse.shape))
    attention = packing.pack_attention(out, lse, statistics, spec.q, k, v, options, capacity)
    packed, _kept = packing.pack_operands(operands, spec.q, (*packing.table_fields(table), pages, page_size, least))
    if status := library.load().fastattn_cpu_forward(attention, packed):
        library.check(status)


def _attend_tall_by_entry(out: Tensor, lse: Tensor, spec: CacheSpec, lens: Tensor, least: int) -> None:
    """`_attend_tall` on a copy of each entry's cache, for a cache or mask that the kernel cannot read in place."""
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
            spec.sinks, kv_start=None if spec.kv_start is None else spec.kv_start[one],
        )  # fmt: skip
        options = Options(spec.left, spec.right, length - (end - first), spec.scale, spec.softcap)
        batch = one if spec.cu_seqlens_q is None else slice(None)
        own_lse = lse.new_empty((1, lse.shape[1], end - first))
        q, own_out = spec.q[batch, :, first:end], out[batch, :, first:end]
        forward(own_out, own_lse, lse.new_empty((2, *own_lse.shape)), q, k, v, operands, options)
        lse[batch, :, first:end] = own_lse
