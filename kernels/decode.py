"""Attention over a KV cache, contiguous or paged: split-KV (flash-decoding, Dao et al., 2023).

A decode step has few queries and many keys. So the query heads that share a key head form the rows of one tile, and
several programs divide the keys. A second kernel merges their partial results.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.spec.cache import CacheSpec
from fastattn.spec.operands import Operands, Rotary

from . import config, launch, replay
from .append import (
    append_rows,
    cache_rows,
    cache_unit,
    dequantised,
    load_keys,
    load_scales,
    pages_of,
)  # fmt: skip
from .operands import Partial
from .ranges import first_key, locate, rows_of, skip_before, tile_position, tile_ranges
from .scores import (
    base_2,
    empty_softmax,
    finish_scores,
    finish_softmax,
    from_natural,
    hide_unseen,
    lose_rows,
    merge_sink,
    natural,
    nearest_key,
    online_softmax,
    store_statistics,
)
from .tiles import add_products, cast, columns_of_pieces, decode_stride, finite, products

RUNTIME = (
    "table_stride", "entries", "kv_heads", "group", "q_len", "added", "capacity", "pages", "splits", "left", "right",
)  # fmt: skip
COMBINE_RUNTIME = ("entries", "q_heads", "q_len", "total", "splits")


@triton.jit
def cached_length(lens_ptr, batch, added, capacity):
    """The number of keys of this batch entry, at most the capacity of the cache."""
    return tl.minimum(tl.maximum(tl.load(lens_ptr + batch).to(tl.int64) + added, 0), capacity).to(tl.int32)


@triton.jit
def locate_keys(table_ptr, batch, col, start, end, pages, CHECK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """(page, slot) of the keys ``col .. col + BLOCK``, 64-bit; a contiguous cache has one page per batch entry.

    ``table_ptr`` points to this entry's row. Page numbers are clamped to existing pages. With ``CHECK`` the kernel does
    not read the table outside ``start .. end``.
    """
    keys = col + tl.arange(0, BLOCK)
    if PAGE == 0:
        return batch, keys.to(tl.int64)
    else:
        if PAGE % BLOCK == 0:  # one page holds the whole tile
            page = tl.load(table_ptr + col // PAGE)
        elif CHECK:
            page = tl.load(table_ptr + keys // PAGE, mask=(keys >= start) & (keys < end), other=0)
        else:
            page = tl.load(table_ptr + keys // PAGE)
        return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64), (keys % PAGE).to(tl.int64)


@triton.jit
def head_row_offsets(x, batch, heads, rows, UNIT: tl.constexpr):
    """The offsets of rows (batch, heads[i], rows[i]) of an `operands.Rows`, in elements."""
    offset = batch * decode_stride(x.strides[0], UNIT) + heads * decode_stride(x.strides[1], UNIT)
    return offset + rows.to(tl.int64) * decode_stride(x.strides[2], UNIT)


@triton.jit(do_not_specialize=RUNTIME)
def decode_kernel(
    q, k, v, out, lse_ptr, partial, lens_ptr, table_ptr, cu_seqlens_ptr, terms, mask_start_ptr, kv_start_ptr,
    table_stride, entries, kv_heads, group, q_len, added, capacity, pages, splits, left, right,
    PAGE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one key head against one split of the keys they see.

    Row r is query head r % group of the key head's group, at query position r // group. The result is final, or one of
    ``splits`` partial results if ``partial`` is not None. With ``cu_seqlens_ptr`` the queries are packed. ``added``
    None means that each entry has appended as many keys as it has queries.
    """
    READS_SCORES: tl.constexpr = terms.mask.ptr is not None or terms.bias.ptr is not None
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, tiles, batch, kv_head = locate(rest, cu_seqlens_ptr, entries, kv_heads, q_len * group, BLOCK_M, group)
    memory_entry, q_first, q_rows = rows_of(cu_seqlens_ptr, batch, q_len)
    if cu_seqlens_ptr is not None:
        if tile * BLOCK_M >= q_rows * group:
            return
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, inside = packed // group, packed < q_rows * group
    heads = kv_head * group + packed % group
    if PAGE != 0:
        table_ptr += batch * table_stride
    slope = terms.slopes
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + batch * kv_heads * group + heads)[:, None]
    mask_start = 0
    if mask_start_ptr is not None:
        mask_start = tl.load(mask_start_ptr + batch).to(tl.int32)

    kv_len = cached_length(lens_ptr, batch, q_rows if added is None else added, capacity)
    offset = kv_len - q_rows
    start, edges_left, right_start, edges, inner_start, inners, own_start, end = split_range(
        tile, split, splits, group, q_rows, kv_len, left, right, BLOCK_M, BLOCK_N
    )
    if kv_start_ptr is not None:
        first_seen = first_key(kv_start_ptr, batch, kv_len)
        start = tl.maximum(start, first_seen)
        own_start, edges_left, right_start, edges, inner_start, inners = skip_before(
            first_seen, own_start, edges_left, right_start, edges, inner_start, inners, BLOCK_N
        )
    q_cols, v_cols = columns_of_pieces(HEAD_DIM), columns_of_pieces(V_DIM)
    at = head_row_offsets(q, memory_entry, heads, q_first + rows, UNIT)
    q_tile = [tl.load(q.ptr + (at[:, None] + x), mask=inside[:, None] & (x < HEAD_DIM), other=0.0) for x in q_cols]
    acc, row_max, row_sum = empty_softmax(BLOCK_M, V_DIM)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else inners):
            col = tile_position(number, own_start, edges_left, right_start, inner_start, EDGE == 1, BLOCK_N)
            cols = (col + tl.arange(0, BLOCK_N))[None, :]
            page, slot = locate_keys(table_ptr, batch, col, start, end, pages, EDGE == 1, PAGE, BLOCK_N)
            k_tile = load_keys(k, kv_head, page, slot, col, start, end, EDGE == 1, HEAD_DIM, UNIT, BLOCK_N)
            if k.scale is not None:
                k_tile = dequantised(k_tile, None, q_tile[0].dtype)
            s = products(q_tile, k_tile, PRECISION)
            if k.scale is not None:  # after the product: there are fewer scores than numbers
                s *= load_scales(k, kv_head, page, slot, col, start, end, EDGE == 1, BLOCK_N)[None, :]
            queries = rows[:, None]
            s, _ = finish_scores(
                s, queries, cols, q_rows, kv_len, offset, terms, slope, batch, heads[:, None], EDGE == 1, mask_start
            )
            first = None if kv_start_ptr is None else first_seen
            s = hide_unseen(s, queries, cols, kv_len, offset, left, right, first, None, EDGE == 1)
            v_tile = load_keys(v, kv_head, page, slot, col, start, end, EDGE == 1, V_DIM, UNIT, BLOCK_N)
            if v.scale is not None:  # before the product: weights times a small scale could leave the range of float16
                scales = load_scales(v, kv_head, page, slot, col, start, end, EDGE == 1, BLOCK_N)
                v_tile = dequantised(v_tile, scales, q_tile[0].dtype)
            if EDGE or READS_SCORES:
                s, v_tile = lose_rows(s, v_tile), finite(v_tile)
            p, acc, row_max, row_sum = online_softmax(s, acc, row_max, row_sum, terms, EDGE == 1 or READS_SCORES)
            acc = add_products(acc, p, v_tile, PRECISION)

    if terms.slopes is not None:  # `finish_scores` has added this to every score of the row
        slope = tl.load(terms.slopes + batch * kv_heads * group + heads)
        row_max -= slope * nearest_key(rows, offset, kv_len, terms).to(tl.float32)
    if terms.sinks is not None:
        sink = from_natural(tl.load(terms.sinks + heads), terms)
        acc, row_max, row_sum = merge_sink(sink, acc, row_max, row_sum, terms)
    row_max, row_sum, empty = finish_softmax(row_max, row_sum)
    acc = [piece / row_sum[:, None] for piece in acc]
    index = (memory_entry * kv_heads * group + heads) * q_len + (q_first + rows)
    stored = [inside[:, None] & (x < V_DIM) for x in v_cols]
    if partial.out is None:
        offsets = head_row_offsets(out, memory_entry, heads, q_first + rows, UNIT)
        for i in tl.static_range(len(acc)):
            tl.store(out.ptr + (offsets[:, None] + v_cols[i]), cast(acc[i], out.ptr.dtype.element_ty), mask=stored[i])
        lse = natural(row_max, terms) + tl.log(row_sum)
        tl.store(lse_ptr + index, tl.where(empty, float("-inf"), lse), mask=inside)
    else:
        total = (tl.num_programs(0) // (tiles * splits)).to(tl.int64) * group * q_len
        index += tl.cast(split, tl.int64) * total
        for i in tl.static_range(len(acc)):
            tl.store(partial.out + (index[:, None] * V_DIM + v_cols[i]), acc[i], mask=stored[i])
        row_max = tl.where(empty, float("-inf"), row_max)
        store_statistics(partial.statistics, total * splits, index, row_max, row_sum, inside)


@triton.jit
def split_range(
    tile, split, splits, group, q_len, kv_len, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The keys of one split, as (start, the last five of `tile_ranges`, its start, end).

    ``start .. end`` are the keys that the tile may read.
    """
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
    own_start, edges_left, right_start, edges, inner_start, inners = tile_ranges(
        own_start, inner_start, tl.minimum(inner_end, own_end), own_end, False, False, BLOCK_N
    )
    return start, edges_left, right_start, edges, inner_start, inners, own_start, end


@triton.jit(do_not_specialize=COMBINE_RUNTIME)
def combine_kernel(
    partial, out, lse_ptr, cu_seqlens_ptr, terms, entries, q_heads, q_len, total, splits,
    UNIT: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one row of the result from its partial results, BLOCK_N splits at a time."""
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    index = tl.program_id(0).to(tl.int64)
    row, batch_head = index % q_len, index // q_len
    if cu_seqlens_ptr is not None:
        if row >= tl.load(cu_seqlens_ptr + entries):  # a row outside every entry
            return
    batch, head = batch_head // q_heads, batch_head % q_heads
    log_sums = partial.statistics + tl.cast(total, tl.int64) * splits
    cols = tl.arange(0, BLOCK_DV)
    largest = tl.full([], float("-inf"), tl.float32)
    for first in tl.range(0, splits, BLOCK_N):
        split = first + tl.arange(0, BLOCK_N)
        at = split.to(tl.int64) * total + index
        maxima = tl.load(partial.statistics + at, mask=split < splits, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(maxima))
    if terms.sinks is not None:  # one more score, with value vector 0
        sink = from_natural(tl.load(terms.sinks + head), terms)
        largest = tl.maximum(largest, sink)
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    weights = tl.zeros([], tl.float32)
    for first in tl.range(0, splits, BLOCK_N):
        split = first + tl.arange(0, BLOCK_N)
        at = split.to(tl.int64) * total + index
        maxima = tl.load(partial.statistics + at, mask=split < splits, other=float("-inf"))
        log_sum = tl.load(log_sums + at, mask=split < splits, other=0.0)
        weight = tl.math.exp2(base_2(maxima - pivot, terms) + log_sum)
        inside = (split < splits)[:, None] & (cols < V_DIM)[None, :]
        part = tl.load(partial.out + (at[:, None] * V_DIM + cols[None, :]), mask=inside, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
        weights += tl.sum(weight)
    if terms.sinks is not None:
        weights += tl.math.exp2(base_2(sink - pivot, terms))
    empty = weights == 0.0
    weights = tl.where(empty, 1.0, weights)
    out_ptr = out.ptr + head_row_offsets(out, batch, head, row, UNIT)
    tl.store(out_ptr + cols, cast(acc / weights, out.ptr.dtype.element_ty), mask=cols < V_DIM)
    tl.store(lse_ptr + index, tl.where(empty, float("-inf"), natural(pivot, terms) + tl.log(weights)))


def choose_splits(programs: int, keys: int, block_n: int, multiprocessors: int, split_programs: int) -> int:
    """The number of parts of ``keys`` such that ``programs`` times as many programs fill the device.

    It aims at ``split_programs`` per multiprocessor, with at least four tiles of keys each at full length and at most
    128 parts. It depends on shapes only: lengths are on the device, and a captured graph keeps its grid.
    """
    return max(1, min(split_programs * multiprocessors // max(programs, 1), keys // (4 * block_n), 128))


def splits_of(spec: CacheSpec) -> int:
    """The number of parts into which `attention_kvcache` divides the keys."""
    cfg = _configure(spec)
    return _splits(spec, cfg, _programs(spec, cfg))


def _configure(spec: CacheSpec) -> config.LaunchConfig:
    _, q_heads, q_len, head_dim = spec.q.shape
    mean = q_len if spec.cu_seqlens_q is None else -(-q_len // spec.entries)  # most are prompts, or steps
    return config.lookup(
        "decode", launch.architecture(spec.q.device), max(head_dim, spec.v_cache.shape[3]), spec.q.element_size(),
        rows=q_heads // spec.k_cache.shape[2] * mean, indirect=spec.block_table is not None,
        crowded=any(x is not None and x.shape[2] != 1 for x in (spec.mask, spec.bias)),
    )  # fmt: skip


def _programs(spec: CacheSpec, cfg: config.LaunchConfig) -> int:
    """The programs for one part of the keys."""
    memory_entries, q_heads, q_len, _ = spec.q.shape
    kv_heads = spec.k_cache.shape[2]
    return launch.tiles(q_heads // kv_heads * q_len, cfg.block_m, spec.cu_seqlens_q) * memory_entries * kv_heads


def _splits(spec: CacheSpec, cfg: config.LaunchConfig, programs: int) -> int:
    if spec.num_splits is not None:
        return spec.num_splits
    capacity, left, right = spec.capacity, spec.left, spec.right
    keys = capacity if left is None or right is None else min(capacity, max(left + right + spec.q.shape[2], 0))
    return choose_splits(programs, keys, cfg.block_n, launch.multiprocessors(spec.q.device), cfg.split_programs)


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Launch the decode kernel, and the combine kernel if there are splits; they fill ``out`` and ``lse``.

    ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq), float32, contiguous. The caches already hold the entries that
    `spec` adds. Scratch memory: num_splits * (Dv + 2) float32 per row of the result, if there is more than one split.
    """
    _attend(out, lse, spec._replace(k=None, v=None, length=None))


def append_and_attend(out: Tensor, lse: Tensor, spec: CacheSpec, rotary: Rotary | None = None) -> None:
    """Launch the append kernel for the entries that `spec` adds, then the kernels of `attention_kvcache`.

    The first one also turns the queries and new keys by ``rotary``.
    """
    _attend(out, lse, spec if spec.length is None else spec._replace(length=None), rotary)


@replay.replayed
def _attend(out: Tensor, lse: Tensor, spec: CacheSpec, rotary: Rotary | None = None) -> None:
    """Launch the kernels. ``spec`` has no length: it changes with every step, and nothing here reads it."""
    if spec.k is not None and spec.v is not None:
        q = spec.q if rotary is None else replay.scratch(spec.q.shape, spec.q)
        append_rows(
            spec.k_cache, spec.v_cache, spec.k, spec.v, spec.lens, spec.block_table, spec.cu_seqlens_q, spec.k_scale,
            spec.v_scale, rotary, spec.q, q,
        )  # fmt: skip
        spec = spec._replace(q=q)
    k_cache, v_cache, left, right = spec.k_cache, spec.v_cache, spec.left, spec.right
    memory_entries, q_heads, q_len, head_dim = spec.q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    q, scale, _ = launch.positive_scale(launch.unit_last(spec.q), spec.scale)
    unit = cache_unit(k_cache, v_cache, q, out)
    table, table_stride, page, capacity = pages_of(k_cache, spec.block_table)
    group, total = q_heads // kv_heads, memory_entries * q_heads * q_len
    entries, starts = spec.entries, spec.cu_seqlens_q
    cfg = _configure(spec)
    programs = _programs(spec, cfg)
    if programs == 0:
        return
    splits = _splits(spec, cfg, programs)
    partial = Partial(None, None)
    if splits > 1:
        partial = Partial(replay.scratch((splits, total, v_dim), lse), replay.scratch((2, splits, total), lse))
    operands = Operands(alibi_slopes=spec.alibi_slopes, sinks=spec.sinks)
    terms = launch.terms(operands, scale, spec.softcap, entries, (entries, q_heads, q_len, capacity))
    for name, x in (("mask", spec.mask), ("bias", spec.bias)):
        if x is not None:
            full = (entries, q_heads, q_len, x.shape[3])
            terms = terms._replace(**{name: launch.scores(x, full, columns=x.shape[3])})
    out_rows = launch.rows(out, unit)
    with replay.on_device(q):
        arguments = (
            launch.rows(q, unit), cache_rows(k_cache, unit, spec.k_scale), cache_rows(v_cache, unit, spec.v_scale),
            out_rows, lse, partial, spec.lens.contiguous(), table, starts,
            terms if splits == 1 else terms._replace(sinks=None), spec.mask_start, spec.kv_start, table_stride, entries,
            kv_heads, group, q_len, spec.added, capacity, k_cache.shape[0], splits, left, right, page, unit,
            launch.dot_precision(q.dtype), head_dim, v_dim, cfg.block_m, cfg.block_n,
        )  # fmt: skip
        replay.start(decode_kernel, programs * splits, arguments, cfg)
        if splits > 1:
            cfg = config.lookup("combine", launch.architecture(q.device), max(head_dim, v_dim), q.element_size())
            arguments = (
                partial, out_rows, lse, starts, terms, entries, q_heads, q_len, total, splits, unit, v_dim, cfg.block_n,
            )  # fmt: skip
            replay.start(combine_kernel, total, arguments, cfg)
