"""Forward attention: one pass over the keys with an online softmax (FlashAttention-2, Dao, 2023)."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.spec.operands import Operands, Options

from . import launch, replay
from .dropout import dropout_keep, dropout_row_keys
from .operands import Results
from .ranges import (
    keys_of,
    locate,
    query_offset,
    row_count,
    rows_of,
    seen_tiles,
    sparse_line,
    sparse_pool_tile,
    sparse_position,
    sparse_range,
    tile_of_pass,
    tile_position,
)
from .scores import (
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
    start_again,
    store_statistics,
)
from .tiles import add_products, finite, head_rows, load_tile, products, scaled, store_tile

RUNTIME = ("sequences", "q_heads", "group", "q_len", "kv_len", "q_offset", "left", "right")


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q, k, v, results, terms, dropout, packed, sparse, q_offset_ptr, kv_start_ptr,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all the keys they see.

    With ``PIPELINED`` inner tiles start the next tile's product of queries and keys before the softmax of this tile, so
    that tensor cores and exponentials work in parallel. The last iteration repeats a product that nothing reads.
    """
    READS_SCORES: tl.constexpr = terms.mask.ptr is not None or terms.bias.ptr is not None
    SPARSE: tl.constexpr = sparse.lines is not None
    # Causal, window and the first key also cut tiles that a block mask calls full.
    CHECK_FULL_TILES: tl.constexpr = SPARSE and (left is not None or right is not None or kv_start_ptr is not None)
    tl.static_assert(not (PIPELINED and SPARSE), "expected no PIPELINED where a block mask says which tile is next")
    tile, tiles, batch, head = locate(tl.program_id(0), packed.q, sequences, q_heads, q_len, BLOCK_M)
    if right is not None and packed.q is None:
        tile = tiles - 1 - tile  # longest rows first, so that no program runs alone at the end
    entry, q_first, q_rows = rows_of(packed.q, batch, q_len)
    k_entry, k_first, kv_len = keys_of(packed, batch, kv_len)
    row = tile * BLOCK_M
    if packed.q is not None:
        if row >= q_rows:
            return
    q_ptr, q_stride = head_rows(q, entry, head, q_first, UNIT)
    k_ptr, k_stride = head_rows(k, k_entry, head // group, k_first, UNIT)
    v_ptr, v_stride = head_rows(v, k_entry, head // group, k_first, UNIT)
    out_ptr, out_stride = head_rows(results.out, entry, head, q_first, UNIT)
    plane = row_count(packed, sequences, q_heads, q_len)
    first_row = (entry * q_heads + head) * q_len + q_first
    q_len = q_rows
    slope = terms.slopes
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + batch * q_heads + head)

    rows = row + tl.arange(0, BLOCK_M)
    k0, k1 = rows, rows
    if dropout.seed is not None:
        k0, k1 = dropout_row_keys(dropout, batch, head, rows)
    offset = query_offset(q_offset, q_offset_ptr, batch, q_len, kv_len)
    first_seen, start, edges_left, right_start, edges, inner_start, inners = seen_tiles(
        row, offset, left, right, q_len, kv_len, kv_start_ptr, batch, READS_SCORES, BLOCK_M, BLOCK_N
    )
    if SPARSE:
        start, edges, inner_start, inners = sparse_range(sparse, sparse_line(sparse, batch, head, row), BLOCK_N)
    q_tile = load_tile(q_ptr, row, q_stride, q_len, True, HEAD_DIM, BLOCK_M)
    acc, row_max, row_sum = empty_softmax(BLOCK_M, V_DIM)
    for PASS in tl.static_range(3):  # inner tiles; edge tiles; all again, with checks, if the result is not finite
        count = inners if PASS == 0 else edges
        if PASS == 2:
            count, acc, row_max, row_sum = start_again(acc, row_max, row_sum, inners + edges)
        if PIPELINED and PASS == 0:  # checked, because there may be no inner tile
            k_tile = load_tile(k_ptr, inner_start, k_stride, kv_len, True, HEAD_DIM, BLOCK_N)
            ahead = products(q_tile, k_tile, PRECISION)
        for tile in tl.range(0, count, num_stages=1 if PASS == 2 else None):
            number, first, behind = tile_of_pass(tile, start, edges_left, inner_start, inners, PASS)
            pool_tile = None
            if SPARSE:
                col = sparse_position(number, first, sparse, BLOCK_N)
                if PASS:
                    pool_tile = sparse_pool_tile(number, first, sparse, BLOCK_N)
            else:
                col = tile_position(number, first, behind, right_start, inner_start, PASS > 0, BLOCK_N)
            cols = (tl.cast(col, tl.int32) + tl.arange(0, BLOCK_N))[None, :]
            k_col = tl.minimum(col + BLOCK_N, right_start - BLOCK_N) if PIPELINED and PASS == 0 else col
            k_tile = load_tile(k_ptr, k_col, k_stride, kv_len, PASS > 0, HEAD_DIM, BLOCK_N)
            s = products(q_tile, k_tile, PRECISION)
            if PIPELINED and PASS == 0:
                s, ahead = ahead, s
            edge: tl.constexpr = PASS > 0 or CHECK_FULL_TILES
            queries = rows[:, None]
            s, _ = finish_scores(s, queries, cols, q_len, kv_len, offset, terms, slope, batch, head, edge)
            first = None if kv_start_ptr is None else first_seen
            s = hide_unseen(s, queries, cols, kv_len, offset, left, right, first, pool_tile, edge)
            if PASS == 2:
                s = lose_rows(s, load_tile(v_ptr, col, v_stride, kv_len, True, V_DIM, BLOCK_N))
            p, acc, row_max, row_sum = online_softmax(s, acc, row_max, row_sum, terms, edge or READS_SCORES)
            if dropout.seed is not None:
                p = tl.where(dropout_keep(k0[:, None], k1[:, None], cols, dropout), p, 0.0)
            v_tile = load_tile(v_ptr, col, v_stride, kv_len, PASS > 0, V_DIM, BLOCK_N)
            if PASS == 2:
                v_tile = finite(v_tile)
            acc = add_products(acc, p, v_tile, PRECISION)

    shift = 0.0  # `finish_scores` has added this to every score of the row
    if slope is not None:
        shift = slope * nearest_key(rows, offset, kv_len, terms).to(tl.float32)
    if terms.sinks is not None:
        sink = from_natural(tl.load(terms.sinks + head), terms)
        acc, row_max, row_sum = merge_sink(sink, acc, row_max, row_sum, terms)
    row_max, row_sum, empty = finish_softmax(row_max, row_sum)
    acc = scaled(acc, ((1.0 if dropout.seed is None else dropout.keep_scale) / row_sum)[:, None])
    store_tile(out_ptr, acc, row, out_stride, q_len, V_DIM)
    lse = natural(row_max, terms) + tl.log(row_sum) - shift
    tl.store(results.lse + first_row + rows, tl.where(empty, float("-inf"), lse), mask=rows < q_len)
    store_statistics(results.statistics + first_row, plane, rows, row_max, row_sum, rows < q_len)


@replay.replayed
def attention_forward(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options
) -> None:
    """Launch the forward kernel, which fills ``out`` (B, Hq, Lq, Dv), ``lse`` (B, Hq, Lq) and ``statistics``.

    ``lse`` and ``statistics`` (2, B, Hq, Lq) are float32 and contiguous. ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D) and
    ``v`` (B, Hk, Lk, Dv) are of one dtype: float16, bfloat16 or float32. Rows outside every packed sequence stay
    unwritten. ``statistics`` holds the maximum of each row, sink included, and log2 of its sum of exponentials; both
    are 0 if nothing is allowed. `scores` describes the unit.
    """
    call = launch.Call(q, k, v, operands, options)
    unit = launch.stride_unit(call.q, call.k, call.v, out)
    cfg = call.configure("forward", unit)
    programs = launch.tiles(call.q_len, cfg.block_m, operands.cu_seqlens_q) * call.batch * call.q_heads
    if programs == 0:
        return
    with replay.on_device(q):
        arguments = (
            *(launch.rows(x, unit) for x in (call.q, call.k, call.v)), Results(launch.rows(out, unit), lse, statistics),
            call.terms, call.dropout, call.packed, launch.sparse(operands.block_mask), operands.q_offset_tensor,
            operands.kv_start, *call.sizes, unit, *call.constants, cfg.block_m, cfg.block_n, cfg.pipelined,
        )  # fmt: skip
        replay.start(forward_kernel, programs, arguments, cfg)
