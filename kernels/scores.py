"""From the products of queries and keys to probabilities: score terms, the running softmax, its statistics.

The running maximum has one of two units. With a bias or ALiBi it has the unit of the scores, so that no finite bias
overflows. Otherwise scores stay as they are, and one fused multiply-add converts them to base 2.
"""

import triton
import triton.language as tl

from .ranges import SPARSE_BLOCK
from .tiles import all_finite, decode_size, decode_wide, finite_rows, scaled, zeros

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""of float32"""


@triton.jit
def load_columns(x, batch, cols, OTHER: tl.constexpr):
    """The values for some keys of an `operands.Scores` with one row for all queries and heads."""
    stride = 1 if x.strides[3] is None else decode_wide(x.strides[3])
    ptrs = x.ptr + batch * decode_wide(x.strides[0]) + cols.to(tl.int64) * stride
    return tl.load(ptrs, mask=(cols >= 0) & (cols < decode_size(x.columns)), other=OTHER)


@triton.jit
def load_scores(x, batch, head, rows, cols, n_rows, n_cols, CHECK: tl.constexpr, OTHER: tl.constexpr = 0):
    """A tile of an `operands.Scores`, with OTHER outside it; a single row if it broadcasts over the queries."""
    cols64 = cols if x.columns is not None and x.strides[3] is None else cols.to(tl.int64)
    if x.columns is not None and x.strides[1] is None and x.strides[2] is None:
        # One row for all: load a vector, because the scores would take the layout of a loaded tile.
        return tl.expand_dims(load_columns(x, batch, tl.reshape(cols, [cols.shape[1]]), OTHER), 0)
    offset = batch * decode_wide(x.strides[0], x.unit)
    if x.strides[1] is not None:
        offset += head * decode_wide(x.strides[1], x.unit)
    ptrs = x.ptr + offset
    ptrs += cols64 if x.strides[3] is None else cols64 * decode_wide(x.strides[3])
    inside = cols < n_cols
    if x.columns is not None:
        inside = (cols >= 0) & (cols < decode_size(x.columns))
    if x.strides[2] is not None:
        ptrs += rows.to(tl.int64) * decode_wide(x.strides[2], x.unit)
        inside = inside & (rows < n_rows)
    if CHECK or x.columns is not None:
        return tl.load(ptrs, mask=inside, other=OTHER)
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
def nearest_key(rows, offset, kv_len, terms):
    """The distance of each query from the nearest of all keys. ALiBi counts from there, so that no large terms cancel.

    It is 0 with a sink, which does not move with the scores: the weights of far keys are negligible then.
    """
    if terms.sinks is not None:
        return rows * 0
    else:
        position = rows + offset
        return tl.maximum(tl.maximum(position - (kv_len - 1), -position), 0)


@triton.jit
def finish_scores(
    s, rows, cols, q_len, kv_len, offset, terms, slope, batch, head, EDGE: tl.constexpr, mask_start=0
):  # fmt: skip
    """Apply every term to the products ``s = Q K^T`` of one tile; returns (scores, d capped / d uncapped).

    The scores are -inf where the mask forbids; `hide_unseen` handles all else that forbids. ``rows`` and ``cols`` have
    any orientation that broadcasts to the tile. If no term is added, the scores still lack a factor, which `exponent`
    applies at no cost. ``EDGE`` tiles check their loads against the end of the sequence. The first column of mask and
    bias belongs to key ``mask_start``.
    """
    ADDED: tl.constexpr = terms.bias.ptr is not None or slope is not None
    cap_gradient = 1.0
    if terms.softcap is not None:
        t = tanh(s * (terms.scale / terms.softcap))
        cap_gradient = 1.0 - t * t
        if EDGE or terms.mask.ptr is not None or terms.bias.ptr is not None:  # NaN times a probability of 0 is NaN
            cap_gradient = tl.where(t == t, cap_gradient, 0.0)
        s = t * terms.softcap if ADDED else t
    elif ADDED:
        s = s * terms.scale
    if terms.bias.ptr is not None:
        s += load_scores(terms.bias, batch, head, rows, cols - mask_start, q_len, kv_len, EDGE).to(tl.float32)
    if slope is not None:
        distance = tl.abs(rows + offset - cols) - nearest_key(rows, offset, kv_len, terms)
        s -= slope * distance.to(tl.float32)
    if terms.mask.ptr is not None:
        outside: tl.constexpr = 0 if terms.mask.columns is None else 1
        keep = load_scores(terms.mask, batch, head, rows, cols - mask_start, q_len, kv_len, EDGE, outside)
        s = tl.where(keep != 0, s, float("-inf"))
    return s, cap_gradient


@triton.jit
def hide_unseen(s, rows, cols, kv_len, offset, left, right, first_seen, pool_tile, EDGE: tl.constexpr):
    """The scores of one tile, -inf where the block mask, causal, the window or the end of the keys forbids.

    ``EDGE`` tiles cross the border of the visible range or the end of a sequence; only they compare indices. It also
    hides keys before ``first_seen``, unless that is None. ``pool_tile`` points to the tile of a block mask that
    contains these indices, or is None.
    """
    if pool_tile is not None:
        keep = tl.load(pool_tile + (rows % SPARSE_BLOCK * SPARSE_BLOCK + cols % SPARSE_BLOCK))
        s = tl.where(keep != 0, s, float("-inf"))
    if EDGE:
        s = tl.where(cols < kv_len, s, float("-inf"))
        if right is not None:
            s = tl.where(cols <= rows + offset + right, s, float("-inf"))
        if left is not None:
            s = tl.where(cols >= rows + offset - left, s, float("-inf"))
        if first_seen is not None:
            s = tl.where(cols >= first_seen, s, float("-inf"))
    return s


@triton.jit
def lose_rows(s, v_tile):
    """The scores, with NaN where a row sees a key whose value is not finite."""
    whole = finite_rows(v_tile)[None, :]
    return tl.where((whole == 0) & (s > float("-inf")), float("nan"), s)


@triton.jit
def natural(x, terms):
    """Convert a logarithm in the unit of the running maximum to a natural logarithm."""
    return x * LN2 if terms.bias.ptr is None and terms.slopes is None else x


@triton.jit
def from_natural(x, terms):
    """The inverse of `natural`."""
    return x * LOG2E if terms.bias.ptr is None and terms.slopes is None else x


@triton.jit
def base_2(x, terms):
    """Convert a logarithm in the unit of the running maximum to base 2."""
    return x if terms.bias.ptr is None and terms.slopes is None else x * LOG2E


@triton.jit
def exponent(s, row_max, terms):
    """log2(exp(score - maximum)), for scores from `finish_scores`. Each case is exact before its last rounding."""
    return s * terms.to_base_2 - row_max if terms.bias.ptr is None and terms.slopes is None else (s - row_max) * LOG2E


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, V_DIM: tl.constexpr):
    """(acc, row_max, row_sum) of no scores; ``acc`` is in pieces."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return zeros(BLOCK_M, V_DIM), row_max, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def online_softmax(s, acc, row_max, row_sum, terms, MAY_BE_EMPTY: tl.constexpr):
    """Merge a score tile into the running softmax; returns (p, acc, row_max, row_sum), p unnormalised.

    With ``MAY_BE_EMPTY`` a row may have seen only -inf so far; its maximum is then taken as 0 to avoid inf - inf.
    """
    tile_max = tl.max(s, 1)
    tile_max = tile_max * terms.to_base_2 if terms.bias.ptr is None and terms.slopes is None else tile_max
    new_max = tl.maximum(row_max, tile_max)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MAY_BE_EMPTY else new_max
    p = tl.math.exp2(exponent(s, pivot[:, None], terms))
    alpha = tl.math.exp2(base_2(row_max - pivot, terms))
    return p, scaled(acc, alpha[:, None]), new_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def start_again(acc, row_max, row_sum, tiles):
    """(tiles, a new accumulator and running softmax) if ``acc`` is not finite, else (0, the present ones)."""
    lost = not all_finite(acc)
    row_max = tl.where(lost, float("-inf"), row_max)
    return (
        tl.where(lost, tiles, 0),
        [tl.where(lost, 0.0, piece) for piece in acc],
        row_max,
        tl.where(lost, 0.0, row_sum),
    )


@triton.jit
def merge_sink(sink, acc, row_max, row_sum, terms):
    """`online_softmax` for one more score, ``sink`` in the maximum's unit, whose value vector is 0."""
    new_max = tl.maximum(row_max, sink)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    alpha = tl.math.exp2(base_2(row_max - pivot, terms))
    return scaled(acc, alpha[:, None]), new_max, row_sum * alpha + tl.math.exp2(base_2(sink - pivot, terms))


@triton.jit
def finish_softmax(row_max, row_sum):
    """(maximum, sum, whether nothing was allowed). If nothing was, they are 0 and 1: the output is 0 and the log
    finite."""
    empty = row_sum == 0.0
    return tl.where(empty, 0.0, row_max), tl.where(empty, 1.0, row_sum), empty


@triton.jit
def store_statistics(ptr, plane, rows, row_max, row_sum, inside):
    """Store what the backward pass needs to recompute the probabilities: the maximum, and separately log2 of the sum.

    Adding them would lose digits of the smaller one, and a rounding error of lse scales the whole row.
    """
    tl.store(ptr + rows, row_max, mask=inside)
    tl.store(ptr + plane + rows, tl.math.log2(row_sum), mask=inside)


@triton.jit
def load_statistics(ptr, plane, rows, q_len, CHECK: tl.constexpr):
    """(maximum, log2 of the sum, delta), as `delta_kernel` stored them.

    With ``CHECK`` rows outside get a maximum of +inf, hence probability 0.
    """
    if CHECK:
        inside = rows < q_len
        row_max = tl.load(ptr + rows, mask=inside, other=float("inf"))
        log_sum = tl.load(ptr + plane + rows, mask=inside, other=0.0)
        delta = tl.load(ptr + 2 * plane + rows, mask=inside, other=0.0)
        return row_max, log_sum, delta
    else:
        return tl.load(ptr + rows), tl.load(ptr + plane + rows), tl.load(ptr + 2 * plane + rows)
