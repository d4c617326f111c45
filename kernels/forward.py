"""Forward attention: one pass over the keys with an online softmax (FlashAttention-2, Dao, 2023)."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .primitives import (
    LN2,
    LOG2E,
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
    online_softmax,
    pool_tile,
    query_offset,
    rows_of,
    sparse_entry,
    sparse_line,
    sparse_range,
    store_tile,
    stride,
    tile_position,
    wide_stride,
)

RUNTIME = (
    "q_strides", "k_strides", "v_strides", "out_strides", "mask_strides", "bias_strides",
    "sequences", "sparse_batch", "sparse_head", "q_heads", "group", "q_len", "kv_len", "q_offset", "left", "right",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr, q_offset_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, lines_ptr, entries_ptr, pool_ptr, sparse_batch, sparse_head,
    q_strides, k_strides, v_strides, out_strides, mask_strides, bias_strides,
    sequences, q_heads, group, q_len, kv_len, q_offset, left, right, qk_scale, softcap, dropout_p, keep_scale,
    MASK_BY_ROW: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_UNIT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all the keys they see."""
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(V_DIM))
    READS_SCORES: tl.constexpr = mask_ptr is not None or bias_ptr is not None
    SPARSE: tl.constexpr = lines_ptr is not None
    BORDERS: tl.constexpr = SPARSE and (left is not None or right is not None)  # they may cross full tiles
    tile, tiles, batch, head = locate(tl.program_id(0), cu_q_ptr, sequences, q_heads, q_len, BLOCK_M)
    if right is not None and cu_q_ptr is None:
        tile = tiles - 1 - tile  # the longest rows first, so that no program is left running alone
    entry, q_first, q_rows = rows_of(cu_q_ptr, batch, q_len)
    k_entry, k_first, kv_len = rows_of(cu_k_ptr, batch, kv_len)
    if cu_q_ptr is not None:
        if tile * BLOCK_M >= q_rows:
            return
    q_ptr += head_offset(q_strides, entry, head, q_first, UNIT)
    k_ptr += head_offset(k_strides, k_entry, head // group, k_first, UNIT)
    v_ptr += head_offset(v_strides, k_entry, head // group, k_first, UNIT)
    out_ptr += head_offset(out_strides, entry, head, q_first, UNIT)
    lse_ptr += (entry * q_heads + head) * q_len + q_first
    q_len = q_rows
    if mask_ptr is not None:
        mask_ptr += batch * wide_stride(mask_strides[0]) + head * wide_stride(mask_strides[1])
    if bias_ptr is not None:
        bias_ptr += batch * wide_stride(bias_strides[0]) + head * wide_stride(bias_strides[1])
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * q_heads + head)

    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    k0, k1 = rows, rows
    if seed_ptr is not None:
        k0, k1 = dropout_row_keys(tl.load(seed_ptr), batch, head, rows)
    offset = query_offset(q_offset, q_offset_ptr, batch, q_len, kv_len)
    start, first, resume, edges, inner_start, inners = key_range(
        row, offset, left, right, q_len, kv_len, READS_SCORES, BLOCK_M, BLOCK_N
    )
    if SPARSE:
        line = sparse_line(batch, head, row, sparse_batch, sparse_head)
        start, edges, inner_start, inners = sparse_range(lines_ptr, line, BLOCK_N)
    scale = exponent_scale(qk_scale, softcap, slope, bias_ptr)
    q = load_tile(q_ptr, row, stride(q_strides[2], UNIT), q_len, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else inners):
            tile_ptr = None
            if SPARSE:
                col, entry_ptr = sparse_entry(number, start, inner_start, entries_ptr, EDGE == 1, BLOCK_N)
                if EDGE:
                    tile_ptr = pool_tile(pool_ptr, tl.load(entry_ptr + 1))
            else:
                col = tile_position(number, start, first, resume, inner_start, EDGE == 1, BLOCK_N)
            cols = (col + tl.arange(0, BLOCK_N))[None, :]
            k = load_tile(k_ptr, col, stride(k_strides[2], UNIT), kv_len, EDGE == 1, HEAD_DIM, BLOCK_N, BLOCK_D)
            s, _ = finish_scores(
                dot(q, tl.trans(k), None, PRECISION), rows[:, None], cols, q_len, kv_len, offset, left, right,
                qk_scale, softcap, slope, mask_ptr, mask_strides, bias_ptr, bias_strides, tile_ptr,
                EDGE == 1 or BORDERS, MASK_BY_ROW, MASK_UNIT, BIAS_BY_ROW, BIAS_UNIT,
            )  # fmt: skip
            p, acc, row_max, row_sum = online_softmax(
                s, scale, acc, row_max, row_sum, EDGE == 1 or BORDERS or READS_SCORES
            )
            if seed_ptr is not None:
                p = tl.where(dropout_keep(k0[:, None], k1[:, None], cols, dropout_p), p, 0.0)
            v = load_tile(v_ptr, col, stride(v_strides[2], UNIT), kv_len, EDGE == 1, V_DIM, BLOCK_N, BLOCK_DV)
            acc = dot(cast(p, v.dtype), v, acc, PRECISION)

    if sinks_ptr is not None:  # one more score, whose value vector is 0
        sink = tl.load(sinks_ptr + head) * LOG2E
        pivot = tl.maximum(row_max, sink)
        alpha = tl.math.exp2(row_max - pivot)
        row_sum = row_sum * alpha + tl.math.exp2(sink - pivot)
        acc = acc * alpha[:, None]
        row_max = pivot
    empty = row_sum == 0.0  # nothing allowed: output 0, lse -inf
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc * (keep_scale / row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(row_sum))
    store_tile(out_ptr, acc, row, stride(out_strides[2], UNIT), q_len, V_DIM, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptr + rows, lse, mask=rows < q_len)


def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, q_offset_tensor: Tensor | None, seed: Tensor | None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    block_mask: Sequence[Tensor] | None = None, *,
    left: int | None, right: int | None, q_offset: int | None, scale: float, softcap: float | None, dropout_p: float,
) -> None:  # fmt: skip
    """Launch the forward kernel, which fills ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq), float32, contiguous.

    ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D), ``v`` (B, Hk, Lk, Dv) of one dtype: float16, bfloat16 or float32;
    ``mask`` and ``bias`` 4-D and broadcastable to (B, Hq, Lq, Lk); ``alibi_slopes`` (1 or B, Hq); ``sinks`` (Hq,);
    ``q_offset_tensor`` int (B,) in place of ``q_offset``; ``seed`` one int64 element. Key j is visible to query i if
    ``i + q_offset - left <= j <= i + q_offset + right``; None leaves that side open.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` int (sequences + 1,): packed sequences, B = 1, no mask and no bias;
    ``q_offset`` None stands for each sequence's own Lk - Lq. Rows of no sequence are left as they are. ``block_mask``:
    the tensors of `fastattn.block_mask.BlockTensors`.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    q, k, v = launch.unit_last(q), launch.unit_last(k), launch.unit_last(v)
    q, scale = launch.positive_scale(q, scale)
    shape = (batch, q_heads, q_len, kv_len)
    sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    mask_op, bias_op = launch.score_operand(mask, shape), launch.score_operand(bias, shape)
    unit = launch.stride_unit(q, k, v, out)
    cfg = config.lookup(
        "forward", launch.architecture(q.device), max(head_dim, v_dim), q.element_size(),
        reads_matrix=mask_op.by_row or bias_op.by_row, indirect=bool(block_mask),
    )  # fmt: skip
    programs = launch.tiles(q_len, cfg.block_m, cu_seqlens_q) * batch * q_heads
    if programs == 0:
        return
    with launch.on_device(q):
        forward_kernel[(programs,)](
            q, k, v, out, lse, mask_op.tensor, bias_op.tensor, launch.slopes(alibi_slopes, sequences),
            launch.float32(sinks), q_offset_tensor, seed, cu_seqlens_q, cu_seqlens_k,
            *launch.sparse_operand(block_mask),
            launch.strides(q, unit), launch.strides(k, unit), launch.strides(v, unit), launch.strides(out, unit),
            mask_op.strides, bias_op.strides,
            sequences, q_heads, q_heads // kv_heads, q_len, kv_len, q_offset, left, right, scale * LOG2E.value, softcap,
            dropout_p, launch.keep_scale(dropout_p),
            mask_op.by_row, mask_op.unit_cols, bias_op.by_row, bias_op.unit_cols, unit,
            launch.dot_precision(q.dtype), head_dim, v_dim, cfg.block_m, cfg.block_n,
            **cfg.options(),
        )  # fmt: skip
