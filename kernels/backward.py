"""Backward attention: recomputes probabilities from the softmax statistics, stores none (FlashAttention-2, Dao).

README.md has the formulas. One program writes each output element and adds in a fixed order, so repeats are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.spec.operands import Gradients, Operands, Options

from . import config, launch, replay
from .bias_gradient import bias_gradient
from .dropout import dropout_row_keys
from .gradients import delta_kernel, probabilities, tile_ds
from .ranges import (
    first_key,
    keys_of,
    locate,
    query_offset,
    query_range,
    row_count,
    rows_of,
    seen_tiles,
    sparse_line,
    sparse_pool_tile,
    sparse_position,
    sparse_range,
    tile_of_pass,
    tile_position,
    unseen_before,
)
from .scores import base_2, finish_scores, from_natural, hide_unseen, load_statistics
from .tiles import (
    add_products,
    all_finite,
    head_rows,
    load_finite_rows,
    load_tile,
    products,
    scaled,
    store_tile,
    zeros,
)

RUNTIME = ("sequences", "q_heads", "group", "q_len", "kv_len", "q_offset", "left", "right")


@triton.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q, k, v, dout, statistics_ptr, dk, dv, terms, dropout, packed, sparse, q_offset_ptr,
    kv_start_ptr, sequences, q_heads, group, q_len, kv_len, q_offset, left, right,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head, against the queries of every head that shares it.

    ``dk`` or ``dv`` may hold None. The kernel then computes the other only, and the compiler drops unused code.
    """
    READS_SCORES: tl.constexpr = terms.mask.ptr is not None or terms.bias.ptr is not None
    SPARSE: tl.constexpr = sparse.lines is not None
    STARTS: tl.constexpr = kv_start_ptr is not None
    CHECK_FULL_TILES: tl.constexpr = SPARSE and (left is not None or right is not None or STARTS)
    tile, _, batch, kv_head = locate(tl.program_id(0), packed.k, sequences, q_heads // group, kv_len, BLOCK_N)
    col = tile * BLOCK_N
    entry, k_first, kv_len = keys_of(packed, batch, kv_len)
    _, q_first, q_rows = rows_of(packed.q, batch, q_len)
    if packed.k is not None:
        if col >= kv_len:
            return
    k_ptr, k_stride = head_rows(k, entry, kv_head, k_first, UNIT)
    v_ptr, v_stride = head_rows(v, entry, kv_head, k_first, UNIT)
    plane = row_count(packed, sequences, q_heads, q_len)

    cols = (col + tl.arange(0, BLOCK_N))[:, None]
    k_tile = load_tile(k_ptr, col, k_stride, kv_len, True, HEAD_DIM, BLOCK_N)
    v_tile = load_finite_rows(v_ptr, col, v_stride, kv_len, V_DIM, BLOCK_N)
    dk_acc, dv_acc = zeros(BLOCK_N, HEAD_DIM), zeros(BLOCK_N, V_DIM)
    offset = query_offset(q_offset, q_offset_ptr, batch, q_rows, kv_len)
    start, edges_left, right_start, edges, inner_start, inners = query_range(
        col, offset, left, right, q_rows, kv_len, READS_SCORES, BLOCK_M, BLOCK_N
    )
    if STARTS:
        first_seen = first_key(kv_start_ptr, batch, kv_len)
        right_start, edges, inners = unseen_before(first_seen, col, right_start, edges, inner_start, inners, BLOCK_N)
    for head in tl.range(kv_head * group, (kv_head + 1) * group):
        first_row = (entry * q_heads + head) * q_len + q_first
        q_ptr, q_stride = head_rows(q, entry, head, q_first, UNIT)
        dout_ptr, dout_stride = head_rows(dout, entry, head, q_first, UNIT)
        slope = terms.slopes
        if terms.slopes is not None:
            slope = tl.load(terms.slopes + batch * q_heads + head)
        if SPARSE:
            start, edges, inner_start, inners = sparse_range(sparse, sparse_line(sparse, batch, head, col), BLOCK_M)
        for EDGE in tl.static_range(2):
            for number in tl.range(0, edges if EDGE else inners):
                pool_tile = None
                if SPARSE:
                    row = sparse_position(number, start if EDGE else inner_start, sparse, BLOCK_M)
                    if EDGE:
                        pool_tile = sparse_pool_tile(number, start, sparse, BLOCK_M)
                else:
                    row = tile_position(number, start, edges_left, right_start, inner_start, EDGE == 1, BLOCK_M)
                rows = tl.cast(row, tl.int32) + tl.arange(0, BLOCK_M)
                q_tile = load_tile(q_ptr, row, q_stride, q_rows, EDGE == 1, HEAD_DIM, BLOCK_M)
                edge: tl.constexpr = EDGE == 1 or CHECK_FULL_TILES
                s = products(k_tile, q_tile, PRECISION)
                queries = rows[None, :]
                s, cap_gradient = finish_scores(
                    s, queries, cols, q_rows, kv_len, offset, terms, slope, batch, head, edge
                )
                s = hide_unseen(
                    s, queries, cols, kv_len, offset, left, right, first_seen if STARTS else None, pool_tile, edge
                )
                dout_tile = load_tile(dout_ptr, row, dout_stride, q_rows, EDGE == 1, V_DIM, BLOCK_M)
                # Load what the first product does not need after it; otherwise it would occupy registers.
                row_max, log_sum, delta = load_statistics(statistics_ptr + first_row, plane, rows, q_rows, EDGE == 1)
                k0, k1 = rows, rows
                if dropout.seed is not None:
                    k0, k1 = dropout_row_keys(dropout, batch, head, rows)
                dp = products(v_tile, dout_tile, PRECISION)
                p, factor = probabilities(
                    s, row_max[None, :], log_sum[None, :], k0[None, :], k1[None, :], cols, terms, dropout
                )
                ds = p * (dp * factor - delta[None, :])
                if dv.ptr is not None:
                    dv_acc = add_products(dv_acc, p * factor, dout_tile, PRECISION)
                if dk.ptr is not None:
                    dk_acc = add_products(dk_acc, ds * cap_gradient, q_tile, PRECISION)
    if dk.ptr is not None:
        dk_ptr, dk_stride = head_rows(dk, entry, kv_head, k_first, UNIT)
        store_tile(dk_ptr, scaled(dk_acc, terms.scale), col, dk_stride, kv_len, HEAD_DIM)
    if dv.ptr is not None:
        dv_ptr, dv_stride = head_rows(dv, entry, kv_head, k_first, UNIT)
        store_tile(dv_ptr, dv_acc, col, dv_stride, kv_len, V_DIM)


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q, k, v, dout, statistics_ptr, dq, dslopes_ptr, dsinks_ptr, terms, dropout, packed, sparse, q_offset_ptr,
    kv_start_ptr, sequences, q_heads, group, q_len, kv_len, q_offset, left, right,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all the keys they see.

    With ``dslopes_ptr`` it also computes this tile's share of the gradient of the head's ALiBi slope, with
    ``dsinks_ptr`` of its sink.
    """
    READS_SCORES: tl.constexpr = terms.mask.ptr is not None or terms.bias.ptr is not None
    SPARSE: tl.constexpr = sparse.lines is not None
    STARTS: tl.constexpr = kv_start_ptr is not None
    CHECK_FULL_TILES: tl.constexpr = SPARSE and (left is not None or right is not None or STARTS)
    tile, tiles, batch, head = locate(tl.program_id(0), packed.q, sequences, q_heads, q_len, BLOCK_M)
    if right is not None and packed.q is None:
        tile = tiles - 1 - tile
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    entry, q_first, q_rows = rows_of(packed.q, batch, q_len)
    _, k_first, kv_len = keys_of(packed, batch, kv_len)
    if packed.q is not None:
        if row >= q_rows:
            return
    q_ptr, q_stride = head_rows(q, entry, head, q_first, UNIT)
    k_ptr, k_stride = head_rows(k, entry, head // group, k_first, UNIT)
    v_ptr, v_stride = head_rows(v, entry, head // group, k_first, UNIT)
    dout_ptr, dout_stride = head_rows(dout, entry, head, q_first, UNIT)
    plane = row_count(packed, sequences, q_heads, q_len)
    first_row = (entry * q_heads + head) * q_len + q_first
    q_len = q_rows
    slope = terms.slopes
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + batch * q_heads + head)

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
    dout_tile = load_tile(dout_ptr, row, dout_stride, q_len, True, V_DIM, BLOCK_M)
    row_max, log_sum, delta = load_statistics(statistics_ptr + first_row, plane, rows, q_len, True)
    dq_acc = zeros(BLOCK_M, HEAD_DIM)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    for PASS in tl.static_range(3):  # as in the forward kernel
        count = inners if PASS == 0 else edges
        if PASS == 2:
            again = not all_finite(dq_acc)
            count = tl.where(again, inners + edges, 0)
            dq_acc, dslope = [tl.where(again, 0.0, piece) for piece in dq_acc], tl.where(again, 0.0, dslope)
        for tile in tl.range(0, count, num_stages=1 if PASS == 2 else None):
            number, first, behind = tile_of_pass(tile, start, edges_left, inner_start, inners, PASS)
            pool_tile = None
            if SPARSE:
                col = sparse_position(number, first, sparse, BLOCK_N)
                if PASS:
                    pool_tile = sparse_pool_tile(number, first, sparse, BLOCK_N)
            else:
                col = tile_position(number, first, behind, right_start, inner_start, PASS > 0, BLOCK_N)
            ds, cap_gradient, k_tile = tile_ds(
                q_tile, dout_tile, row_max, log_sum, delta, rows, col, k_ptr, k_stride, v_ptr, v_stride, k0, k1,
                pool_tile, slope, batch, head, q_len, kv_len, offset, left, right, terms, dropout,
                PASS > 0, PASS > 0 or CHECK_FULL_TILES, PASS == 2, PRECISION, HEAD_DIM, V_DIM, BLOCK_N,
            )  # fmt: skip
            if STARTS and (PASS > 0 or CHECK_FULL_TILES):
                ds = tl.where((tl.cast(col, tl.int32) + tl.arange(0, BLOCK_N))[None, :] >= first_seen, ds, 0.0)
            if dslopes_ptr is not None:
                distance = tl.abs(rows[:, None] + offset - (tl.cast(col, tl.int32) + tl.arange(0, BLOCK_N))[None, :])
                dslope -= tl.sum(ds * distance.to(tl.float32), 1)
            dq_acc = add_products(dq_acc, ds * cap_gradient, k_tile, PRECISION)
    dq_ptr, dq_stride = head_rows(dq, entry, head, q_first, UNIT)
    store_tile(dq_ptr, scaled(dq_acc, terms.scale), row, dq_stride, q_len, HEAD_DIM)
    if dslopes_ptr is not None:
        tl.store(dslopes_ptr + tl.program_id(0), tl.sum(dslope, 0))
    if dsinks_ptr is not None:  # the sink is a score with value vector 0, so its dP is 0
        sink = from_natural(tl.load(terms.sinks + head), terms)
        p = tl.math.exp2(base_2(sink - row_max, terms) - log_sum)
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(tl.where(rows < q_len, p * delta, 0.0), 0))


@replay.replayed
def attention_backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    """Launch the backward kernels, which fill the gradients that are not None; other arguments as `attention_forward`.

    ``dbias``, ``dalibi_slopes`` and ``dsinks`` are contiguous, of the shapes of ``bias``, ``alibi_slopes`` and
    ``sinks``; ``dout`` (B, Hq, Lq, Dv) has any strides; ``dlse`` (B, Hq, Lq) may be None.
    """
    dq, dk, dv, dbias, dslopes, dsinks = gradients
    call = launch.Call(q, k, v, operands, options)
    dout = launch.unit_last(dout)
    unit = launch.stride_unit(call.q, call.k, call.v, out, dout, dq, dk, dv)
    of_rows = replay.scratch((3, *statistics.shape[1:]), statistics)
    dout_rows = launch.rows(dout, unit)
    inputs = (*(launch.rows(x, unit) for x in (call.q, call.k, call.v)), dout_rows, of_rows)
    groups = (call.terms, call.dropout, call.packed)
    flat = (operands.q_offset_tensor, operands.kv_start, *call.sizes, unit, *call.constants)
    with replay.on_device(q):
        cfg = call.configure("delta", unit)
        if programs := triton.cdiv(call.q_len, cfg.block_m) * call.batch * call.q_heads:
            arguments = (
                launch.rows(out, unit), dout_rows, None if dlse is None else dlse.contiguous(), statistics, of_rows,
                call.q_heads, call.q_len, unit, call.v.shape[3], cfg.block_m,
            )  # fmt: skip
            replay.start(delta_kernel, programs, arguments, cfg)
        for kernel in call.key_passes():
            cfg = call.configure(kernel, unit)
            if programs := launch.tiles(call.kv_len, cfg.block_n, operands.cu_seqlens_k) * call.batch * call.kv_heads:
                arguments = (
                    *inputs, launch.rows(dk if "dk" in kernel else None, unit),
                    launch.rows(dv if "dv" in kernel else None, unit), *groups,
                    launch.sparse(operands.block_mask, by_key=True), *flat, cfg.block_m, cfg.block_n,
                )  # fmt: skip
                replay.start(dkdv_kernel, programs, arguments, cfg)
        cfg = call.configure("dq", unit)
        tiles = launch.tiles(call.q_len, cfg.block_m, operands.cu_seqlens_q)
        shares = (call.batch, call.q_heads, tiles)  # one share per tile, of a slope or a sink
        dslope_tiles = None if dslopes is None else of_rows.new_zeros(shares)
        dsink_tiles = None if dsinks is None else of_rows.new_zeros(shares)
        if programs := tiles * call.batch * call.q_heads:
            arguments = (
                *inputs, launch.rows(dq, unit), dslope_tiles, dsink_tiles, *groups,
                launch.sparse(operands.block_mask), *flat, cfg.block_m, cfg.block_n,
            )  # fmt: skip
            replay.start(dq_kernel, programs, arguments, cfg)
        if call.sign != 1.0:
            dq.mul_(call.sign)
        if dbias is not None:
            bias_gradient(dbias, inputs, call, operands, unit)
    if dslopes is not None and dslope_tiles is not None:
        _sum_slopes(dslopes, dslope_tiles, operands.cu_seqlens_q, cfg)
    if dsinks is not None and dsink_tiles is not None:
        dsinks.copy_(dsink_tiles.sum((0, 2)))


def _sum_slopes(dslopes: Tensor, tiles: Tensor, cu_seqlens_q: Tensor | None, cfg: config.LaunchConfig) -> None:
    """Sum the shares (batch, heads, tiles) of the dq kernel's tiles to the gradient of the ALiBi slopes."""
    if cu_seqlens_q is None or dslopes.shape[0] == 1:
        dslopes.copy_(tiles.sum(-1).sum_to_size(dslopes.shape))
        return
    first = cu_seqlens_q // cfg.block_m  # the slots of each sequence, see `ranges.locate`
    first = first + torch.arange(len(cu_seqlens_q), device=first.device)
    dslopes.copy_(torch.segment_reduce(tiles[0].mT.contiguous(), "sum", offsets=first, unsafe=True))
