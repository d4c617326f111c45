"""Second derivatives, and derivatives along a direction (forward mode), in blocks of query rows, for every backend."""

from typing import Any

from torch import Tensor

from fastattn.backends.reference.blockwise import (
    Block,
    PackedSums,
    Sums,
    alibi_shift,
    blocks,
    compute_dtype,
    kept,
    key_sum,
    sinks_of,
    softmax_of,
)
from fastattn.backends.reference.definition import cut, cut_scores, grouped_matmul, scores
from fastattn.backends.reference.packed import packed_sequences
from fastattn.spec.operands import Inputs, Operands, Options


def double_backward(
    tout: Tensor, tlse: Tensor, gradients: Inputs, direction: Inputs, dout: Tensor | None, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options, first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill the derivative along a direction, and the gradient of its product with (``dout``, ``dlse``), block by block.

    ``direction`` has q, k and v at least. ``tout`` and ``tlse`` become the derivatives of out and lse along it.
    ``gradients`` become those of ``<dout, tout> + <dlse, tlse>``, which is the Hessian of ``<dout, out> + <dlse, lse>``
    times the direction. A second backward pass receives the direction and returns these results as the gradients of
    dout, dlse, q, k, ... Without ``dout`` only ``tout`` and ``tlse`` are filled.

    ``t`` before a name means its derivative along the direction (its tangent): ``ts`` is that of the scores. ``_``
    after a name means the block's copy in the compute dtype. With ``dp = dout v^T``::

        tlse  = sum_j p ts,   tp = p (ts - tlse),   tout = tp v + p tv
        w     = ts * dp + dout tv^T,   delta = sum_j p dp - dlse
        d/ds  = p (w - sum_j p w - tlse (dp - sum_j p dp) - delta (ts - tlse))
        d/dts = p (dp - delta)
    """
    if operands.cu_seqlens_q is not None:
        return _packed(tout, tlse, gradients, direction, dout, dlse, q, k, v, operands, options)
    dtype = compute_dtype(q.dtype)
    k_, v_, tk_, tv_ = (x.to(dtype) for x in (k, v, direction.k, direction.v))
    sums = Sums(gradients, dtype)
    for block in blocks(q, k.shape[2], operands, options, share=2):  # holds more of their size than a backward pass
        own, row_slice = block.key_slice, block.row_slice
        q_, tq_ = q[:, :, row_slice].to(dtype), direction.q[:, :, row_slice].to(dtype)
        shift = alibi_shift(block, k.shape[2], operands, options, q.device)
        s, tanh, distance = scores(
            q_, k_[:, :, own], cut(operands, *block), options, block.rows[0], block.keys[0], shift
        )
        p, p_sink, *_ = softmax_of(s, sinks_of(operands, dtype))
        cap_slope = None if tanh is None else 1.0 - tanh * tanh  # of the capped scores
        product = grouped_matmul(tq_, k_[:, :, own].mT).add_(grouped_matmul(q_, tk_[:, :, own].mT)).mul_(options.scale)
        ts = _score_tangents(product if cap_slope is None else product * cap_slope, direction, distance, block)
        tlse_ = (p * ts).sum(-1, keepdim=True)
        tsink = ts.new_zeros(()) if direction.sinks is None else direction.sinks.to(dtype)[:, None, None]
        if p_sink is not None:
            tlse_ = tlse_ + p_sink * tsink
        keep = None
        if operands.seed is not None:
            keep = kept(operands.seed, options.dropout_p, p, block, first_batch)
        tp = p * (ts - tlse_)
        tp, dropped = (tp, p) if keep is None else (tp * keep, p * keep)
        tout[:, :, row_slice] = grouped_matmul(tp, v_[:, :, own]) + grouped_matmul(dropped, tv_[:, :, own])
        tlse[:, :, row_slice] = tlse_.squeeze(-1)
        if dout is None:
            continue
        dout_ = dout[:, :, row_slice].to(dtype)
        sums.add_dv(key_sum(tp, dout_, v.shape[1], careful=False), block)
        del tp, dropped
        dp, w = grouped_matmul(dout_, v_[:, :, own].mT), grouped_matmul(dout_, tv_[:, :, own].mT)
        if keep is not None:
            dp, w = dp.mul_(keep), w.mul_(keep)
        w.addcmul_(dp, ts)
        dp_sum, w_sum = (p * dp).sum(-1, keepdim=True), (p * w).sum(-1, keepdim=True)
        delta = dp_sum if dlse is None else dp_sum - dlse[:, :, row_slice, None].to(dtype)
        dts = p * (dp - delta)
        ds = w.sub_(w_sum).sub_((dp - dp_sum).mul_(tlse_)).sub_((ts - tlse_).mul_(delta)).mul_(p)
        del w, dp, ts
        sums.add_dbias(ds, block)
        sums.add_dslopes(ds, distance)
        if p_sink is not None:
            sums.add_dsinks(p_sink * (tlse_ * dp_sum - w_sum - delta * (tsink - tlse_)))
        if tanh is not None and cap_slope is not None and options.softcap is not None:
            dts = dts * cap_slope
            ds = ds * cap_slope - 2.0 / options.softcap * tanh * product * dts
        if gradients.k is not None:
            dk = key_sum(ds, q_, k.shape[1], careful=False) + key_sum(dts, tq_, k.shape[1], careful=False)
            sums.add_dk(dk * options.scale, block)
        if gradients.q is not None:
            dq = grouped_matmul(ds, k_[:, :, own]) + grouped_matmul(dts, tk_[:, :, own])
            gradients.q[:, :, row_slice] = dq * options.scale
    sums.store()


def _score_tangents(ts: Tensor, direction: Inputs, distance: Tensor, block: Block) -> Tensor:
    """The tangents of the scores from ``ts``, those of the capped products."""
    if direction.bias is not None:
        ts = ts + cut_scores(direction.bias, *block).to(ts.dtype)
    if direction.alibi_slopes is not None:
        ts = ts - direction.alibi_slopes.to(ts.dtype)[:, :, None, None] * distance.abs().to(ts.dtype)
    return ts


def _packed(
    tout: Tensor, tlse: Tensor, gradients: Inputs, direction: Inputs, dout: Tensor | None, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    sums = PackedSums(gradients.alibi_slopes, gradients.sinks, compute_dtype(q.dtype))
    for one in packed_sequences(operands, options):

        def rows(x: Tensor | None, own: slice = one.rows) -> Any:
            return None if x is None else x[:, :, own]

        def keys(x: Tensor | None, own: slice = one.keys) -> Any:
            return None if x is None else x[:, :, own]

        slopes = direction.alibi_slopes
        if slopes is not None and len(slopes) > 1:
            slopes = slopes[one.number : one.number + 1]
        double_backward(
            rows(tout), rows(tlse),
            Inputs(rows(gradients.q), keys(gradients.k), keys(gradients.v), None, *sums.own),
            Inputs(rows(direction.q), keys(direction.k), keys(direction.v), None, slopes, direction.sinks),
            rows(dout), rows(dlse), rows(q), keys(k), keys(v), one.operands, one.options, one.number,
        )  # fmt: skip
        sums.add(one.number)
    sums.store()
