"""KV caches, contiguous or paged: their layout, reading them, and appending to them."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.spec.operands import Rotary

from . import config, launch, replay
from .operands import Cache, Rows, Turning
from .ranges import locate, rows_of
from .tiles import cast, decode_size, decode_stride, first_column, head_rows, is_cut, piece_columns, pieces, scaled

RUNTIME = (
    "table_stride", "entries", "kv_heads", "new_len", "capacity", "pages", "q_heads", "q_len", "positions",
)  # fmt: skip
NOTHING_TURNS = Turning(None, None, Rows(None, None), Rows(None, None))


@triton.jit
def columns(cache, UNIT: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of the elements ``FIRST .. FIRST + BLOCK_C`` of one row of an `operands.Cache`."""
    cols = tl.arange(FIRST, FIRST + BLOCK_C)
    if cache.strides[3] is None:
        return cols
    else:
        return cols.to(tl.int64) * decode_stride(cache.strides[3], UNIT)


@triton.jit
def cached_rows(cache, page, slot, UNIT: tl.constexpr):
    """The offsets of rows (page, slot) of head 0 in elements, with 64 bits."""
    return page * decode_stride(cache.strides[0], UNIT) + slot * decode_stride(cache.strides[1], UNIT)


@triton.jit
def scale_offsets(cache, head, page, slot):
    """The offsets of the scales of rows (page, slot, head) of a quantised cache, with 64 bits."""
    offset = head * decode_size(cache.scale_strides[2])
    if cache.scale_strides[0] is not None:
        offset += page * decode_size(cache.scale_strides[0]) + slot * decode_size(cache.scale_strides[1])
    return offset


@triton.jit
def load_keys(
    cache, kv_head, page, slot, col, start, end, CHECK: tl.constexpr, N_COLS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows ``col .. col + BLOCK_R`` of one head, in pieces; with ``CHECK`` zero outside ``start .. end``."""
    rows = cached_rows(cache, page, slot, UNIT) + kv_head * decode_stride(cache.strides[2], UNIT)
    tile = ()
    for i in tl.static_range(pieces(N_COLS)):
        cols = columns(cache, UNIT, first_column(N_COLS, i), piece_columns(N_COLS, i))
        ptrs = cache.ptr + (rows[:, None] + cols[None, :])
        keys = (col + tl.arange(0, BLOCK_R))[:, None]
        inside = (first_column(N_COLS, i) + tl.arange(0, piece_columns(N_COLS, i)))[None, :] < N_COLS
        if CHECK and is_cut(N_COLS, i):
            tile += (tl.load(ptrs, mask=(keys >= start) & (keys < end) & inside, other=0.0),)
        elif CHECK:
            tile += (tl.load(ptrs, mask=(keys >= start) & (keys < end), other=0.0),)
        elif is_cut(N_COLS, i):
            tile += (tl.load(ptrs, mask=inside, other=0.0),)
        else:
            tile += (tl.load(ptrs),)
    return tile


@triton.jit
def load_scales(cache, kv_head, page, slot, col, start, end, CHECK: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of the keys ``col .. col + BLOCK`` of one head of a quantised cache; with ``CHECK`` 0 outside."""
    ptrs = cache.scale + scale_offsets(cache, kv_head, page, slot)
    if cache.scale_strides[0] is None:
        return tl.zeros([BLOCK], tl.float32) + tl.load(ptrs)
    elif CHECK:
        keys = col + tl.arange(0, BLOCK)
        return tl.load(ptrs, mask=(keys >= start) & (keys < end), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def dequantised(tile, scales, dtype: tl.constexpr):
    """Numbers of a quantised cache in the dtype of the queries: times their scales, or unchanged if these are None."""
    wide = [piece.to(tl.float32) for piece in tile]
    wide = wide if scales is None else scaled(wide, scales[:, None])
    return [cast(piece, dtype) for piece in wide]


@triton.jit
def quantised(tile, cache, head, page, slot, inside):
    """Quantise rows: divide them by their scales, round, and clamp to the range of the cache's dtype.

    If each token has its own scale, this measures and stores it. See `reference.kvcache.quantise`.
    """
    INTEGERS: tl.constexpr = cache.ptr.dtype.element_ty == tl.int8
    LARGEST: tl.constexpr = 127.0 if INTEGERS else 448.0
    x = tile.to(tl.float32)
    ptrs = cache.scale + scale_offsets(cache, head, page, slot)
    if cache.scale_strides[0] is None:
        scale = tl.load(ptrs, mask=inside, other=1.0)
    else:
        scale = tl.math.div_rn(tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1), tl.full([x.shape[0]], LARGEST, tl.float32))
        tl.store(ptrs, scale, mask=inside)
    scale = tl.where(scale == 0.0, 1.0, scale)
    y = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    known = y == y
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if INTEGERS:
        whole = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest integer, ties to even
        return tl.where(known, whole, 0.0).to(tl.int8)
    else:
        return cast(tl.where(known, y, float("nan")), cache.ptr.dtype.element_ty)


@triton.jit
def turned(ptrs, cols, mask, position, positions, turning, R: tl.constexpr, PAIRS: tl.constexpr):
    """Rows at ``ptrs``, 0 outside of ``mask``, whose first R numbers are turned by the position of their row.

    ``PAIRS``: numbers 2 i and 2 i + 1 turn together; otherwise i and i + R / 2. In float32, as `functional.rotary`.
    """
    tile = tl.load(ptrs, mask=mask, other=0.0)
    if PAIRS:
        angle, step = cols // 2, 1 - 2 * (cols % 2)
    else:
        angle, step = cols % (R // 2), tl.where(cols < R // 2, R // 2, -(R // 2))
    turns = mask & (cols < R)
    partner = tl.load(ptrs + step, mask=turns, other=0.0).to(tl.float32)
    at = tl.minimum(tl.maximum(position, 0), positions - 1)[:, None] * (R // 2) + angle
    cos = tl.load(turning.cos + at, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(turning.sin + at, mask=turns, other=0.0).to(tl.float32)
    return cast(tile.to(tl.float32) * cos + tl.where(step > 0, -partner, partner) * sin, tile.dtype)


@triton.jit
def turn_queries(
    program, turning, lens_ptr, cu_seqlens_ptr, entries, heads, new_len, q_len, positions,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M turned queries of one batch entry. The last one stands at the last key."""
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    tile, _, batch, _ = locate(program, cu_seqlens_ptr, entries, 1, q_len * heads, BLOCK_M, heads)
    memory_entry, first, count = rows_of(cu_seqlens_ptr, batch, q_len)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // heads, (packed % heads).to(tl.int64)
    position = tl.load(lens_ptr + batch).to(tl.int64) + row
    if cu_seqlens_ptr is None:
        position += new_len - q_len
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < count)[:, None] & (cols < HEAD_DIM)
    row = (first + row).to(tl.int64)
    ptr, row_stride = head_rows(turning.q, memory_entry, head, 0, UNIT)
    y = turned((ptr + row * row_stride)[:, None] + cols, cols, mask, position, positions, turning, R, PAIRS)
    ptr, row_stride = head_rows(turning.out, memory_entry, head, 0, UNIT)
    tl.store((ptr + row * row_stride)[:, None] + cols, y, mask=mask)


@triton.jit
def copy_rows(
    cache, x, batch, head, row, page, slot, inside, position, positions, turning,
    N_COLS: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy rows (head, row) of a batch entry of ``x`` to (page, slot, head) of the cache, unchanged or quantised.

    If R is not 0, they are turned first.
    """
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None] & (cols < N_COLS)
    ptr, row_stride = head_rows(x, batch, head, 0, UNIT)
    ptrs = (ptr + row.to(tl.int64) * row_stride)[:, None] + cols
    if R != 0:
        tile = turned(ptrs, cols, mask, position, positions, turning, R, PAIRS)
    elif cache.scale is None:
        tile = tl.load(ptrs, mask=mask)
    else:
        tile = tl.load(ptrs, mask=mask, other=0.0)
    if cache.scale is not None:
        tile = quantised(tile, cache, head, page, slot, inside)
    cached = cached_rows(cache, page, slot, UNIT) + head * decode_stride(cache.strides[2], UNIT)
    tl.store(cache.ptr + (cached[:, None] + columns(cache, UNIT, 0, BLOCK_C)[None, :]), tile, mask=mask)


@triton.jit
def append_programs(cu_seqlens_ptr, entries, rows, BLOCK_M: tl.constexpr):
    """`launch.tiles` of all batch entries in memory."""
    if cu_seqlens_ptr is None:
        return tl.cdiv(rows, BLOCK_M) * entries
    else:
        return rows // BLOCK_M + entries


@triton.jit(do_not_specialize=RUNTIME)
def append_kernel(
    k_cache, v_cache, k, v, turning, lens_ptr, table_ptr, cu_seqlens_ptr,
    table_stride, entries, kv_heads, new_len, capacity, pages, q_heads, q_len, positions,
    PAGE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, R: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M new rows of one batch entry; the heads of a position are adjacent rows, as in the cache.

    It does not write a row whose position or page does not exist: at a clamped place, it would destroy another row.
    If R is not 0, it turns the keys, and further programs turn the queries.
    """
    if R != 0:
        turns = tl.program_id(0) - append_programs(cu_seqlens_ptr, entries, new_len * kv_heads, BLOCK_M)
        if turns >= 0:
            turn_queries(
                turns, turning, lens_ptr, cu_seqlens_ptr, entries, q_heads, new_len, q_len, positions, UNIT, HEAD_DIM,
                R, PAIRS, BLOCK_M,
            )  # fmt: skip
            return
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    tile, _, batch, _ = locate(tl.program_id(0), cu_seqlens_ptr, entries, 1, new_len * kv_heads, BLOCK_M, kv_heads)
    memory_entry, first, count = rows_of(cu_seqlens_ptr, batch, new_len)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // kv_heads, (packed % kv_heads).to(tl.int64)
    position = tl.load(lens_ptr + batch).to(tl.int64) + row
    inside = (row < count) & (position >= 0) & (position < capacity)
    page, slot = batch, position
    if PAGE != 0:
        entry = table_ptr + batch * table_stride + position // PAGE
        page, slot = tl.load(entry, mask=inside, other=-1).to(tl.int64), position % PAGE
        inside = inside & (page >= 0) & (page < pages)
    copy_rows(
        k_cache, k, memory_entry, head, first + row, page, slot, inside, position, positions, turning, HEAD_DIM, R,
        PAIRS, UNIT, BLOCK_D,
    )  # fmt: skip
    copy_rows(
        v_cache, v, memory_entry, head, first + row, page, slot, inside, position, positions, turning, V_DIM, 0,
        PAIRS, UNIT, BLOCK_DV,
    )  # fmt: skip


def cache_unit(k_cache: Tensor, v_cache: Tensor, *others: Tensor) -> int:
    """The unit of all strides: for single bytes twice the usual one, if the strides allow it.

    The unit is 1 if elements of a row are not adjacent: the cache is too large to copy.
    """
    tensors = k_cache, v_cache, *others
    if not all(_adjacent(cache) for cache in (k_cache, v_cache)):
        return 1
    if k_cache.element_size() == 1 and all(s % 16 == 0 for x in tensors for s in x.stride()[:-1]):
        return 16
    return launch.stride_unit(*tensors)


def cache_rows(cache: Tensor, unit: int, scale: Tensor | None = None) -> Cache:
    """A cache (page, slot, head, D) for a kernel, with its scale (), (head,) or (page, slot, head)."""
    columns = None if _adjacent(cache) else launch.encode(cache.stride(3))
    strides = (*launch.encode_strides(cache, unit), columns)
    if scale is None:
        return Cache(cache, strides, None, None)
    if scale.ndim == 3:
        page, slot, head = (launch.encode(s) for s in scale.stride())
        return Cache(cache, strides, scale, (page, slot, head))
    return Cache(cache, strides, scale, (None, None, launch.encode(scale.stride(0) if scale.ndim else 0)))


def _adjacent(cache: Tensor) -> bool:
    return cache.stride(3) == 1 or cache.shape[3] == 1


def pages_of(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """(table with adjacent entries, its row stride, page size or 0, positions per batch entry)."""
    if block_table is None:
        return None, 0, 0, cache.shape[1]
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    # Without a page there is no position to read.
    return table, table.stride(0), cache.shape[1], table.shape[1] * cache.shape[1] if cache.shape[0] else 0


def append_rows(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    rotary: Rotary | None = None, q: Tensor | None = None, turned_q: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``k`` (B, Hk, L, D) and ``v`` (B, Hk, L, Dv) into the caches, from position ``lens[b]`` on.

    Caches (B, Lmax, Hk, D) and (B, Lmax, Hk, Dv), or (pages, page_size, Hk, D) and (pages, page_size, Hk, Dv) with
    ``block_table`` int32 (B, max_pages); ``lens`` int32 or int64 (B,). Rows without a place in the cache are dropped.
    With ``cu_seqlens_q`` int (B + 1,), ``k`` and ``v`` are (1, Hk, total, D), one entry after the other. With scales,
    float32 (), (Hk,) or one for each position and head, the caches are int8 or float8_e4m3fn.

    With ``rotary`` keys are turned by their positions before they are written, and ``turned_q`` is filled with the
    queries ``q`` (B, Hq, Lq, D), turned by theirs: the last one stands at the last key.
    """
    memory_entries, kv_heads, new_len, head_dim = k.shape
    k, v = launch.unit_last(k), launch.unit_last(v)
    table, table_stride, page, capacity = pages_of(k_cache, block_table)
    cfg = config.lookup("append", launch.architecture(k.device), max(head_dim, v.shape[3]), k.element_size())
    programs = launch.tiles(new_len * kv_heads, cfg.block_m, cu_seqlens_q) * memory_entries
    if rotary is None:
        unit = cache_unit(k_cache, v_cache, k, v)
        turning, asking, positions, rotated, pairs = NOTHING_TURNS, (0, 0), 0, 0, False
    else:
        assert q is not None and turned_q is not None
        q, asking = launch.unit_last(q), (q.shape[1], q.shape[2])
        unit = cache_unit(k_cache, v_cache, k, v, q, turned_q)
        turning = Turning(
            rotary.cos.contiguous(), rotary.sin.contiguous(), launch.rows(q, unit), launch.rows(turned_q, unit)
        )
        positions, rotated, pairs = rotary.cos.shape[0], 2 * rotary.cos.shape[1], rotary.interleaved
        programs += launch.tiles(q.shape[1] * q.shape[2], cfg.block_m, cu_seqlens_q) * memory_entries
    if programs == 0:
        return
    with replay.on_device(k):
        arguments = (
            cache_rows(k_cache, unit, k_scale), cache_rows(v_cache, unit, v_scale), launch.rows(k, unit),
            launch.rows(v, unit), turning, lens.contiguous(), table, cu_seqlens_q, table_stride, lens.shape[0],
            kv_heads, new_len, capacity, k_cache.shape[0], *asking, positions, page, unit, head_dim, v.shape[3],
            rotated, pairs, cfg.block_m,
        )  # fmt: skip
        replay.start(append_kernel, programs, arguments, cfg)


@replay.replayed
def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """`append_rows`, as one call of the operator."""
    append_rows(k_cache, v_cache, k, v, lens, block_table, cu_seqlens_q, k_scale, v_scale)
