"""Attention over a KV cache, contiguous or paged: split-KV (flash-decoding, Dao et al., 2023), and the append to it.

A decode step has few queries and many keys. So the query heads that share a key head are rows of one tile, and the keys
are divided among several programs, whose partial results a second kernel merges.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .primitives import (
    LN2,
    LOG2E,
    cast,
    dot,
    exponent_scale,
    finish_scores,
    online_softmax,
    stride,
    tile_position,
    tile_ranges,
)

RUNTIME = (
    "q_strides", "k_strides", "v_strides", "out_strides", "table_stride", "kv_heads", "group", "q_len", "added",
    "capacity", "pages", "splits", "total", "left", "right",
)  # fmt: skip
COMBINE_RUNTIME = ("out_strides", "q_heads", "q_len", "total", "splits")
APPEND_RUNTIME = (
    "k_cache_strides", "v_cache_strides", "k_strides", "v_strides", "table_stride", "kv_heads", "new_len", "capacity",
    "pages",
)  # fmt: skip


@triton.jit
def cached_length(lens_ptr, batch, added, capacity):
    """Keys of this batch entry, cut to what the cache can hold."""
    return tl.minimum(tl.maximum(tl.load(lens_ptr + batch).to(tl.int64) + added, 0), capacity).to(tl.int32)


@triton.jit
def locate_keys(table_ptr, batch, col, start, end, pages, CHECK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """(page, slot) of the keys ``col .. col + BLOCK``, 64-bit; a contiguous cache has one page per batch entry.

    ``table_ptr`` points to this entry's row. Page numbers are cut to those that exist; with ``CHECK`` the table is not
    read outside ``start .. end``.
    """
    keys = col + tl.arange(0, BLOCK)
    if PAGE == 0:
        return batch, keys.to(tl.int64)
    else:
        if PAGE % BLOCK == 0:  # the whole tile lies in one page
            page = tl.load(table_ptr + col // PAGE)
        elif CHECK:
            page = tl.load(table_ptr + keys // PAGE, mask=(keys >= start) & (keys < end), other=0)
        else:
            page = tl.load(table_ptr + keys // PAGE)
        return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64), (keys % PAGE).to(tl.int64)


@triton.jit
def columns(strides, UNIT: tl.constexpr, UNIT_COLS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of the elements of one cache row."""
    cols = tl.arange(0, BLOCK_C)
    if UNIT_COLS:
        return cols
    else:
        return cols.to(tl.int64) * stride(strides[3], UNIT)


@triton.jit
def load_keys(
    ptr, page, slot, strides, col, start, end, CHECK: tl.constexpr, N_COLS: tl.constexpr, UNIT: tl.constexpr,
    UNIT_COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows ``col .. col + BLOCK_R`` of one head of the cache; with ``CHECK`` zero outside ``start .. end``."""
    rows = page * stride(strides[0], UNIT) + slot * stride(strides[1], UNIT)
    ptrs = ptr + (rows[:, None] + columns(strides, UNIT, UNIT_COLS, BLOCK_C)[None, :])
    keys = (col + tl.arange(0, BLOCK_R))[:, None]
    inside = tl.arange(0, BLOCK_C)[None, :] < N_COLS
    if CHECK and N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=(keys >= start) & (keys < end) & inside, other=0.0)
    elif CHECK:
        return tl.load(ptrs, mask=(keys >= start) & (keys < end), other=0.0)
    elif N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=inside, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit(do_not_specialize=RUNTIME)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lens_ptr, table_ptr, slopes_ptr, sinks_ptr,
    q_strides, k_strides, v_strides, out_strides, table_stride,
    kv_heads, group, q_len, added, capacity, pages, splits, total, left, right, qk_scale, softcap,
    DIRECT: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, UNIT_COLS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one key head against one split of the keys they see.

    Row r is query head r % group of the key head's group, at query position r // group. With ``DIRECT`` the result is
    final; otherwise normalised accumulators (splits, total, V_DIM) and their lse in base 2 (splits, total) are stored.
    """
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    tiles = tl.cdiv(q_len * group, BLOCK_M)
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, batch_head = rest % tiles, (rest // tiles).to(tl.int64)
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, inside = packed // group, packed < q_len * group
    heads = kv_head * group + packed % group
    q_ptr += batch * stride(q_strides[0], UNIT)
    k_ptr += kv_head * stride(k_strides[2], UNIT)
    v_ptr += kv_head * stride(v_strides[2], UNIT)
    if PAGE != 0:
        table_ptr += batch * table_stride
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * kv_heads * group + heads)[:, None]

    kv_len = cached_length(lens_ptr, batch, added, capacity)
    offset = kv_len - q_len
    first_row = tile * BLOCK_M // group
    last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, q_len * group) - 1
    last_row = last_row // group
    start, end, inner_start, inner_end = 0, kv_len, 0, kv_len
    if right is not None:
        end = tl.minimum(tl.maximum(last_row + offset + right + 1, 0), kv_len)
        inner_end = tl.minimum(tl.maximum(first_row + offset + right + 1, 0), kv_len)
    if left is not None:
        start = tl.minimum(tl.maximum(first_row + offset - left, 0), kv_len)
        inner_start = tl.minimum(tl.maximum(last_row + offset - left, 0), kv_len)
    aligned = start // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(end - aligned, 0), BLOCK_N), splits) * BLOCK_N
    own_start = aligned + split * share
    own_end = tl.minimum(own_start + share, end)
    own_start, first, resume, edges, inner_start, inners = tile_ranges(
        own_start, inner_start, tl.minimum(inner_end, own_end), own_end, False, False, BLOCK_N
    )

    scale = exponent_scale(qk_scale, softcap, slope, None)
    q_cols, v_cols = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q_rows = heads * stride(q_strides[1], UNIT) + rows.to(tl.int64) * stride(q_strides[2], UNIT)
    q = tl.load(q_ptr + (q_rows[:, None] + q_cols), mask=inside[:, None] & (q_cols < HEAD_DIM), other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else inners):
            col = tile_position(number, own_start, first, resume, inner_start, EDGE == 1, BLOCK_N)
            cols = (col + tl.arange(0, BLOCK_N))[None, :]
            page, slot = locate_keys(table_ptr, batch, col, start, end, pages, EDGE == 1, PAGE, BLOCK_N)
            k = load_keys(
                k_ptr, page, slot, k_strides, col, start, end, EDGE == 1, HEAD_DIM, UNIT, UNIT_COLS, BLOCK_N, BLOCK_D
            )
            s, _ = finish_scores(
                dot(q, tl.trans(k), None, PRECISION), rows[:, None], cols, q_len, kv_len, offset, left, right,
                qk_scale, softcap, slope, None, None, None, None, None, EDGE == 1, False, True, False, True,
            )  # fmt: skip
            p, acc, row_max, row_sum = online_softmax(s, scale, acc, row_max, row_sum, EDGE == 1)
            v = load_keys(
                v_ptr, page, slot, v_strides, col, start, end, EDGE == 1, V_DIM, UNIT, UNIT_COLS, BLOCK_N, BLOCK_DV
            )
            acc = dot(cast(p, v.dtype), v, acc, PRECISION)

    if DIRECT and sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads) * LOG2E
        pivot = tl.maximum(row_max, sink)
        alpha = tl.math.exp2(row_max - pivot)
        row_sum = row_sum * alpha + tl.math.exp2(sink - pivot)
        acc = acc * alpha[:, None]
        row_max = pivot
    empty = row_sum == 0.0  # nothing visible: output 0, lse -inf
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    index = (batch * kv_heads * group + heads) * q_len + rows
    stored = inside[:, None] & (v_cols < V_DIM)
    if DIRECT:
        lse = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(row_sum))
        out_ptr += batch * stride(out_strides[0], UNIT)
        out_rows = heads * stride(out_strides[1], UNIT) + rows.to(tl.int64) * stride(out_strides[2], UNIT)
        tl.store(out_ptr + (out_rows[:, None] + v_cols), cast(acc, out_ptr.dtype.element_ty), mask=stored)
    else:
        lse = tl.where(empty, float("-inf"), row_max + tl.math.log2(row_sum))
        index += tl.cast(split, tl.int64) * total
        tl.store(out_ptr + (index[:, None] * V_DIM + v_cols), acc, mask=stored)
    tl.store(lse_ptr + index, lse, mask=inside)


@triton.jit(do_not_specialize=COMBINE_RUNTIME)
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr, out_strides, q_heads, q_len, total, splits,
    UNIT: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one row of the result from its partial results, BLOCK_N splits at a time."""
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    index = tl.program_id(0).to(tl.int64)
    row, batch_head = index % q_len, index // q_len
    batch, head = batch_head // q_heads, batch_head % q_heads
    cols = tl.arange(0, BLOCK_DV)
    largest = tl.full([], float("-inf"), tl.float32)
    for first in tl.range(0, splits, BLOCK_N):
        split = first + tl.arange(0, BLOCK_N)
        at = split.to(tl.int64) * total + index
        largest = tl.maximum(largest, tl.max(tl.load(partial_lse_ptr + at, mask=split < splits, other=float("-inf"))))
    if sinks_ptr is not None:  # one more score, whose value vector is 0
        sink = tl.load(sinks_ptr + head) * LOG2E
        largest = tl.maximum(largest, sink)
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    weights = tl.zeros([], tl.float32)
    for first in tl.range(0, splits, BLOCK_N):
        split = first + tl.arange(0, BLOCK_N)
        at = split.to(tl.int64) * total + index
        weight = tl.math.exp2(tl.load(partial_lse_ptr + at, mask=split < splits, other=float("-inf")) - pivot)
        inside = (split < splits)[:, None] & (cols < V_DIM)[None, :]
        part = tl.load(partial_ptr + (at[:, None] * V_DIM + cols[None, :]), mask=inside, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
        weights += tl.sum(weight)
    if sinks_ptr is not None:
        weights += tl.math.exp2(sink - pivot)
    empty = weights == 0.0
    weights = tl.where(empty, 1.0, weights)
    out_ptr += batch * stride(out_strides[0], UNIT) + head * stride(out_strides[1], UNIT)
    out_ptr += row * stride(out_strides[2], UNIT)
    tl.store(out_ptr + cols, cast(acc / weights, out_ptr.dtype.element_ty), mask=cols < V_DIM)
    tl.store(lse_ptr + index, tl.where(empty, float("-inf"), pivot * LN2 + tl.log(weights)))


@triton.jit
def copy_rows(
    cache_ptr, ptr, cache_strides, strides, batch, head, row, page, slot, inside,
    N_COLS: tl.constexpr, UNIT: tl.constexpr, UNIT_COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy rows (head, row) of a batch entry to (page, slot, head) of the cache, bit by bit."""
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None] & (cols < N_COLS)
    rows = batch * stride(strides[0], UNIT) + head * stride(strides[1], UNIT)
    rows += row.to(tl.int64) * stride(strides[2], UNIT)
    cached = page * stride(cache_strides[0], UNIT) + slot * stride(cache_strides[1], UNIT)
    cached += head * stride(cache_strides[2], UNIT)
    tile = tl.load(ptr + (rows[:, None] + cols), mask=mask)
    tl.store(cache_ptr + (cached[:, None] + columns(cache_strides, UNIT, UNIT_COLS, BLOCK_C)[None, :]), tile, mask=mask)


@triton.jit(do_not_specialize=APPEND_RUNTIME)
def append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lens_ptr, table_ptr,
    k_cache_strides, v_cache_strides, k_strides, v_strides, table_stride, kv_heads, new_len, capacity, pages,
    PAGE: tl.constexpr, UNIT: tl.constexpr, UNIT_COLS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M new rows of one batch entry, heads of one position side by side, as the cache has them.

    A row whose position or page does not exist is written nowhere: cut to a valid place, it would destroy another row.
    """
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    tiles = tl.cdiv(new_len * kv_heads, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    packed = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // kv_heads, (packed % kv_heads).to(tl.int64)
    position = tl.load(lens_ptr + batch).to(tl.int64) + row
    inside = (row < new_len) & (position >= 0) & (position < capacity)
    page, slot = batch, position
    if PAGE != 0:
        entry = table_ptr + batch * table_stride + position // PAGE
        page, slot = tl.load(entry, mask=inside, other=-1).to(tl.int64), position % PAGE
        inside = inside & (page >= 0) & (page < pages)
    copy_rows(
        k_cache_ptr, k_ptr, k_cache_strides, k_strides, batch, head, row, page, slot, inside, HEAD_DIM, UNIT, UNIT_COLS,
        BLOCK_D,
    )  # fmt: skip
    copy_rows(
        v_cache_ptr, v_ptr, v_cache_strides, v_strides, batch, head, row, page, slot, inside, V_DIM, UNIT, UNIT_COLS,
        BLOCK_DV,
    )  # fmt: skip


def _cache_layout(k_cache: Tensor, v_cache: Tensor, *others: Tensor) -> tuple[bool, int]:
    """(adjacent elements in every cache row, unit of all strides). A cache is too large to copy where they are not."""
    unit_cols = all(t.stride(3) == 1 or t.shape[3] == 1 for t in (k_cache, v_cache))
    return unit_cols, launch.stride_unit(k_cache, v_cache, *others) if unit_cols else 1


def _cache_strides(cache: Tensor, unit: int) -> tuple[int, int, int, int]:
    """Page, row and head strides as `launch.strides` codes them, and that of the columns, used where it is not 1."""
    return *launch.strides(cache, unit), 16 * cache.stride(3)


def _pages(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """(table with adjacent entries, its row stride, page size or 0, positions per batch entry)."""
    if block_table is None:
        return None, 0, 0, cache.shape[1]
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    # Without a page nothing can be read: no position exists then.
    return table, table.stride(0), cache.shape[1], table.shape[1] * cache.shape[1] if cache.shape[0] else 0


def choose_splits(programs: int, keys: int, block_n: int, multiprocessors: int, split_programs: int) -> int:
    """Into how many parts to divide ``keys`` so that ``programs`` times as many fill the device.

    ``split_programs`` for each multiprocessor, at least four tiles of keys for each at full length, at most 128 parts.
    A function of shapes alone: lengths are on the device, and a captured graph keeps its grid.
    """
    return max(1, min(split_programs * multiprocessors // max(programs, 1), keys // (4 * block_n), 128))


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None
) -> None:
    """Write ``k`` (B, Hk, L, D) and ``v`` (B, Hk, L, Dv) into the caches, from position ``lens[b]`` on.

    Caches (B, Lmax, Hk, D) and (B, Lmax, Hk, Dv), or (pages, page_size, Hk, D) and (pages, page_size, Hk, Dv) with
    ``block_table`` int32 (B, max_pages); ``lens`` int32 or int64 (B,). Rows that have no place in the cache are left
    out.
    """
    batch, kv_heads, new_len, head_dim = k.shape
    k, v = launch.unit_last(k), launch.unit_last(v)
    unit_cols, unit = _cache_layout(k_cache, v_cache, k, v)
    table, table_stride, page, capacity = _pages(k_cache, block_table)
    cfg = config.lookup("append", launch.architecture(k.device), max(head_dim, v.shape[3]), k.element_size())
    programs = triton.cdiv(new_len * kv_heads, cfg.block_m) * batch
    if programs == 0:
        return
    with launch.on_device(k):
        append_kernel[(programs,)](
            k_cache, v_cache, k, v, lens.contiguous(), table,
            _cache_strides(k_cache, unit), _cache_strides(v_cache, unit), launch.strides(k, unit),
            launch.strides(v, unit), table_stride, kv_heads, new_len, capacity, k_cache.shape[0],
            page, unit, unit_cols, head_dim, v.shape[3], cfg.block_m, **cfg.options(),
        )  # fmt: skip


def attention_kvcache(
    out: Tensor, lse: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, lens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, *, added: int, length: int | None, left: int | None,
    right: int | None, scale: float, softcap: float | None, num_splits: int | None,
) -> None:  # fmt: skip
    """Launch the decode kernel, and the combine kernel if there are splits; they fill ``out`` and ``lse``.

    ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq), float32, contiguous; ``q`` (B, Hq, Lq, D); caches and block table
    as in `kv_cache_append`. Batch entry b has ``lens[b] + added`` keys, and its last query stands at the last of them;
    ``length``, the same number where the host knows it, is not used. Scratch memory: num_splits * (Dv + 1) float32 per
    row of the result, if there is more than one split.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    q = launch.unit_last(q)
    q, scale = launch.positive_scale(q, scale)
    unit_cols, unit = _cache_layout(k_cache, v_cache, q, out)
    table, table_stride, page, capacity = _pages(k_cache, block_table)
    group, total = q_heads // kv_heads, batch * q_heads * q_len
    architecture, widest = launch.architecture(q.device), max(head_dim, v_dim)
    cfg = config.lookup(
        "decode", architecture, widest, q.element_size(), rows=group * q_len, indirect=table is not None
    )  # fmt: skip
    programs = triton.cdiv(group * q_len, cfg.block_m) * batch * kv_heads
    if programs == 0:
        return
    splits = num_splits
    if splits is None:
        keys = capacity if left is None or right is None else min(capacity, max(left + right + q_len, 0))
        splits = choose_splits(programs, keys, cfg.block_n, launch.multiprocessors(q.device), cfg.split_programs)
    target, target_lse = out, lse
    if splits > 1:
        target = lse.new_empty((splits, total, v_dim))
        target_lse = lse.new_empty((splits, total))
    head_sinks, out_strides = launch.float32(sinks), launch.strides(out, unit)
    with launch.on_device(q):
        decode_kernel[(programs * splits,)](
            q, k_cache, v_cache, target, target_lse, lens.contiguous(), table,
            launch.slopes(alibi_slopes, batch), head_sinks if splits == 1 else None,
            launch.strides(q, unit), _cache_strides(k_cache, unit), _cache_strides(v_cache, unit), out_strides,
            table_stride, kv_heads, group, q_len, added, capacity, k_cache.shape[0], splits, total, left, right,
            scale * LOG2E.value, softcap, splits == 1, page, unit, unit_cols, launch.dot_precision(q.dtype),
            head_dim, v_dim, cfg.block_m, cfg.block_n, **cfg.options(),
        )  # fmt: skip
        if splits > 1:
            cfg = config.lookup("combine", architecture, widest, q.element_size())
            combine_kernel[(total,)](
                target, target_lse, out, lse, head_sinks, out_strides, q_heads, q_len, total, splits,
                unit, v_dim, cfg.block_n, **cfg.options(),
            )  # fmt: skip
