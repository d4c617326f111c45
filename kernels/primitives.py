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
def load_tile(
    ptr, row, stride, n_rows, CHECK_ROWS: tl.constexpr, N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows ``row .. row + BLOCK_R`` of a matrix with ``N_COLS`` columns, zero outside it. Offsets are 64-bit."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (rows.to(tl.int64) * stride + cols)
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
    ptr, tile, row, stride, n_rows, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Store the part of ``tile`` that lies inside the matrix, in the pointer's dtype."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (rows.to(tl.int64) * stride + cols)
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(row + rows < n_rows) & (cols < N_COLS))


@triton.jit
def load_scores_operand(
    ptr, strides, rows, cols, n_rows, n_cols, CHECK: tl.constexpr, BY_ROW: tl.constexpr, UNIT_COLS: tl.constexpr
):  # fmt: skip
    """A tile of the mask or the bias; without ``BY_ROW`` one line of it, which broadcasts over the queries."""
    cols64 = cols.to(tl.int64)
    ptrs = ptr + (cols64 if UNIT_COLS else cols64 * strides[3])
    inside = cols < n_cols
    if BY_ROW:
        ptrs += rows.to(tl.int64) * strides[2]
        inside = inside & (rows < n_rows)
    if CHECK:
        return tl.load(ptrs, mask=inside, other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def finish_scores(
    s, rows, cols, q_len, kv_len, offset, qk_scale, mask_ptr, mask_strides, bias_ptr, bias_strides,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    """Scores of one tile from the products ``s = Q K^T``: bias, then -inf where not allowed.

    Base-2 scores with a bias; without one they still lack the factor ``qk_scale``, which `exponent_scale` then holds
    for the exponential, where it costs nothing. ``EDGE`` tiles touch the diagonal or the end of a sequence; only they
    pay for index comparisons.
    """
    if bias_ptr is not None:
        s = s * qk_scale
        bias = load_scores_operand(
            bias_ptr, bias_strides, rows, cols, q_len, kv_len, EDGE, BIAS_BY_ROW, BIAS_UNIT
        )
        s += bias.to(tl.float32) * LOG2E
    if mask_ptr is not None:
        keep = load_scores_operand(
            mask_ptr, mask_strides, rows, cols, q_len, kv_len, EDGE, MASK_BY_ROW, MASK_UNIT
        )
        s = tl.where(keep != 0, s, float("-inf"))
    if EDGE:
        s = tl.where(cols < kv_len, s, float("-inf"))
        if CAUSAL:
            s = tl.where(cols <= rows + offset, s, float("-inf"))
    return s


@triton.jit
def exponent_scale(qk_scale, bias_ptr):
    """What scores from `finish_scores` are multiplied by inside the exponential, in one fused multiply-add."""
    return qk_scale if bias_ptr is None else 1.0


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
    """Absolute position of query row 0 of this batch entry, cut to where it makes a difference, so that it fits."""
    if q_offset_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(q_offset_ptr + batch), -q_len), kv_len).to(tl.int32)
    else:
        return q_offset


@triton.jit
def key_range(
    row, offset, q_len, kv_len, CAUSAL: tl.constexpr, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(inner_end, end): key tiles before ``inner_end`` need no index test, none at or after ``end`` is visible.

    A mask or bias (``READS_SCORES``) is read at every index of a tile, so rows past the end make all tiles edge tiles.
    """
    end = kv_len
    inner_end = kv_len
    if CAUSAL:
        end = tl.minimum(tl.maximum(row + BLOCK_M + offset, 0), kv_len)
        inner_end = tl.minimum(tl.maximum(row + offset + 1, 0), kv_len)
    if READS_SCORES:
        inner_end = tl.where(row + BLOCK_M > q_len, 0, inner_end)
    return inner_end // BLOCK_N * BLOCK_N, end


@triton.jit
def query_range(
    col, offset, q_len, kv_len, CAUSAL: tl.constexpr, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(start, inner_start, inner_end): rows that see key tile ``col``; edge tiles lie outside the inner range."""
    start = 0
    inner_start = 0
    if CAUSAL:
        start = tl.minimum(tl.maximum(col - offset, 0), q_len) // BLOCK_M * BLOCK_M
        inner_start = tl.cdiv(tl.minimum(tl.maximum(col + BLOCK_N - 1 - offset, 0), q_len), BLOCK_M) * BLOCK_M
    inner_end = tl.maximum(q_len // BLOCK_M * BLOCK_M, inner_start)
    if READS_SCORES:
        inner_end = tl.where(col + BLOCK_N > kv_len, inner_start, inner_end)
    return start, inner_start, inner_end
