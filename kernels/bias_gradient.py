"""The gradient of a bias: dS, summed over every dimension that the bias broadcasts along."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.spec.operands import Operands

from . import launch, replay
from .dropout import dropout_row_keys
from .gradients import tile_ds
from .operands import BiasGradient
from .ranges import SPARSE_BLOCK, first_key, pool_tile, query_offset, sparse_line, visible_keys
from .scores import load_statistics
from .tiles import cast, decode_size, head_rows, load_tile

RUNTIME = ("sequences", "q_heads", "group", "q_len", "kv_len", "q_offset", "left", "right")


@triton.jit(do_not_specialize=RUNTIME)
def dbias_kernel(
    q, k, v, dout, statistics_ptr, dbias, terms, dropout, table, q_offset_ptr, kv_start_ptr,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the bias gradient, over all batch entries, heads, queries and keys that share it."""
    heads = 1 if dbias.heads is None else decode_size(dbias.heads)
    n_rows = 1 if dbias.rows is None else decode_size(dbias.rows)
    n_cols = 1 if dbias.cols is None else decode_size(dbias.cols)
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    own_col = tl.program_id(0) % col_tiles * BLOCK_N
    own_row = tl.program_id(0) // col_tiles % row_tiles * BLOCK_M
    own_head = tl.program_id(0) // (col_tiles * row_tiles) % heads
    own_batch = tl.program_id(0) // (col_tiles * row_tiles) // heads
    plane = tl.cast(q_len, tl.int64) * q_heads * sequences
    sum_batches: tl.constexpr = dbias.batches is None
    sum_heads: tl.constexpr = dbias.heads is None
    sum_rows: tl.constexpr = dbias.rows is None
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(0 if sum_batches else own_batch, sequences if sum_batches else own_batch + 1):
        offset = query_offset(q_offset, q_offset_ptr, b, q_len, kv_len)
        for h in tl.range(0 if sum_heads else own_head, q_heads if sum_heads else own_head + 1):
            batch, head = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
            q_ptr, q_stride = head_rows(q, batch, head, 0, UNIT)
            k_ptr, k_stride = head_rows(k, batch, head // group, 0, UNIT)
            v_ptr, v_stride = head_rows(v, batch, head // group, 0, UNIT)
            dout_ptr, dout_stride = head_rows(dout, batch, head, 0, UNIT)
            first_row = (batch * q_heads + head) * q_len
            slope = terms.slopes
            if terms.slopes is not None:
                slope = tl.load(terms.slopes + batch * q_heads + head)
            for row in tl.range(0 if sum_rows else own_row, q_len if sum_rows else own_row + 1, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                k0, k1 = rows, rows
                if dropout.seed is not None:
                    k0, k1 = dropout_row_keys(dropout, batch, head, rows)
                q_tile = load_tile(q_ptr, row, q_stride, q_len, True, HEAD_DIM, BLOCK_M)
                dout_tile = load_tile(dout_ptr, row, dout_stride, q_len, True, V_DIM, BLOCK_M)
                row_max, log_sum, delta = load_statistics(statistics_ptr + first_row, plane, rows, q_len, True)
                first, last = visible_keys(row, offset, left, right, kv_len, BLOCK_M)
                if kv_start_ptr is not None:
                    first_seen = first_key(kv_start_ptr, b, kv_len)
                    first = tl.maximum(first, first_seen)
                if dbias.cols is None:
                    first = first // BLOCK_N * BLOCK_N
                else:  # this program's tile, if these rows see it
                    last = tl.where(own_col + BLOCK_N > first, tl.minimum(last, own_col + 1), 0)
                    first = own_col
                for col in tl.range(first, last, BLOCK_N):
                    pool_ptr = None
                    if table.ptr is not None:
                        line = sparse_line(table, batch, head, row)
                        place = line * tl.cdiv(kv_len, SPARSE_BLOCK) + (col + own_col * 0) // SPARSE_BLOCK
                        pool_ptr = pool_tile(table.pool, tl.load(table.ptr + place))
                    ds, _, _ = tile_ds(
                        q_tile, dout_tile, row_max, log_sum, delta, rows, col, k_ptr, k_stride, v_ptr, v_stride, k0, k1,
                        pool_ptr, slope, batch, head, q_len, kv_len, offset, left, right, terms, dropout,
                        True, True, True, PRECISION, HEAD_DIM, V_DIM, BLOCK_N,
                    )  # fmt: skip
                    if kv_start_ptr is not None:
                        ds = tl.where((col + tl.arange(0, BLOCK_N))[None, :] >= first_seen, ds, 0.0)
                    acc += ds
    if dbias.rows is None:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    if dbias.cols is None:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
    rows = own_row + tl.arange(0, BLOCK_M)[:, None]
    cols = own_col + tl.arange(0, BLOCK_N)[None, :]
    line = (own_batch.to(tl.int64) * heads + own_head) * n_rows + rows
    inside = (rows < n_rows) & (cols < n_cols)
    tl.store(dbias.ptr + line * n_cols + cols, cast(acc, dbias.ptr.dtype.element_ty), mask=inside)


def bias_gradient(dbias: Tensor, inputs: tuple[Any, ...], call: launch.Call, operands: Operands, unit: int) -> None:
    """Fill ``dbias``, contiguous; ``inputs`` are the first five arguments of the kernel."""
    cfg = call.configure("dbias", unit)
    b, h, m, n = dbias.shape
    if programs := triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n) * b * h:
        sizes = (None if size == 1 else launch.encode(size) for size in dbias.shape)
        arguments = (
            *inputs, BiasGradient(dbias, *sizes), call.terms, call.dropout, launch.sparse_table(operands.block_mask),
            operands.q_offset_tensor, operands.kv_start, *call.sizes, unit, *call.constants, cfg.block_m, cfg.block_n,
        )  # fmt: skip
        replay.start(dbias_kernel, programs, arguments, cfg)
