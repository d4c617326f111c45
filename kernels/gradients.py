"""Code that the backward kernels share: their input per row, and dS of one tile."""

import triton
import triton.language as tl

from .dropout import dropout_keep
from .scores import LOWEST, exponent, finish_scores, hide_unseen
from .tiles import finite, head_rows, load_tile, products


@triton.jit(do_not_specialize=("q_heads", "q_len"))
def delta_kernel(
    out, dout, dlse_ptr, statistics_ptr, rows_ptr, q_heads, q_len,
    UNIT: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute the backward pass's input per row, (3, rows): the statistics, and delta = rowsum(dO * O) - dlse, so that
    a gradient through lse costs nothing more.

    A row whose result is not finite is lost, with all keys that it sees. The lowest number as its maximum makes their
    probabilities infinite, and leaves those of other keys at 0.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    out_ptr, out_stride = head_rows(out, batch_head // q_heads, batch_head % q_heads, 0, UNIT)
    dout_ptr, dout_stride = head_rows(dout, batch_head // q_heads, batch_head % q_heads, 0, UNIT)
    row = tl.program_id(0) % tiles * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    out_tile = load_tile(out_ptr, row, out_stride, q_len, True, V_DIM, BLOCK_M)
    dout_tile = load_tile(dout_ptr, row, dout_stride, q_len, True, V_DIM, BLOCK_M)
    delta = tl.sum(out_tile[0].to(tl.float32) * dout_tile[0].to(tl.float32), 1)
    if len(out_tile) == 2:
        delta += tl.sum(out_tile[1].to(tl.float32) * dout_tile[1].to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + batch_head * q_len + rows, mask=rows < q_len, other=0.0)
    at, inside = batch_head * q_len + rows, rows < q_len
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * q_len
    row_max = tl.load(statistics_ptr + at, mask=inside, other=0.0)
    log_sum = tl.load(statistics_ptr + plane + at, mask=inside, other=0.0)
    kept = tl.abs(delta + log_sum) < float("inf")
    tl.store(rows_ptr + at, tl.where(kept, row_max, LOWEST), mask=inside)
    tl.store(rows_ptr + plane + at, tl.where(kept, log_sum, LOWEST), mask=inside)
    tl.store(rows_ptr + 2 * plane + at, tl.where(kept, delta, 0.0), mask=inside)


@triton.jit
def probabilities(s, row_max, log_sum, k0, k1, cols, terms, dropout):
    """(p, dropout's factor or 1) of a tile, in the orientation to which the arguments broadcast."""
    p = tl.math.exp2(exponent(s, row_max, terms) - log_sum)
    if dropout.seed is not None:
        return p, tl.where(dropout_keep(k0, k1, cols, dropout), dropout.keep_scale, 0.0)
    else:
        return p, 1.0


@triton.jit
def tile_ds(
    q_tile, dout_tile, row_max, log_sum, delta, rows, col, k_ptr, k_stride, v_ptr, v_stride, k0, k1, pool_tile, slope,
    batch, head, q_len, kv_len, offset, left, right, terms, dropout, EDGE: tl.constexpr, CHECK: tl.constexpr,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dS, d capped / d uncapped, K) of one tile of queries by keys; ``CAREFUL`` handles keys and values that are not
    finite."""
    cols = (tl.cast(col, tl.int32) + tl.arange(0, BLOCK_N))[None, :]
    k_tile = load_tile(k_ptr, col, k_stride, kv_len, EDGE, HEAD_DIM, BLOCK_N)
    s = products(q_tile, k_tile, PRECISION)
    queries = rows[:, None]
    s, cap_gradient = finish_scores(s, queries, cols, q_len, kv_len, offset, terms, slope, batch, head, CHECK)
    s = hide_unseen(s, queries, cols, kv_len, offset, left, right, None, pool_tile, CHECK)
    v_tile = load_tile(v_ptr, col, v_stride, kv_len, EDGE, V_DIM, BLOCK_N)
    if CAREFUL:  # `delta_kernel` makes their probabilities infinite in the rows that see them
        k_tile, v_tile = finite(k_tile), finite(v_tile)
    dp = products(dout_tile, v_tile, PRECISION)
    p, factor = probabilities(s, row_max[:, None], log_sum[:, None], k0[:, None], k1[:, None], cols, terms, dropout)
    ds = p * (dp * factor - delta[:, None])
    return ds, cap_gradient, k_tile
