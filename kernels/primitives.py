"""Device-side helpers shared by every attention kernel.

Conventions. ``row`` indexes queries, ``col`` indexes keys. A helper that takes ``rows`` and ``cols`` accepts them in
any orientation that broadcasts to the score tile, so the same code serves ``S = Q K^T`` and its transpose.
Scores live in base 2: ``exp(x) = exp2(x * LOG2E)`` with the factor folded into the softmax scale.
"""

import triton
import triton.language as tl
from triton import knobs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Side of the tiles of a block mask. Every launch configuration has tiles that divide it.
SPARSE_BLOCK: tl.constexpr = tl.constexpr(128)

# Whether kernels run in Triton's interpreter. Fixed at import, exactly as `triton.jit` itself decides it.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x.to(dtype)``, rounding to nearest even everywhere: the interpreter truncates float32 to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``acc`` may be None. The interpreter cannot multiply bfloat16, so it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def stride(passed, UNIT: tl.constexpr):
    """A stride in elements from what `launch.strides` passes, see there."""
    return passed // 16 * UNIT


@triton.jit
def head_offset(passed, entry, head, row, UNIT: tl.constexpr):
    """Where ``row`` of one head of one batch entry begins, in elements; ``passed`` as in `stride`, 64-bit indices."""
    return entry * stride(passed[0], UNIT) + head * stride(passed[1], UNIT) + row * stride(passed[2], UNIT)


@triton.jit
def wide_stride(passed):
    """A stride of a mask or bias from what `launch.score_operand` passes, see there."""
    return passed // 16 - (1 << 40)


@triton.jit
def load_tile(
    ptr, row, row_stride, n_rows, CHECK_ROWS: tl.constexpr, N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows ``row .. row + BLOCK_R`` of a matrix with ``N_COLS`` columns, zero outside it. Offsets are 64-bit."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
    if CHECK_ROWS and N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=(row + rows < n_rows) & (cols < N_COLS), other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=row + rows < n_rows, other=0.0)
    elif N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=cols < N_COLS, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    ptr, tile, row, row_stride, n_rows, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Store the part of ``tile`` that lies inside the matrix, in the pointer's dtype."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(row + rows < n_rows) & (cols < N_COLS))


@triton.jit
def load_scores_operand(
    ptr, strides, rows, cols, n_rows, n_cols, CHECK: tl.constexpr, BY_ROW: tl.constexpr, UNIT_COLS: tl.constexpr
):  # fmt: skip
    """A tile of the mask or the bias; without ``BY_ROW`` one line of it, which broadcasts over the queries."""
    cols64 = cols.to(tl.int64)
    ptrs = ptr + (cols64 if UNIT_COLS else cols64 * wide_stride(strides[3]))
    inside = cols < n_cols
    if BY_ROW:
        ptrs += rows.to(tl.int64) * wide_stride(strides[2])
        inside = inside & (rows < n_rows)
    if CHECK:
        return tl.load(ptrs, mask=inside, other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy from one exponential; a series near 0, where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    near = x * (1.0 - square * (0.3333333333 - square * (0.1333333333 - square * 0.0539682540)))
    far = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(square < 0.01, near, far)


@triton.jit
def finish_scores(
    s, rows, cols, q_len, kv_len, offset, left, right, qk_scale, softcap, slope, mask_ptr, mask_strides, bias_ptr,
    bias_strides, pool_tile, EDGE: tl.constexpr, MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    """(scores, d capped / d uncapped) of one tile from the products ``s = Q K^T``; -inf where not allowed.

    Scores in base 2 where something is added to them or caps them; otherwise they still lack the factor ``qk_scale``,
    which `exponent_scale` then holds for the exponential, where it costs nothing. ``EDGE`` tiles touch the border of
    what is visible or the end of a sequence; only they pay for index comparisons. ``pool_tile`` points to the tile of a
    block mask that these indices lie in.
    """
    cap_gradient = 1.0
    if softcap is not None:
        t = tanh(s * (qk_scale / (softcap * LOG2E)))
        s = t * (softcap * LOG2E)
        cap_gradient = 1.0 - t * t
    elif bias_ptr is not None or slope is not None:
        s = s * qk_scale
    if bias_ptr is not None:
        bias = load_scores_operand(bias_ptr, bias_strides, rows, cols, q_len, kv_len, EDGE, BIAS_BY_ROW, BIAS_UNIT)
        s += bias.to(tl.float32) * LOG2E
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(rows + offset - cols).to(tl.float32)
    if mask_ptr is not None:
        keep = load_scores_operand(mask_ptr, mask_strides, rows, cols, q_len, kv_len, EDGE, MASK_BY_ROW, MASK_UNIT)
        s = tl.where(keep != 0, s, float("-inf"))
    if pool_tile is not None:
        keep = tl.load(pool_tile + (rows % SPARSE_BLOCK * SPARSE_BLOCK + cols % SPARSE_BLOCK))
        s = tl.where(keep != 0, s, float("-inf"))
    if EDGE:
        s = tl.where(cols < kv_len, s, float("-inf"))
        if right is not None:
            s = tl.where(cols <= rows + offset + right, s, float("-inf"))
        if left is not None:
            s = tl.where(cols >= rows + offset - left, s, float("-inf"))
    return s, cap_gradient


@triton.jit
def exponent_scale(qk_scale, softcap, slope, bias_ptr):
    """What scores from `finish_scores` are multiplied by inside the exponential, in one fused multiply-add."""
    return qk_scale if softcap is None and slope is None and bias_ptr is None else 1.0


@triton.jit
def online_softmax(s, scale, acc, row_max, row_sum, MAY_BE_EMPTY: tl.constexpr):
    """Merge a score tile into the running softmax; returns (p, acc, row_max, row_sum), p unnormalised.

    ``scale`` is positive. With ``MAY_BE_EMPTY`` a row may have seen only -inf so far; its maximum then stands at 0 to
    avoid inf - inf.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MAY_BE_EMPTY else new_max
    p = tl.math.exp2(s * scale - pivot[:, None])
    alpha = tl.math.exp2(row_max - pivot)
    return p, acc * alpha[:, None], new_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def dropout_row_keys(seed, batch, head, rows):
    """Two 32-bit keys per query row from Philox-4x32-7 (Salmon et al., 2011), the strong half of the dropout bits."""
    zero = (rows * 0).to(tl.uint32)
    heads, batches = zero + tl.cast(head, tl.uint32), zero + tl.cast(batch, tl.uint32)
    k0, k1, _, _ = tl.philox(seed, rows.to(tl.uint32), heads, batches, zero, n_rounds=7)
    return k0, k1


@triton.jit
def dropout_keep(k0, k1, cols, dropout_p):
    """Keep-mask of a tile: a keyed full-avalanche mix of the key index, so tile sizes do not matter."""
    x = (cols.to(tl.uint32) * 0x9E3779B1) ^ k0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ k1) * 0x846CA68B
    x = x ^ (x >> 16)
    uniform = (x >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return uniform >= dropout_p


@triton.jit
def query_offset(q_offset, q_offset_ptr, batch, q_len, kv_len):
    """Absolute position of query row 0 of this batch entry, cut to what int32 arithmetic can hold."""
    if q_offset_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(q_offset_ptr + batch), -(1 << 30)), 1 << 30).to(tl.int32)
    elif q_offset is None:
        return kv_len - q_len
    else:
        return q_offset


@triton.jit
def locate(program, cu_seqlens_ptr, sequences, heads, length, BLOCK: tl.constexpr):
    """(tile, number of tiles, batch, head) of a program: tiles of ``length`` rows of each head of each batch entry.

    Packed sequences share ``length`` rows. Sequence b has the slots from ``cu_seqlens[b] // BLOCK + b`` on, never fewer
    than its tiles, so a binary search finds the sequence of a slot; the tile may lie behind its last one.
    """
    if cu_seqlens_ptr is None:
        tiles = tl.cdiv(length, BLOCK)
        batch_head = (program // tiles).to(tl.int64)
        return program % tiles, tiles, batch_head // heads, batch_head % heads
    else:
        slots = length // BLOCK + sequences
        slot = program % slots
        batch, above = slot * 0, slot * 0 + sequences
        while above - batch > 1:
            middle = (batch + above) // 2
            before = tl.load(cu_seqlens_ptr + middle).to(tl.int32) // BLOCK + middle <= slot
            batch = tl.where(before, middle, batch)
            above = tl.where(before, above, middle)
        tile = slot - (tl.load(cu_seqlens_ptr + batch).to(tl.int32) // BLOCK + batch)
        return tile, slots, batch.to(tl.int64), (program // slots).to(tl.int64)


@triton.jit
def rows_of(cu_seqlens_ptr, batch, length):
    """(batch entry in memory, first row, number of rows): packed sequences are one batch entry in memory."""
    if cu_seqlens_ptr is None:
        return batch, 0, length
    else:
        first = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        return batch * 0, first, (tl.load(cu_seqlens_ptr + batch + 1) - first).to(tl.int32)


@triton.jit
def tile_ranges(start, inner_start, inner_end, end, past_end, READS_SCORES: tl.constexpr, BLOCK: tl.constexpr):
    """Split the visible range ``start .. end`` into edge tiles, on both sides, and inner tiles, fully visible.

    Returns (start, first, resume, edges, inner_start, inners): ``edges`` edge tiles, the first ``first`` of them from
    ``start`` on and the others from ``resume`` on; ``inners`` inner tiles from ``inner_start`` on. A mask or bias
    (``READS_SCORES``) is read at every index of a tile: where the other side is ``past_end``, all tiles are edge tiles.
    """
    start = start // BLOCK * BLOCK
    limit = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, start)
    inner_start = tl.minimum(tl.maximum(tl.cdiv(inner_start, BLOCK) * BLOCK, start), limit)
    resume = tl.maximum(inner_end // BLOCK * BLOCK, inner_start)
    if READS_SCORES:
        resume = tl.where(past_end, inner_start, resume)
    first = (inner_start - start) // BLOCK
    edges = first + tl.maximum(tl.cdiv(end - resume, BLOCK), 0)
    return start, first, resume, edges, inner_start, (resume - inner_start) // BLOCK


@triton.jit
def visible_keys(row, offset, left, right, kv_len, BLOCK_M: tl.constexpr):
    """The keys ``start .. end`` that some query of the tile ``row`` sees."""
    start, end = 0, kv_len
    if right is not None:
        end = tl.minimum(tl.maximum(row + BLOCK_M + offset + right, 0), kv_len)
    if left is not None:
        start = tl.minimum(tl.maximum(row + offset - left, 0), kv_len)
    return start, end


@triton.jit
def key_range(
    row, offset, left, right, q_len, kv_len, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_ranges` over the keys that the query tile ``row`` sees."""
    start, end = visible_keys(row, offset, left, right, kv_len, BLOCK_M)
    inner_start, inner_end = 0, kv_len
    if right is not None:
        inner_end = tl.minimum(tl.maximum(row + offset + right + 1, 0), kv_len)
    if left is not None:
        inner_start = tl.minimum(tl.maximum(row + BLOCK_M - 1 + offset - left, 0), kv_len)
    return tile_ranges(start, inner_start, inner_end, end, row + BLOCK_M > q_len, READS_SCORES, BLOCK_N)


@triton.jit
def query_range(
    col, offset, left, right, q_len, kv_len, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_ranges` over the queries that see the key tile ``col``."""
    start, inner_start, inner_end, end = 0, 0, q_len, q_len
    row = col - offset
    if right is not None:
        start = tl.minimum(tl.maximum(row - right, 0), q_len)
        inner_start = tl.minimum(tl.maximum(row + BLOCK_N - 1 - right, 0), q_len)
    if left is not None:
        end = tl.minimum(tl.maximum(row + BLOCK_N + left, 0), q_len)
        inner_end = tl.minimum(tl.maximum(row + left + 1, 0), q_len)
    return tile_ranges(start, inner_start, inner_end, end, col + BLOCK_N > kv_len, READS_SCORES, BLOCK_M)


@triton.jit
def tile_position(tile, start, first, resume, inner_start, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where tile number ``tile`` of the edge or the inner tiles begins."""
    if EDGE:
        return tl.where(tile < first, start + tile * BLOCK, resume + (tile - first) * BLOCK)
    else:
        return inner_start + tile * BLOCK


@triton.jit
def sparse_line(batch, head, index, batch_stride, head_stride):
    """The line of a block mask that query or key ``index`` of a head of a batch entry lies in."""
    return batch * batch_stride + head * head_stride + (index + batch * 0) // SPARSE_BLOCK


@triton.jit
def sparse_range(offsets_ptr, line, BLOCK: tl.constexpr):
    """(first edge entry, edges, first inner entry, inners) of a line of a block mask, counted in tiles of ``BLOCK``.

    Its partial tiles are edge tiles; its full ones lie within the sequence.
    """
    offsets_ptr += line * 3
    start, inner_start, end = tl.load(offsets_ptr), tl.load(offsets_ptr + 1), tl.load(offsets_ptr + 2)
    pieces: tl.constexpr = SPARSE_BLOCK // BLOCK
    return start, (inner_start - start) * pieces, inner_start, (end - inner_start) * pieces


@triton.jit
def sparse_entry(tile, start, inner_start, entries_ptr, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """(where tile number ``tile`` of the edge or the inner tiles begins, pointer to its entry)."""
    pieces: tl.constexpr = SPARSE_BLOCK // BLOCK
    tile += start * 0  # the interpreter's loop counters are Python integers
    entry_ptr = entries_ptr + ((start if EDGE else inner_start) + tile // pieces).to(tl.int64) * 2
    return tl.load(entry_ptr) * SPARSE_BLOCK + tile % pieces * BLOCK, entry_ptr


@triton.jit
def pool_tile(pool_ptr, number):
    return pool_ptr + number.to(tl.int64) * (SPARSE_BLOCK * SPARSE_BLOCK)
