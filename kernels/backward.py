"""Backward attention: probabilities are recomputed from lse, never stored (FlashAttention-2, Dao, 2023).

With ``P = exp(S - lse)``, ``dP = dO V^T`` and ``delta = rowsum(dO * O) - dlse``:
``dS = P * (dP - delta)``, ``dV = P^T dO``, ``dK = scale * dS^T Q``, ``dQ = scale * dS K``, ``dbias = dS``.
Each output element has one writer that adds in a fixed order, so repeats are bit-equal.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .primitives import (
    LOG2E,
    SPARSE_BLOCK,
    cast,
    dot,
    dropout_keep,
    dropout_row_keys,
    exponent_scale,
    finish_scores,
    head_offset,
    key_range,
    load_tile,
    locate,
    pool_tile,
    query_offset,
    query_range,
    rows_of,
    sparse_entry,
    sparse_line,
    sparse_range,
    store_tile,
    stride,
    tile_position,
    visible_keys,
    wide_stride,
)

RUNTIME = (
    "q_strides", "k_strides", "v_strides", "dout_strides", "dq_strides", "dk_strides", "dv_strides",
    "mask_strides", "bias_strides", "out_strides",
    "dbias_h", "dbias_m", "dbias_n", "sequences", "sparse_batch", "sparse_head", "table_batch", "table_head",
    "q_heads", "group", "q_len", "kv_len", "q_offset", "left", "right",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, out_strides, dout_strides, q_heads, q_len,
    UNIT: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse, so that a gradient through lse costs nothing further."""
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    tiles = tl.cdiv(q_len, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // q_heads, batch_head % q_heads
    out_ptr += batch * stride(out_strides[0], UNIT) + head * stride(out_strides[1], UNIT)
    dout_ptr += batch * stride(dout_strides[0], UNIT) + head * stride(dout_strides[1], UNIT)
    row = tl.program_id(0) % tiles * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    out = load_tile(out_ptr, row, stride(out_strides[2], UNIT), q_len, True, V_DIM, BLOCK_M, BLOCK_DV)
    dout = load_tile(dout_ptr, row, stride(dout_strides[2], UNIT), q_len, True, V_DIM, BLOCK_M, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + batch_head * q_len + rows, mask=rows < q_len, other=0.0)
    tl.store(delta_ptr + batch_head * q_len + rows, delta, mask=rows < q_len)


@triton.jit
def _load_row_statistics(lse_ptr, delta_ptr, rows, q_len):
    """lse in base 2 and delta. Rows that attend to nothing, or lie outside, get lse = +inf: probability 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < q_len, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < q_len, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def _probability_gradients(s, scale, dp, lse, delta, k0, k1, cols, dropout_p, keep_scale, DROPOUT: tl.constexpr):
    """(p after dropout, dS) of a tile, in whichever orientation the arguments broadcast to."""
    p = tl.math.exp2(s * scale - lse)
    p_dropped = p
    if DROPOUT:
        keep = dropout_keep(k0, k1, cols, dropout_p)
        p_dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p_dropped, p * (dp - delta)


@triton.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    mask_ptr, bias_ptr, slopes_ptr, q_offset_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    lines_ptr, entries_ptr, pool_ptr, sparse_batch, sparse_head,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, mask_strides, bias_strides,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right, scale, softcap, dropout_p, keep_scale,
    MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head, against the queries of every head that shares it."""
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    READS_SCORES: tl.constexpr = mask_ptr is not None or bias_ptr is not None
    SPARSE: tl.constexpr = lines_ptr is not None
    BORDERS: tl.constexpr = SPARSE and (left is not None or right is not None)
    DROPOUT: tl.constexpr = seed_ptr is not None
    tile, _, batch, kv_head = locate(tl.program_id(0), cu_k_ptr, sequences, q_heads // group, kv_len, BLOCK_N)
    col = tile * BLOCK_N
    entry, k_first, kv_len = rows_of(cu_k_ptr, batch, kv_len)
    _, q_first, q_rows = rows_of(cu_q_ptr, batch, q_len)
    if cu_k_ptr is not None:
        if col >= kv_len:
            return
    k_ptr += head_offset(k_strides, entry, kv_head, k_first, UNIT)
    v_ptr += head_offset(v_strides, entry, kv_head, k_first, UNIT)
    dk_ptr += head_offset(dk_strides, entry, kv_head, k_first, UNIT)
    dv_ptr += head_offset(dv_strides, entry, kv_head, k_first, UNIT)

    cols = (col + tl.arange(0, BLOCK_N))[:, None]
    k = load_tile(k_ptr, col, stride(k_strides[2], UNIT), kv_len, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_tile(v_ptr, col, stride(v_strides[2], UNIT), kv_len, True, V_DIM, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    offset = query_offset(q_offset, q_offset_ptr, batch, q_rows, kv_len)
    start, first, resume, edges, inner_start, inners = query_range(
        col, offset, left, right, q_rows, kv_len, READS_SCORES, BLOCK_M, BLOCK_N
    )
    for head in tl.range(kv_head * group, (kv_head + 1) * group):
        statistics = (entry * q_heads + head) * q_len + q_first
        q_head = q_ptr + head_offset(q_strides, entry, head, q_first, UNIT)
        dout_head = dout_ptr + head_offset(dout_strides, entry, head, q_first, UNIT)
        mask_head, bias_head, slope = mask_ptr, bias_ptr, slopes_ptr
        if mask_ptr is not None:
            mask_head += batch * wide_stride(mask_strides[0]) + head * wide_stride(mask_strides[1])
        if bias_ptr is not None:
            bias_head += batch * wide_stride(bias_strides[0]) + head * wide_stride(bias_strides[1])
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * q_heads + head)
        exponent = exponent_scale(scale * LOG2E, softcap, slope, bias_head)
        if SPARSE:
            line = sparse_line(batch, head, col, sparse_batch, sparse_head)
            start, edges, inner_start, inners = sparse_range(lines_ptr, line, BLOCK_M)
        for EDGE in tl.static_range(2):
            for number in tl.range(0, edges if EDGE else inners):
                tile_ptr = None
                if SPARSE:
                    row, entry_ptr = sparse_entry(number, start, inner_start, entries_ptr, EDGE == 1, BLOCK_M)
                    if EDGE:
                        tile_ptr = pool_tile(pool_ptr, tl.load(entry_ptr + 1))
                else:
                    row = tile_position(number, start, first, resume, inner_start, EDGE == 1, BLOCK_M)
                rows = row + tl.arange(0, BLOCK_M)
                k0, k1 = rows, rows
                if DROPOUT:
                    k0, k1 = dropout_row_keys(tl.load(seed_ptr), batch, head, rows)
                lse, delta = _load_row_statistics(lse_ptr + statistics, delta_ptr + statistics, rows, q_rows)
                q = load_tile(q_head, row, stride(q_strides[2], UNIT), q_rows, EDGE == 1, HEAD_DIM, BLOCK_M, BLOCK_D)
                s, cap_gradient = finish_scores(
                    dot(k, tl.trans(q), None, PRECISION), rows[None, :], cols, q_rows, kv_len, offset, left, right,
                    scale * LOG2E, softcap, slope, mask_head, mask_strides, bias_head, bias_strides, tile_ptr,
                    EDGE == 1 or BORDERS, MASK_BY_ROW, MASK_UNIT, BIAS_BY_ROW, BIAS_UNIT,
                )  # fmt: skip
                dout = load_tile(
                    dout_head, row, stride(dout_strides[2], UNIT), q_rows, EDGE == 1, V_DIM, BLOCK_M, BLOCK_DV
                )
                dp = dot(v, tl.trans(dout), None, PRECISION)
                p, ds = _probability_gradients(
                    s, exponent, dp, lse[None, :], delta[None, :], k0[None, :], k1[None, :], cols,
                    dropout_p, keep_scale, DROPOUT,
                )  # fmt: skip
                dv = dot(cast(p, dout.dtype), dout, dv, PRECISION)
                dk = dot(cast(ds * cap_gradient, q.dtype), q, dk, PRECISION)
    store_tile(dk_ptr, dk * scale, col, stride(dk_strides[2], UNIT), kv_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, dv, col, stride(dv_strides[2], UNIT), kv_len, V_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def _tile_ds(
    q, dout, lse, delta, rows, col, k_ptr, v_ptr, k_stride, v_stride, k0, k1, mask_ptr, bias_ptr, mask_strides,
    bias_strides, tile_ptr, slope, q_len, kv_len, offset, left, right, scale, softcap, dropout_p, keep_scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr, CHECK: tl.constexpr, MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dS, d capped / d uncapped, K) of one tile of queries by keys."""
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    k = load_tile(k_ptr, col, k_stride, kv_len, EDGE, HEAD_DIM, BLOCK_N, BLOCK_D)
    s, cap_gradient = finish_scores(
        dot(q, tl.trans(k), None, PRECISION), rows[:, None], cols, q_len, kv_len, offset, left, right, scale * LOG2E,
        softcap, slope, mask_ptr, mask_strides, bias_ptr, bias_strides, tile_ptr,
        CHECK, MASK_BY_ROW, MASK_UNIT, BIAS_BY_ROW, BIAS_UNIT,
    )  # fmt: skip
    v = load_tile(v_ptr, col, v_stride, kv_len, EDGE, V_DIM, BLOCK_N, BLOCK_DV)
    dp = dot(dout, tl.trans(v), None, PRECISION)
    _, ds = _probability_gradients(
        s, exponent_scale(scale * LOG2E, softcap, slope, bias_ptr), dp, lse[:, None], delta[:, None],
        k0[:, None], k1[:, None], cols, dropout_p, keep_scale, DROPOUT,
    )  # fmt: skip
    return ds, cap_gradient, k


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dslopes_ptr,
    mask_ptr, bias_ptr, slopes_ptr, q_offset_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    lines_ptr, entries_ptr, pool_ptr, sparse_batch, sparse_head,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, mask_strides, bias_strides,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right, scale, softcap, dropout_p, keep_scale,
    MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all the keys they see.

    With ``dslopes_ptr`` also this tile's share of the gradient of the head's ALiBi slope.
    """
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    READS_SCORES: tl.constexpr = mask_ptr is not None or bias_ptr is not None
    SPARSE: tl.constexpr = lines_ptr is not None
    BORDERS: tl.constexpr = SPARSE and (left is not None or right is not None)
    DROPOUT: tl.constexpr = seed_ptr is not None
    tile, tiles, batch, head = locate(tl.program_id(0), cu_q_ptr, sequences, q_heads, q_len, BLOCK_M)
    if right is not None and cu_q_ptr is None:
        tile = tiles - 1 - tile
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    entry, q_first, q_rows = rows_of(cu_q_ptr, batch, q_len)
    _, k_first, kv_len = rows_of(cu_k_ptr, batch, kv_len)
    if cu_q_ptr is not None:
        if row >= q_rows:
            return
    q_ptr += head_offset(q_strides, entry, head, q_first, UNIT)
    k_ptr += head_offset(k_strides, entry, head // group, k_first, UNIT)
    v_ptr += head_offset(v_strides, entry, head // group, k_first, UNIT)
    dout_ptr += head_offset(dout_strides, entry, head, q_first, UNIT)
    dq_ptr += head_offset(dq_strides, entry, head, q_first, UNIT)
    statistics = (entry * q_heads + head) * q_len + q_first
    q_len = q_rows
    slope = slopes_ptr
    if mask_ptr is not None:
        mask_ptr += batch * wide_stride(mask_strides[0]) + head * wide_stride(mask_strides[1])
    if bias_ptr is not None:
        bias_ptr += batch * wide_stride(bias_strides[0]) + head * wide_stride(bias_strides[1])
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * q_heads + head)

    k0, k1 = rows, rows
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed_ptr), batch, head, rows)
    offset = query_offset(q_offset, q_offset_ptr, batch, q_len, kv_len)
    start, first, resume, edges, inner_start, inners = key_range(
        row, offset, left, right, q_len, kv_len, READS_SCORES, BLOCK_M, BLOCK_N
    )
    if SPARSE:
        line = sparse_line(batch, head, row, sparse_batch, sparse_head)
        start, edges, inner_start, inners = sparse_range(lines_ptr, line, BLOCK_N)
    q = load_tile(q_ptr, row, stride(q_strides[2], UNIT), q_len, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout = load_tile(dout_ptr, row, stride(dout_strides[2], UNIT), q_len, True, V_DIM, BLOCK_M, BLOCK_DV)
    lse, delta = _load_row_statistics(lse_ptr + statistics, delta_ptr + statistics, rows, q_len)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else inners):
            tile_ptr = None
            if SPARSE:
                col, entry_ptr = sparse_entry(number, start, inner_start, entries_ptr, EDGE == 1, BLOCK_N)
                if EDGE:
                    tile_ptr = pool_tile(pool_ptr, tl.load(entry_ptr + 1))
            else:
                col = tile_position(number, start, first, resume, inner_start, EDGE == 1, BLOCK_N)
            ds, cap_gradient, k = _tile_ds(
                q, dout, lse, delta, rows, col, k_ptr, v_ptr, stride(k_strides[2], UNIT), stride(v_strides[2], UNIT),
                k0, k1, mask_ptr, bias_ptr, mask_strides, bias_strides, tile_ptr, slope, q_len, kv_len,
                offset, left, right, scale, softcap, dropout_p, keep_scale, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
                EDGE == 1, EDGE == 1 or BORDERS, MASK_BY_ROW, MASK_UNIT, BIAS_BY_ROW, BIAS_UNIT, DROPOUT, PRECISION,
            )  # fmt: skip
            if dslopes_ptr is not None:
                distance = tl.abs(rows[:, None] + offset - (col + tl.arange(0, BLOCK_N))[None, :])
                dslope -= tl.sum(ds * distance.to(tl.float32), 1)
            dq = dot(cast(ds * cap_gradient, k.dtype), k, dq, PRECISION)
    store_tile(dq_ptr, dq * scale, row, stride(dq_strides[2], UNIT), q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    if dslopes_ptr is not None:
        tl.store(dslopes_ptr + tl.program_id(0), tl.sum(dslope, 0))


@triton.jit(do_not_specialize=RUNTIME)
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    mask_ptr, bias_ptr, slopes_ptr, q_offset_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    table_ptr, pool_ptr, table_batch, table_head,
    q_strides, k_strides, v_strides, dout_strides, mask_strides, bias_strides,
    dbias_h, dbias_m, dbias_n,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right, scale, softcap, dropout_p, keep_scale,
    MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_BATCH: tl.constexpr, SUM_HEAD: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the bias gradient, summed over every dimension that the bias broadcasts along."""
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    DROPOUT: tl.constexpr = seed_ptr is not None
    col_tiles = tl.cdiv(dbias_n, BLOCK_N)
    row_tiles = tl.cdiv(dbias_m, BLOCK_M)
    own_col = tl.program_id(0) % col_tiles * BLOCK_N
    own_row = tl.program_id(0) // col_tiles % row_tiles * BLOCK_M
    own_head = tl.program_id(0) // (col_tiles * row_tiles) % dbias_h
    own_batch = tl.program_id(0) // (col_tiles * row_tiles) // dbias_h
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(0 if SUM_BATCH else own_batch, sequences if SUM_BATCH else own_batch + 1):
        offset = query_offset(q_offset, q_offset_ptr, b, q_len, kv_len)
        for h in tl.range(0 if SUM_HEAD else own_head, q_heads if SUM_HEAD else own_head + 1):
            batch, head = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
            k_head = k_ptr + batch * stride(k_strides[0], UNIT) + head // group * stride(k_strides[1], UNIT)
            v_head = v_ptr + batch * stride(v_strides[0], UNIT) + head // group * stride(v_strides[1], UNIT)
            q_head = q_ptr + batch * stride(q_strides[0], UNIT) + head * stride(q_strides[1], UNIT)
            dout_head = dout_ptr + batch * stride(dout_strides[0], UNIT) + head * stride(dout_strides[1], UNIT)
            bias_head = bias_ptr + batch * wide_stride(bias_strides[0]) + head * wide_stride(bias_strides[1])
            mask_head, slope = mask_ptr, slopes_ptr
            if mask_ptr is not None:
                mask_head += batch * wide_stride(mask_strides[0]) + head * wide_stride(mask_strides[1])
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + batch * q_heads + head)
            statistics = (batch * q_heads + head) * q_len
            for row in tl.range(0 if SUM_ROWS else own_row, q_len if SUM_ROWS else own_row + 1, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                k0, k1 = rows, rows
                if DROPOUT:
                    k0, k1 = dropout_row_keys(tl.load(seed_ptr), batch, head, rows)
                q = load_tile(q_head, row, stride(q_strides[2], UNIT), q_len, True, HEAD_DIM, BLOCK_M, BLOCK_D)
                dout = load_tile(dout_head, row, stride(dout_strides[2], UNIT), q_len, True, V_DIM, BLOCK_M, BLOCK_DV)
                lse, delta = _load_row_statistics(lse_ptr + statistics, delta_ptr + statistics, rows, q_len)
                first, last = visible_keys(row, offset, left, right, kv_len, BLOCK_M)
                if SUM_COLS:
                    first = first // BLOCK_N * BLOCK_N
                else:  # the own tile, if these rows see it
                    last = tl.where(own_col + BLOCK_N > first, tl.minimum(last, own_col + 1), 0)
                    first = own_col
                for col in tl.range(first, last, BLOCK_N):
                    tile_ptr = None
                    if table_ptr is not None:
                        line = sparse_line(batch, head, row, table_batch, table_head)
                        place = sparse_line(line, 0, col, tl.cdiv(kv_len, SPARSE_BLOCK), 0)
                        tile_ptr = pool_tile(pool_ptr, tl.load(table_ptr + place))
                    ds, _, _ = _tile_ds(
                        q, dout, lse, delta, rows, col, k_head, v_head,
                        stride(k_strides[2], UNIT), stride(v_strides[2], UNIT), k0, k1, mask_head, bias_head,
                        mask_strides, bias_strides, tile_ptr, slope, q_len, kv_len, offset, left, right,
                        scale, softcap, dropout_p, keep_scale, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
                        True, True, MASK_BY_ROW, MASK_UNIT, BIAS_BY_ROW, BIAS_UNIT, DROPOUT, PRECISION,
                    )  # fmt: skip
                    dbias += ds
    if SUM_ROWS:
        dbias = tl.broadcast_to(tl.sum(dbias, 0)[None, :], [BLOCK_M, BLOCK_N])
    if SUM_COLS:
        dbias = tl.broadcast_to(tl.sum(dbias, 1)[:, None], [BLOCK_M, BLOCK_N])
    rows = own_row + tl.arange(0, BLOCK_M)[:, None]
    cols = own_col + tl.arange(0, BLOCK_N)[None, :]
    line = (own_batch.to(tl.int64) * dbias_h + own_head) * dbias_m + rows
    inside = (rows < dbias_m) & (cols < dbias_n)
    tl.store(dbias_ptr + line * dbias_n + cols, cast(dbias, dbias_ptr.dtype.element_ty), mask=inside)


def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, dslopes: Tensor | None, dsinks: Tensor | None,
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    q_offset_tensor: Tensor | None, seed: Tensor | None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, block_mask: Sequence[Tensor] | None = None, *,
    left: int | None, right: int | None, q_offset: int | None, scale: float, softcap: float | None, dropout_p: float,
) -> None:  # fmt: skip
    """Launch the backward kernels, which fill the gradients; other arguments as in `attention_forward`.

    ``dbias``, ``dslopes`` and ``dsinks`` are contiguous, of the shapes of ``bias``, ``alibi_slopes`` and ``sinks``, or
    None where they are not wanted; ``dout`` (B, Hq, Lq, Dv) has any strides; ``dlse`` (B, Hq, Lq) may be None.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    q, k, v, dout = (launch.unit_last(t) for t in (q, k, v, dout))
    negative = scale < 0.0
    q, scale = launch.positive_scale(q, scale)
    delta = torch.empty_like(lse)
    shape = (batch, q_heads, q_len, kv_len)
    sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    mask_op, bias_op = launch.score_operand(mask, shape), launch.score_operand(bias, shape)
    unit = launch.stride_unit(q, k, v, out, dout, dq, dk, dv)
    q_st, k_st, v_st, dout_st = (launch.strides(t, unit) for t in (q, k, v, dout))
    inputs = (q, k, v, dout, lse, delta)
    score_operands = (
        mask_op.tensor, bias_op.tensor, launch.slopes(alibi_slopes, sequences), q_offset_tensor, seed,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    score_strides = (mask_op.strides, bias_op.strides)
    sizes = (
        sequences, q_heads, q_heads // kv_heads, q_len, kv_len, q_offset, left, right, scale, softcap,
        dropout_p, launch.keep_scale(dropout_p),
    )  # fmt: skip
    flags = (
        mask_op.by_row, mask_op.unit_cols, bias_op.by_row, bias_op.unit_cols, unit,
        launch.dot_precision(q.dtype), head_dim, v_dim,
    )  # fmt: skip
    arch = launch.architecture(q.device)

    def configure(kernel: config.Kernel) -> config.LaunchConfig:
        return config.lookup(kernel, arch, max(head_dim, v_dim), q.element_size(), indirect=bool(block_mask))

    with launch.on_device(q):
        cfg = configure("delta")
        if programs := triton.cdiv(q_len, cfg.block_m) * batch * q_heads:
            delta_kernel[(programs,)](
                out, dout, None if dlse is None else dlse.contiguous(), delta,
                launch.strides(out, unit), dout_st, q_heads, q_len, unit, v_dim, cfg.block_m, **cfg.options(),
            )  # fmt: skip
        cfg = configure("dkdv")
        if programs := launch.tiles(kv_len, cfg.block_n, cu_seqlens_k) * batch * kv_heads:
            dkdv_kernel[(programs,)](
                *inputs, dk, dv, *score_operands, *launch.sparse_operand(block_mask, by_key=True),
                q_st, k_st, v_st, dout_st, launch.strides(dk, unit), launch.strides(dv, unit), *score_strides,
                *sizes, *flags, cfg.block_m, cfg.block_n, **cfg.options(),
            )  # fmt: skip
        cfg = configure("dq")
        tiles = launch.tiles(q_len, cfg.block_m, cu_seqlens_q)
        dslope_tiles = None if dslopes is None else lse.new_zeros((batch, q_heads, tiles))
        if programs := tiles * batch * q_heads:
            dq_kernel[(programs,)](
                *inputs, dq, dslope_tiles, *score_operands, *launch.sparse_operand(block_mask),
                q_st, k_st, v_st, dout_st, launch.strides(dq, unit), *score_strides,
                *sizes, *flags, cfg.block_m, cfg.block_n, **cfg.options(),
            )  # fmt: skip
        if negative:
            dq.neg_()
        cfg = configure("dbias")
        lines, table = launch.sparse_operand(block_mask), block_mask[4] if block_mask else None
        b, h, m, n = (0, 0, 0, 0) if dbias is None else dbias.shape
        if programs := triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n) * b * h:
            dbias_kernel[(programs,)](
                *inputs, dbias, *score_operands, table, lines.pool, lines.batch_stride, lines.head_stride,
                q_st, k_st, v_st, dout_st, *score_strides,
                h, m, n, *sizes, *flags, cfg.block_m, cfg.block_n, b == 1, h == 1, m == 1, n == 1,
                **cfg.options(),
            )  # fmt: skip
    if dslopes is not None and dslope_tiles is not None:
        if cu_seqlens_q is None or dslopes.shape[0] == 1:
            dslopes.copy_(dslope_tiles.sum(-1).sum_to_size(dslopes.shape))
        else:  # the slots of each sequence, see `primitives.locate`
            first = cu_seqlens_q // config.lookup("dq", arch, max(head_dim, v_dim), q.element_size()).block_m
            first = first + torch.arange(sequences + 1, device=first.device)
            dslopes.copy_(torch.segment_reduce(dslope_tiles[0].mT.contiguous(), "sum", offsets=first, unsafe=True))
    if dsinks is not None and sinks is not None:  # a score whose value vector is 0: dP = 0 there
        weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(
            lse == -torch.inf, 0.0
        )  # rows of no sequence
        dsinks.copy_((weight * -delta).sum((0, 2)))
