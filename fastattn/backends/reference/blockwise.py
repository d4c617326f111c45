"""The definition in blocks of query rows, with memory O(block x Lk). Calls on this backend run this code.

Half-precision inputs are computed in float32. `statistics` stores two numbers per row: the maximum of the scores, and
the logarithm of the sum of ``exp(s - maximum)``. One float32 lse cannot hold both where scores are large. ALiBi counts
distances from each row's nearest key; the scores and their maximum follow that count.

A key that a row may not see reaches neither its output nor its gradient, even if the key is NaN. That takes two more
passes, and only calls with such inputs pay for them (`poisoned`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends.reference.definition import cut, cut_scores, grouped_matmul, positions, scores
from fastattn.backends.reference.dropout import dropout_keep, keep_scale
from fastattn.backends.reference.packed import packed_sequences
from fastattn.spec.checks import readable
from fastattn.spec.operands import Gradients, Inputs, Operands, Options

# Scores held at once: 4M float32 values, 16 MiB.
BLOCK_ELEMENTS = 1 << 22


class Block(NamedTuple):
    """Some query rows, and the keys that some of them see."""

    rows: tuple[int, int]
    keys: tuple[int, int]

    @property
    def row_slice(self) -> slice:
        return slice(*self.rows)

    @property
    def key_slice(self) -> slice:
        return slice(*self.keys)


class Softmax(NamedTuple):
    """The softmax of a block of scores."""

    p: Tensor
    p_sink: Tensor | None
    maximum: Tensor
    log_total: Tensor
    empty: Tensor


def blocks(
    q: Tensor, kv_len: int, operands: Operands, options: Options, share: int = 1
) -> Iterator[Block]:  # fmt: skip
    """Blocks of query rows: one row, or at most BLOCK_ELEMENTS / share scores."""
    batch, q_heads, q_len, _ = q.shape
    first, last = visible_keys((0, 1), kv_len, operands, options)
    left, right = options.left, options.right
    span = kv_len if left is None or right is None else max(last - first, left + right + 1)
    block = max(1, BLOCK_ELEMENTS // share // max(1, batch * q_heads * min(span, kv_len)))
    if span < kv_len:  # a block of n rows sees its window and n keys more: n like the window wastes least
        block = min(block, max(span, 64))
    for start in range(0, q_len, block):
        rows = (start, min(start + block, q_len))
        yield Block(rows, visible_keys(rows, kv_len, operands, options))


def visible_keys(rows: tuple[int, int], kv_len: int, operands: Operands, options: Options) -> tuple[int, int]:
    """The keys that some of these rows see, judged by one offset for the whole batch."""
    start, end = 0, kv_len
    if operands.kv_start is not None and operands.kv_start.numel() and readable(operands.kv_start):
        start = min(max(int(operands.kv_start.min()), 0), kv_len)
    if operands.q_offset_tensor is None:
        assert options.q_offset is not None
        if options.left is not None:
            start = min(max(rows[0] + options.q_offset - options.left, start), kv_len)
        if options.right is not None:
            end = max(min(rows[1] + options.q_offset + options.right, kv_len), start)
    return start, end


def forward(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options,
    first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill ``out`` (B, Hq, Lq, Dv), ``lse`` (B, Hq, Lq) and ``statistics`` (2, B, Hq, Lq)."""
    if operands.cu_seqlens_q is not None:
        for one in packed_sequences(operands, options):
            forward(
                out[:, :, one.rows], lse[:, :, one.rows], statistics[..., one.rows], q[:, :, one.rows],
                k[:, :, one.keys], v[:, :, one.keys], one.operands, one.options, one.number,
            )  # fmt: skip
        return
    dtype = compute_dtype(q.dtype)
    careful = poisoned(q, k, v)
    k, v = k.to(dtype), v.to(dtype)
    for block in blocks(q, k.shape[2], operands, options):
        own, row_slice = block.key_slice, block.row_slice
        shift = alibi_shift(block, k.shape[2], operands, options, q.device)
        s, _, _ = scores(
            q[:, :, row_slice].to(dtype), k[:, :, own], cut(operands, *block), options, block.rows[0], block.keys[0],
            shift,
        )  # fmt: skip
        softmax = softmax_of(s, sinks_of(operands, dtype))
        p = softmax.p
        if operands.seed is not None:
            p.mul_(kept(operands.seed, options.dropout_p, p, block, first_batch))
        out[:, :, row_slice] = weighted_sum(p, v[:, :, own], careful)
        maximum = softmax.maximum
        statistics[0, :, :, row_slice] = maximum.squeeze(-1)
        statistics[1, :, :, row_slice] = softmax.log_total.squeeze(-1)
        if shift is not None:
            maximum = maximum - shift_of_scores(operands, shift, dtype)
        lse[:, :, row_slice] = (maximum + softmax.log_total).masked_fill(softmax.empty, -torch.inf).squeeze(-1)


def backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options, first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill the gradients block by block, recomputing the probabilities from ``statistics``."""
    if operands.cu_seqlens_q is not None:
        return _backward_packed(gradients, dout, dlse, q, k, v, out, statistics, operands, options)
    dtype = compute_dtype(q.dtype)
    careful = poisoned(q, k, v, dout)
    k_, v_ = k.to(dtype), v.to(dtype)
    sums = Sums(gradients, dtype)
    for block in blocks(q, k.shape[2], operands, options):
        own, row_slice = block.key_slice, block.row_slice
        q_, dout_ = q[:, :, row_slice].to(dtype), dout[:, :, row_slice].to(dtype)
        shift = alibi_shift(block, k.shape[2], operands, options, q.device)
        s, tanh, distance = scores(
            q_, k_[:, :, own], cut(operands, *block), options, block.rows[0], block.keys[0], shift
        )
        maximum, log_total = (x[..., None] for x in statistics[:, :, :, row_slice])
        forbidden = s == -torch.inf if careful else None
        p = s.sub_(maximum).sub_(log_total).exp_()
        dp = grouped_matmul(dout_, v_[:, :, own].mT)
        dropped = p
        if operands.seed is not None:
            keep = kept(operands.seed, options.dropout_p, p, block, first_batch)
            dropped, dp = p * keep, dp * keep
        delta = (dout_ * out[:, :, row_slice].to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, row_slice, None].to(dtype)
        ds = dp.sub_(delta).mul_(p)
        if forbidden is not None:
            ds, dropped = ds.masked_fill_(forbidden, 0.0), dropped.masked_fill(forbidden, 0.0)
        sums.add_dbias(ds, block)
        sums.add_dslopes(ds, distance)
        sinks = sinks_of(operands, dtype)
        if sinks is not None:  # a score whose value vector is 0
            sums.add_dsinks(-torch.exp(sinks - maximum - log_total) * delta)
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
            ds = ds if forbidden is None else ds.masked_fill_(forbidden, 0.0)
        sums.add_dv(key_sum(dropped, dout_, v.shape[1], careful), block)
        sums.add_dk(key_sum(ds, q_, k.shape[1], careful) * options.scale, block)
        gradients.dq[:, :, row_slice] = weighted_sum(ds, k_[:, :, own], careful) * options.scale
    sums.store()


class Sums:
    """The gradients that add up over blocks, in the dtype of the arithmetic; None where not wanted."""

    def __init__(self, gradients: Gradients | Inputs, dtype: torch.dtype) -> None:
        _, *self._targets = gradients
        sums = (None if x is None else torch.zeros_like(x, dtype=dtype) for x in self._targets)
        self.dk, self.dv, self.dbias, self.dslopes, self.dsinks = sums

    def add_dk(self, dk: Tensor, block: Block) -> None:
        if self.dk is not None:
            self.dk[:, :, block.key_slice] += dk

    def add_dv(self, dv: Tensor, block: Block) -> None:
        if self.dv is not None:
            self.dv[:, :, block.key_slice] += dv

    def add_dbias(self, ds: Tensor, block: Block) -> None:
        if self.dbias is not None:
            share = cut_scores(self.dbias, *block)
            share.add_(ds.sum_to_size(share.shape))

    def add_dslopes(self, ds: Tensor, distance: Tensor) -> None:
        if self.dslopes is not None:
            self.dslopes -= (ds * distance.abs()).sum((2, 3)).sum_to_size(self.dslopes.shape)

    def add_dsinks(self, dsink: Tensor) -> None:
        """``dsink`` (B, Hq, rows, 1)."""
        if self.dsinks is not None:
            self.dsinks += dsink.sum((0, 2, 3))

    def store(self) -> None:
        for target, total in zip(self._targets, (self.dk, self.dv, self.dbias, self.dslopes, self.dsinks), strict=True):
            if target is not None and total is not None:
                target.copy_(total)


def _backward_packed(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    sums = PackedSums(gradients.dalibi_slopes, gradients.dsinks, compute_dtype(q.dtype))
    for one in packed_sequences(operands, options):
        rows, keys = one.rows, one.keys
        backward(
            Gradients(gradients.dq[:, :, rows], gradients.dk[:, :, keys], gradients.dv[:, :, keys], None, *sums.own),
            dout[:, :, rows], None if dlse is None else dlse[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
            out[:, :, rows], statistics[..., rows], one.operands, one.options, one.number,
        )  # fmt: skip
        sums.add(one.number)
    sums.store()


class PackedSums:
    """The gradients of slopes and sinks, added up over packed sequences."""

    def __init__(self, dslopes: Tensor | None, dsinks: Tensor | None, dtype: torch.dtype) -> None:
        self._targets = (dslopes, dsinks)
        self._sums = tuple(None if x is None else torch.zeros_like(x, dtype=dtype) for x in self._targets)
        slopes, sinks = self._sums
        self.own = (
            None if slopes is None else torch.empty_like(slopes[:1]),
            None if sinks is None else torch.empty_like(sinks),
        )
        """The gradients that the next sequence fills."""

    def add(self, number: int) -> None:
        """Take in what sequence ``number`` filled."""
        (slopes, sinks), (own_slopes, own_sinks) = self._sums, self.own
        if slopes is not None and own_slopes is not None:
            slopes[number if len(slopes) > 1 else 0] += own_slopes[0]
        if sinks is not None and own_sinks is not None:
            sinks += own_sinks

    def store(self) -> None:
        for target, total in zip(self._targets, self._sums, strict=True):
            if target is not None and total is not None:
                target.copy_(total)


# Pieces of a block


def softmax_of(s: Tensor, sinks: Tensor | None) -> Softmax:
    """Probabilities that sum to 1 however large the scores are; overwrites ``s``."""
    maximum = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    p = s.sub_(maximum).exp_()
    total = p.sum(-1, keepdim=True)
    p_sink = None if sinks is None else torch.exp(sinks - maximum)
    total = total if p_sink is None else total + p_sink
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    p.div_(total)
    return Softmax(p, None if p_sink is None else p_sink / total, maximum, total.log(), empty)


def alibi_shift(
    block: Block, kv_len: int, operands: Operands, options: Options, device: torch.device
) -> Tensor | None:  # fmt: skip
    """How far each row's nearest key is. ALiBi counts from there, so that small differences between far keys survive
    rounding.

    0 beside a sink, whose score does not move along; far keys weigh practically nothing there.
    """
    if operands.alibi_slopes is None or operands.sinks is not None:
        return None
    position = positions(block.rows[0], block.rows[1] - block.rows[0], operands, options, device)
    return (position - position.clamp(0, max(kv_len - 1, 0))).abs()


def shift_of_scores(operands: Operands, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much scores are too large because they count distances from the nearest key."""
    assert operands.alibi_slopes is not None
    return operands.alibi_slopes.to(dtype)[:, :, None, None] * shift.to(dtype)


def sinks_of(operands: Operands, dtype: torch.dtype) -> Tensor | None:
    """Sinks (Hq, 1, 1)."""
    return None if operands.sinks is None else operands.sinks.to(dtype)[:, None, None]


def kept(seed: Tensor, dropout_p: float, p: Tensor, block: Block, first_batch: int) -> Tensor:
    """What dropout multiplies the probabilities ``p`` of a block by."""
    keep = dropout_keep(seed, dropout_p, p.shape[0], p.shape[1], block.rows, block.keys, first_batch)
    return keep.to(p.dtype).mul_(keep_scale(dropout_p))


def poisoned(*inputs: Tensor) -> bool:
    """Whether NaN or inf may be among them. On another device the answer is yes: looking would wait for it."""
    return any(x.device.type != "cpu" or not bool(x.isfinite().all()) for x in inputs)


def weighted_sum(weights: Tensor, values: Tensor, careful: bool) -> Tensor:
    """weights (B, Hq, rows, n) @ values (B, Hk, n, m); with ``careful`` a weight of 0 keeps out NaN and inf."""
    if not careful:
        return grouped_matmul(weights, values)
    finite = values.isfinite()
    total = grouped_matmul(weights, values.masked_fill(~finite, 0.0))
    reached = (weights != 0.0).to(values.dtype)
    nan, up, down = (
        grouped_matmul(reached, x.to(values.dtype)) > 0.0
        for x in (values.isnan(), values == torch.inf, values == -torch.inf)
    )
    total = total.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)
    return total.masked_fill(nan | (up & down), torch.nan)


def key_sum(weights: Tensor, values: Tensor, kv_heads: int, careful: bool) -> Tensor:
    """weights (B, Hq, rows, keys), transposed, @ values (B, Hq, rows, m), added up over each group of query heads."""
    batch, q_heads, rows, keys = weights.shape
    grouped = (batch, kv_heads, q_heads // kv_heads * rows)
    return weighted_sum(weights.reshape(*grouped, keys).mT, values.reshape(*grouped, values.shape[3]), careful)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
