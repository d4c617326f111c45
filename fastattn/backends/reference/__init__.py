"""Attention in eager PyTorch: the specification that every other backend is held to. No Triton import.

For query row ``i`` at absolute position ``x = i + q_offset`` and key ``j``::

    s[i, j] = cap(scale * <q_i, k_j>) + bias[i, j] - alibi_slope * |x - j|      -inf where not allowed(i, j)
    p       = exp(s - lse),  lse = log(sum_j exp(s) + exp(sink))
    o_i     = sum_j dropout(p)[i, j] v_j

``cap(s) = softcap * tanh(s / softcap)``, and each term only where it is asked for. ``allowed`` is the AND of
``mask[i, j]`` and ``x - left <= j <= x + right``; causal is right = 0. A row with nothing allowed, and no sink, gives
output 0, lse -inf and gradients 0.

`attention` is that definition written down, differentiable to any order. `attention_forward`, `attention_backward` and
`attention_double_backward` compute the same in blocks of queries, with memory O(block x Lk); they fill buffers, as the
fused kernels do. The last serves every backend: second derivatives, and derivatives along a direction.
"""

import itertools
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.block_mask import dense_rows

# Scores held at once by the block-wise functions: 4M float32 values, 16 MiB.
BLOCK_ELEMENTS = 1 << 22

DROPOUT_ROUNDS = 7
_MASK32 = 0xFFFFFFFF


def _philox_row_keys(seed: int, batches: Tensor, heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """First two words of Philox-4x32-7 (Salmon et al., 2011) at counter (row, head, batch, 0), as int32.

    The low 64 bits of an int64 product are those of the unsigned product; an arithmetic shift and a mask read its upper
    half.
    """
    c0, c1, c2, c3 = rows, heads, batches, torch.zeros_like(rows)
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(DROPOUT_ROUNDS):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0.to(torch.int32), c1.to(torch.int32)


def _int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def dropout_keep(
    seed: Tensor, dropout_p: float, batch: int, heads: int, rows: tuple[int, int], keys: tuple[int, int],
    first_batch: int = 0,
) -> Tensor:  # fmt: skip
    """Which probabilities dropout keeps, for query rows ``rows[0] .. rows[1]`` and keys ``keys[0] .. keys[1]``.

    bool (batch, heads, rows, keys), a function of (seed, b, h, i, j) alone: Philox gives each row two keys, a
    full-avalanche 32-bit mix keyed by them gives each element its bits, and the upper 24 of these, as a fraction, are
    compared with ``dropout_p``. ``seed`` is one int64 element.
    """

    def index(first: int, last: int, dim: int) -> Tensor:
        return torch.arange(first, last, device=seed.device).view([-1 if d == dim else 1 for d in range(3)])

    k0, k1 = _philox_row_keys(
        int(seed), index(first_batch, first_batch + batch, 0), index(0, heads, 1), index(*rows, 2)
    )
    x = torch.arange(*keys, device=seed.device, dtype=torch.int32) * _int32(0x9E3779B1) ^ k0[..., None]

    def xor_shift(bits: int) -> None:  # int32 shifts bring in the sign: mask it off
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))

    xor_shift(16)
    x.mul_(_int32(0x7FEB352D))
    xor_shift(15)
    x.bitwise_xor_(k1[..., None]).mul_(_int32(0x846CA68B))
    xor_shift(16)
    fraction = x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return fraction >= math.ceil(struct.unpack("f", struct.pack("f", dropout_p))[0] * (1 << 24))


class Terms(NamedTuple):
    """What turns products into scores; mask and bias (4-D) cut to the rows and keys at hand."""

    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None  # (1 or B, Hq)
    q_offset_tensor: Tensor | None
    left: int | None
    right: int | None
    q_offset: int
    scale: float
    softcap: float | None
    block_mask: list[Tensor] | None = None

    def cut(self, rows: tuple[int, int], keys: tuple[int, int]) -> "Terms":
        """The same for query rows ``rows[0] .. rows[1]`` and keys ``keys[0] .. keys[1]``."""
        mask = None if self.mask is None else _cut(self.mask, rows, keys)
        bias = None if self.bias is None else _cut(self.bias, rows, keys)
        if self.block_mask:
            blocks = dense_rows(self.block_mask, rows, keys)
            mask = blocks if mask is None else mask & blocks
        return self._replace(mask=mask, bias=bias, block_mask=None)

    def visible_keys(self, rows: tuple[int, int], kv_len: int) -> tuple[int, int]:
        """The keys that some of these rows sees, as far as one offset for the whole batch tells."""
        start, end = 0, kv_len
        if self.q_offset_tensor is None:
            if self.left is not None:
                start = min(max(rows[0] + self.q_offset - self.left, 0), kv_len)
            if self.right is not None:
                end = max(min(rows[1] + self.q_offset + self.right, kv_len), start)
        return start, end


def _cut(operand: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    if operand.shape[2] != 1:
        operand = operand[:, :, rows[0] : rows[1]]
    if operand.shape[3] != 1:
        operand = operand[..., keys[0] : keys[1]]
    return operand


def scores(q: Tensor, k: Tensor, terms: Terms, row: int, key: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(s, tanh under the cap, distance) for query rows ``row ..`` in ``q`` and keys ``key ..`` in ``k``.

    ``s`` is (B, Hq, rows, keys); ``distance = x - j``, broadcastable to it.
    """
    batch, q_heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads * rows, head_dim)
    s = (grouped @ k.transpose(-1, -2)).view(batch, q_heads, rows, keys) * terms.scale
    t = None
    if terms.softcap is not None:
        t = torch.tanh(s / terms.softcap)
        s = t * terms.softcap
    if terms.bias is not None:
        s = s + terms.bias.to(s.dtype)
    offset = terms.q_offset if terms.q_offset_tensor is None else terms.q_offset_tensor.view(-1, 1, 1, 1)
    position = torch.arange(row, row + rows, device=q.device)[:, None] + offset
    distance = position - torch.arange(key, key + keys, device=q.device)
    if terms.alibi_slopes is not None:
        s = s - terms.alibi_slopes.to(s.dtype)[:, :, None, None] * distance.abs().to(s.dtype)
    if terms.mask is not None:
        s = s.masked_fill(~terms.mask, -torch.inf)
    if terms.right is not None:
        s = s.masked_fill(distance < -terms.right, -torch.inf)
    if terms.left is not None:
        s = s.masked_fill(distance > terms.left, -torch.inf)
    return s, t, distance


class PackedSequence(NamedTuple):
    """One of several sequences that lie one behind the other."""

    number: int
    rows: slice
    keys: slice
    slopes: Tensor | None
    q_offset_tensor: Tensor | None
    q_offset: int


def packed_sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None, q_offset_tensor: Tensor | None,
    q_offset: int | None,
) -> Iterator[PackedSequence]:  # fmt: skip
    """Each sequence and what belongs to it. Reads the lengths, so it waits for a GPU."""
    bounds = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
    for index, ((row, row_end), (key, key_end)) in enumerate(bounds):
        one = slice(index, index + 1)
        yield PackedSequence(
            index, slice(row, row_end), slice(key, key_end),
            alibi_slopes if alibi_slopes is None or alibi_slopes.shape[0] == 1 else alibi_slopes[one],
            None if q_offset_tensor is None else q_offset_tensor[one],
            (key_end - key) - (row_end - row) if q_offset is None else q_offset,
        )  # fmt: skip


def _grouped_matmul(p: Tensor, v: Tensor) -> Tensor:
    """p (B, Hq, rows, Lk) @ v (B, Hk, Lk, Dv), each key head serving its group of query heads."""
    batch, q_heads, rows, kv_len = p.shape
    grouped = p.reshape(batch, v.shape[1], q_heads // v.shape[1] * rows, kv_len)
    return (grouped @ v).view(batch, q_heads, rows, v.shape[3])


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, q_offset_tensor: Tensor | None = None,
    seed: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    block_mask: list[Tensor] | None = None, *,
    left: int | None = None, right: int | None = None, q_offset: int | None = 0,
    scale: float, softcap: float | None = None, dropout_p: float = 0.0, first_batch: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, in the dtype of the inputs, with all Lq x Lk scores in memory. Returns (out, lse).

    ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D), ``v`` (B, Hk, Lk, Dv); ``mask`` (bool) and ``bias`` 4-D, broadcastable
    to (B, Hq, Lq, Lk); ``alibi_slopes`` (1 or B, Hq); ``sinks`` (Hq,); ``q_offset_tensor`` (B,) in place of
    ``q_offset``; ``seed`` one int64 element. ``cu_seqlens_q`` and ``cu_seqlens_k`` (sequences + 1,): packed sequences,
    B = 1, each by itself; rows behind the last give 0. ``first_batch`` is the index of batch entry 0 for dropout.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        out, lse = [], []
        for one in packed_sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes, q_offset_tensor, q_offset):
            results = attention(
                q[:, :, one.rows], k[:, :, one.keys], v[:, :, one.keys], None, None, one.slopes, sinks,
                one.q_offset_tensor, seed, left=left, right=right, q_offset=one.q_offset, scale=scale,
                softcap=softcap, dropout_p=dropout_p, first_batch=one.number,
            )  # fmt: skip
            out.append(results[0])
            lse.append(results[1])
        rest = q.shape[2] - sum(x.shape[2] for x in lse)
        out.append(v.new_zeros(*q.shape[:2], rest, v.shape[3]))
        lse.append(lse[0].new_full((*q.shape[:2], rest), -torch.inf))
        return torch.cat(out, 2), torch.cat(lse, 2)
    assert q_offset is not None
    terms = Terms(mask, bias, alibi_slopes, q_offset_tensor, left, right, q_offset, scale, softcap, block_mask)
    terms = terms.cut((0, q.shape[2]), (0, k.shape[2]))
    s, _, _ = scores(q, k, terms, 0, 0)
    sink = None if sinks is None else sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)
    if sink is not None:
        s = torch.cat([s, sink], -1)
    if s.shape[-1] == 0:
        return _grouped_matmul(s, v), s.sum(-1) - torch.inf  # zeros and -inf, on the graph of q, k and v
    maximum = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - maximum.masked_fill(maximum == -torch.inf, 0.0))
    total = e.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    p = (e / total)[..., : k.shape[2]]
    lse = (maximum.masked_fill(empty, 0.0) + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    if dropout_p > 0.0 and seed is not None:
        keep = dropout_keep(seed, dropout_p, p.shape[0], p.shape[1], (0, p.shape[2]), (0, p.shape[3]), first_batch)
        p = torch.where(keep, p * _keep_scale(dropout_p), 0.0)
    return _grouped_matmul(p, v), lse


def _keep_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(q: Tensor, kv_len: int, terms: Terms, share: int = 1) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, keys): blocks of query rows, of a row or at most BLOCK_ELEMENTS / share scores, and the keys they see."""
    batch, q_heads, q_len, _ = q.shape
    first, last = terms.visible_keys((0, 1), kv_len)
    span = kv_len if terms.left is None or terms.right is None else max(last - first, terms.left + terms.right + 1)
    block = max(1, BLOCK_ELEMENTS // share // max(1, batch * q_heads * min(span, kv_len)))
    if span < kv_len:  # a block sees its window and its own length: keep the two alike
        block = min(block, max(span, 64))
    for start in range(0, q_len, block):
        rows = (start, min(start + block, q_len))
        yield rows, terms.visible_keys(rows, kv_len)


def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, q_offset_tensor: Tensor | None, seed: Tensor | None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    block_mask: list[Tensor] | None = None, *,
    left: int | None, right: int | None, q_offset: int | None, scale: float, softcap: float | None, dropout_p: float,
    first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq) block by block; half precision is computed in float32."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for one in packed_sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes, q_offset_tensor, q_offset):
            attention_forward(
                out[:, :, one.rows], lse[:, :, one.rows], q[:, :, one.rows], k[:, :, one.keys], v[:, :, one.keys],
                None, None, one.slopes, sinks, one.q_offset_tensor, seed, left=left, right=right,
                q_offset=one.q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p, first_batch=one.number,
            )  # fmt: skip
        return
    assert q_offset is not None
    dtype = _compute_dtype(q.dtype)
    k, v = k.to(dtype), v.to(dtype)
    all_terms = Terms(mask, bias, alibi_slopes, q_offset_tensor, left, right, q_offset, scale, softcap, block_mask)
    for rows, keys in _blocks(q, k.shape[2], all_terms):
        block, own = slice(*rows), slice(*keys)
        s, _, _ = scores(q[:, :, block].to(dtype), k[:, :, own], all_terms.cut(rows, keys), rows[0], keys[0])
        block_lse = torch.logsumexp(s, -1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        if sinks is not None:
            block_lse = torch.logaddexp(block_lse, sinks.to(dtype)[:, None, None])
        p = s.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0.0)).exp_()
        if dropout_p > 0.0 and seed is not None:
            keep = dropout_keep(seed, dropout_p, s.shape[0], s.shape[1], rows, keys, first_batch)
            p.mul_(keep).mul_(_keep_scale(dropout_p))
        out[:, :, block] = _grouped_matmul(p, v[:, :, own])
        lse[:, :, block] = block_lse.squeeze(-1)


def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, dslopes: Tensor | None, dsinks: Tensor | None,
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    q_offset_tensor: Tensor | None, seed: Tensor | None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, block_mask: list[Tensor] | None = None, *,
    left: int | None, right: int | None, q_offset: int | None, scale: float, softcap: float | None, dropout_p: float,
    first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill the gradients block by block, recomputing the probabilities from ``lse``.

    ``dbias``, ``dslopes`` and ``dsinks`` have the shapes of ``bias``, ``alibi_slopes`` and ``sinks``, or are None where
    they are not wanted; ``dlse`` may be None.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        slopes_sum = None if dslopes is None else torch.zeros_like(dslopes, dtype=_compute_dtype(q.dtype))
        sinks_sum = None if dsinks is None else torch.zeros_like(dsinks, dtype=_compute_dtype(q.dtype))
        for one in packed_sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes, q_offset_tensor, q_offset):
            own_dslopes = None if slopes_sum is None else torch.empty_like(slopes_sum[:1])
            own_dsinks = None if sinks_sum is None else torch.empty_like(sinks_sum)
            attention_backward(
                dq[:, :, one.rows], dk[:, :, one.keys], dv[:, :, one.keys], None, own_dslopes, own_dsinks,
                dout[:, :, one.rows], None if dlse is None else dlse[:, :, one.rows],
                q[:, :, one.rows], k[:, :, one.keys], v[:, :, one.keys], out[:, :, one.rows], lse[:, :, one.rows],
                None, None, one.slopes, sinks, one.q_offset_tensor, seed, left=left, right=right,
                q_offset=one.q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p, first_batch=one.number,
            )  # fmt: skip
            if slopes_sum is not None and own_dslopes is not None:
                slopes_sum[one.number if len(slopes_sum) > 1 else 0] += own_dslopes[0]
            if sinks_sum is not None and own_dsinks is not None:
                sinks_sum += own_dsinks
        if dslopes is not None and slopes_sum is not None:
            dslopes.copy_(slopes_sum)
        if dsinks is not None and sinks_sum is not None:
            dsinks.copy_(sinks_sum)
        return
    assert q_offset is not None
    dtype = _compute_dtype(q.dtype)
    k_, v_ = k.to(dtype), v.to(dtype)
    wanted = {"dk": dk, "dv": dv, "dbias": dbias, "dslopes": dslopes, "dsinks": dsinks}
    sums = {name: torch.zeros_like(t, dtype=dtype) for name, t in wanted.items() if t is not None}
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    all_terms = Terms(mask, bias, alibi_slopes, q_offset_tensor, left, right, q_offset, scale, softcap, block_mask)
    for rows, keys in _blocks(q, kv_len, all_terms):
        block, own = slice(*rows), slice(*keys)
        q_, dout_ = q[:, :, block].to(dtype), dout[:, :, block].to(dtype)
        s, t, distance = scores(q_, k_[:, :, own], all_terms.cut(rows, keys), rows[0], keys[0])
        block_lse = lse[:, :, block, None]
        p = s.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0.0)).exp_()
        dp = _grouped_matmul(dout_, v_[:, :, own].transpose(-1, -2))
        dropped = p
        if dropout_p > 0.0 and seed is not None:
            keep = dropout_keep(seed, dropout_p, batch, q_heads, rows, keys, first_batch).to(dtype)
            keep *= _keep_scale(dropout_p)
            dropped, dp = p * keep, dp * keep
        delta = (dout_ * out[:, :, block].to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, block, None].to(dtype)
        ds = dp.sub_(delta).mul_(p)
        if "dbias" in sums:
            share = _cut(sums["dbias"], rows, keys)
            assert share is not None
            share.add_(ds.sum_to_size(share.shape))
        if "dslopes" in sums:
            sums["dslopes"] -= (ds * distance.abs()).sum((2, 3)).sum_to_size(sums["dslopes"].shape)
        if sinks is not None and "dsinks" in sums:  # a score whose value vector is 0
            sums["dsinks"] -= (torch.exp(sinks.to(dtype)[:, None, None] - block_lse) * delta).sum((0, 2, 3))
        if t is not None:
            ds = ds * (1.0 - t * t)
        grouped = (batch, kv_heads, q_heads // kv_heads * (rows[1] - rows[0]))
        span = keys[1] - keys[0]
        sums["dv"][:, :, own] += dropped.reshape(*grouped, span).transpose(-1, -2) @ dout_.reshape(*grouped, v_dim)
        sums["dk"][:, :, own] += ds.reshape(*grouped, span).transpose(-1, -2) @ q_.reshape(*grouped, head_dim) * scale
        dq[:, :, block] = _grouped_matmul(ds, k_[:, :, own]) * scale
    for name, total in sums.items():
        wanted[name].copy_(total)


def attention_double_backward(
    tout: Tensor, tlse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dbias: Tensor | None,
    dslopes: Tensor | None, dsinks: Tensor | None,
    tq: Tensor, tk: Tensor, tv: Tensor, tbias: Tensor | None, tslopes: Tensor | None, tsinks: Tensor | None,
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    q_offset_tensor: Tensor | None, seed: Tensor | None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, block_mask: list[Tensor] | None = None, *,
    left: int | None, right: int | None, q_offset: int | None, scale: float, softcap: float | None, dropout_p: float,
    first_batch: int = 0,
) -> None:  # fmt: skip
    """Fill the derivative along a direction, and the gradient of its product with (``dout``, ``dlse``), block by block.

    ``tq``, ``tk``, ``tv``, ``tbias``, ``tslopes`` and ``tsinks`` are the direction. ``tout`` and ``tlse`` become the
    derivatives of out and lse along it; ``dq`` and the others the gradient of ``<dout, tout> + <dlse, tlse>``, which
    is the Hessian of ``<dout, out> + <dlse, lse>`` times the direction. The direction is what comes into a second
    backward pass; the results are then what leaves it for dout, dlse, q, k, ...; without ``dout`` only ``tout`` and
    ``tlse`` are filled.

    With ``y`` the direction's scores, ``lse' = sum_j p y`` and ``p' = p (y - lse')``::

        out' = p' v + p tv
        w    = y * (dout v^T) + dout tv^T,   delta = sum_j p (dout v^T) - dlse
        d/ds = p (w - sum_j p w - lse' (dout v^T - sum_j p (dout v^T)) - delta (y - lse'))
        d/dy = p (dout v^T - delta)
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        dtype = _compute_dtype(q.dtype)
        slopes_sum = None if dslopes is None else torch.zeros_like(dslopes, dtype=dtype)
        sinks_sum = None if dsinks is None else torch.zeros_like(dsinks, dtype=dtype)
        for one in packed_sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes, q_offset_tensor, q_offset):
            own_dslopes = None if slopes_sum is None else torch.empty_like(slopes_sum[:1])
            own_dsinks = None if sinks_sum is None else torch.empty_like(sinks_sum)
            own_tslopes = tslopes
            if tslopes is not None and len(tslopes) > 1:
                own_tslopes = tslopes[one.number : one.number + 1]
            row_tensors = (None if t is None else t[:, :, one.rows] for t in (tout, tlse, dq, tq, dout, dlse, q))
            key_tensors = (None if t is None else t[:, :, one.keys] for t in (dk, dv, tk, tv, k, v))
            tout_, tlse_, dq_, tq_, dout_, dlse_, q_ = row_tensors
            dk_, dv_, tk_, tv_, k_, v_ = key_tensors
            assert tout_ is not None and tlse_ is not None and tq_ is not None and q_ is not None
            assert tk_ is not None and tv_ is not None and k_ is not None and v_ is not None
            attention_double_backward(
                tout_, tlse_, dq_, dk_, dv_, None, own_dslopes, own_dsinks,
                tq_, tk_, tv_, None, own_tslopes, tsinks, dout_, dlse_, q_, k_, v_,
                None, None, one.slopes, sinks, one.q_offset_tensor, seed, left=left, right=right,
                q_offset=one.q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p, first_batch=one.number,
            )  # fmt: skip
            if slopes_sum is not None and own_dslopes is not None:
                slopes_sum[one.number if len(slopes_sum) > 1 else 0] += own_dslopes[0]
            if sinks_sum is not None and own_dsinks is not None:
                sinks_sum += own_dsinks
        if dslopes is not None and slopes_sum is not None:
            dslopes.copy_(slopes_sum)
        if dsinks is not None and sinks_sum is not None:
            dsinks.copy_(sinks_sum)
        return
    assert q_offset is not None
    dtype = _compute_dtype(q.dtype)
    k_, v_, tk_, tv_ = (x.to(dtype) for x in (k, v, tk, tv))
    wanted = {"dk": dk, "dv": dv, "dbias": dbias, "dslopes": dslopes, "dsinks": dsinks}
    sums = {name: torch.zeros_like(x, dtype=dtype) for name, x in wanted.items() if x is not None}
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    all_terms = Terms(mask, bias, alibi_slopes, q_offset_tensor, left, right, q_offset, scale, softcap, block_mask)
    for rows, keys in _blocks(q, kv_len, all_terms, share=2):  # holds more of their size than a backward pass
        block, own = slice(*rows), slice(*keys)
        q_, tq_ = q[:, :, block].to(dtype), tq[:, :, block].to(dtype)
        s, t, distance = scores(q_, k_[:, :, own], all_terms.cut(rows, keys), rows[0], keys[0])
        # Probabilities that sum to 1, as those from a stored lse do only nearly: here large terms cancel.
        sink = None if sinks is None else sinks.to(dtype)[:, None, None]
        maximum = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        maximum = maximum if sink is None else torch.maximum(maximum, sink)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
        p = s.sub_(maximum).exp_()
        total = p.sum(-1, keepdim=True)
        p_sink = None if sink is None else torch.exp(sink - maximum)  # a score whose value vector is 0
        total = total if p_sink is None else total + p_sink
        total = total.masked_fill(total == 0.0, 1.0)
        p /= total
        p_sink = None if p_sink is None else p_sink / total
        slope = None if t is None else 1.0 - t * t  # of the capped scores
        product = _grouped_matmul(tq_, k_[:, :, own].mT).add_(_grouped_matmul(q_, tk_[:, :, own].mT)).mul_(scale)
        y = product if slope is None else product * slope
        if tbias is not None:
            y = y + _cut(tbias, rows, keys).to(dtype)
        if tslopes is not None:
            y = y - tslopes.to(dtype)[:, :, None, None] * distance.abs().to(dtype)
        block_tlse = (p * y).sum(-1, keepdim=True)
        tsink = block_tlse.new_zeros(()) if tsinks is None else tsinks.to(dtype)[:, None, None]
        if p_sink is not None:
            block_tlse = block_tlse + p_sink * tsink
        keep = None
        if dropout_p > 0.0 and seed is not None:
            keep = dropout_keep(seed, dropout_p, batch, q_heads, rows, keys, first_batch).to(dtype)
            keep *= _keep_scale(dropout_p)
        tp = p * (y - block_tlse)
        tp, dropped = (tp, p) if keep is None else (tp * keep, p * keep)
        tout[:, :, block] = _grouped_matmul(tp, v_[:, :, own]) + _grouped_matmul(dropped, tv_[:, :, own])
        tlse[:, :, block] = block_tlse.squeeze(-1)
        if dout is None:
            continue
        dout_ = dout[:, :, block].to(dtype)
        grouped = (batch, kv_heads, q_heads // kv_heads * (rows[1] - rows[0]))
        span = keys[1] - keys[0]
        if "dv" in sums:
            sums["dv"][:, :, own] += tp.reshape(*grouped, span).mT @ dout_.reshape(*grouped, v_dim)
        del tp, dropped
        dp = _grouped_matmul(dout_, v_[:, :, own].mT)
        w = _grouped_matmul(dout_, tv_[:, :, own].mT)
        if keep is not None:
            dp, w = dp.mul_(keep), w.mul_(keep)
        w.addcmul_(dp, y)
        dp_sum, w_sum = (p * dp).sum(-1, keepdim=True), (p * w).sum(-1, keepdim=True)
        delta = dp_sum if dlse is None else dp_sum - dlse[:, :, block, None].to(dtype)
        dy = p * (dp - delta)
        ds = w.sub_(w_sum).sub_((dp - dp_sum).mul_(block_tlse)).sub_((y - block_tlse).mul_(delta)).mul_(p)
        del w, dp, y
        if "dbias" in sums:
            share = _cut(sums["dbias"], rows, keys)
            share.add_(ds.sum_to_size(share.shape))
        if "dslopes" in sums:
            sums["dslopes"] -= (ds * distance.abs()).sum((2, 3)).sum_to_size(sums["dslopes"].shape)
        if p_sink is not None and "dsinks" in sums:
            sums["dsinks"] += (p_sink * (block_tlse * dp_sum - w_sum - delta * (tsink - block_tlse))).sum((0, 2, 3))
        if t is not None and slope is not None and softcap is not None:
            dy = dy * slope
            ds = ds * slope - 2.0 / softcap * t * product * dy
        ds_, dy_ = ds.reshape(*grouped, span).mT, dy.reshape(*grouped, span).mT
        if "dk" in sums:
            q_share, tq_share = (x.reshape(*grouped, head_dim) for x in (q_, tq_))
            sums["dk"][:, :, own] += (ds_ @ q_share + dy_ @ tq_share) * scale
        if dq is not None:
            dq[:, :, block] = (_grouped_matmul(ds, k_[:, :, own]) + _grouped_matmul(dy, tk_[:, :, own])) * scale
    for name, total in sums.items():
        target = wanted[name]
        assert target is not None
        target.copy_(total)


def cache_capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Positions that each batch entry has in a cache (B, Lmax, H, D) or, with a block table, (pages, page, H, D)."""
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]


def cached(cache: Tensor, block_table: Tensor | None, entries: slice, length: int) -> Tensor:
    """The first ``length`` positions (B, H, length, D) of some batch entries; of one, if there is a block table."""
    if block_table is None:
        return cache[entries, :length].transpose(1, 2)
    pages = block_table[entries.start, : -(-length // cache.shape[1])].long().clamp(0, max(cache.shape[0] - 1, 0))
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None]


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None
) -> None:
    """Write ``k`` and ``v`` (B, H, L, D) into the caches from position ``lens[b]`` on, where the cache has a place."""
    if block_table is None and lens.device.type == "cpu" and len(starts := set(lens.tolist())) == 1:
        start = starts.pop()
        if 0 <= start <= k_cache.shape[1] - k.shape[2]:  # all at one place: a copy takes a fifth of the time
            k_cache[:, start : start + k.shape[2]] = k.transpose(1, 2)
            v_cache[:, start : start + k.shape[2]] = v.transpose(1, 2)
            return
    position = lens.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    inside = (position >= 0) & (position < cache_capacity(k_cache, block_table))
    if block_table is None:
        page, slot = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(position), position
    else:
        size = k_cache.shape[1]
        page = block_table.long().gather(1, position.masked_fill(~inside, 0) // size)
        slot = position % size
        inside &= (page >= 0) & (page < k_cache.shape[0])
    at = page[inside], slot[inside]
    k_cache[at] = k.transpose(1, 2)[inside]
    v_cache[at] = v.transpose(1, 2)[inside]


def attention_kvcache(
    out: Tensor, lse: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, lens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, *, added: int, length: int | None, left: int | None,
    right: int | None, scale: float, softcap: float | None, num_splits: int | None,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse``: `attention_forward` over the ``lens[b] + added`` cached keys of each batch entry.

    All of them at once where they have the same ``length``, known to the host, and no block table. Otherwise the
    lengths are read on the host, which on a GPU waits for them. ``num_splits`` means nothing here.
    """
    capacity = cache_capacity(k_cache, block_table)
    batch, q_len = q.shape[0], q.shape[2]
    if length is not None and block_table is None:
        parts = [(slice(0, batch), min(max(length, 0), capacity))]
    else:
        lengths = (lens.long() + added).clamp(0, capacity).tolist()
        parts = [(slice(b, b + 1), n) for b, n in enumerate(lengths)]
    for entries, n in parts:
        slopes = alibi_slopes
        if slopes is not None and slopes.shape[0] != 1:
            slopes = slopes[entries]
        k, v = (cached(cache, block_table, entries, n) for cache in (k_cache, v_cache))
        attention_forward(
            out[entries], lse[entries], q[entries], k, v, None, None, slopes, sinks, None, None,
            left=left, right=right, q_offset=n - q_len, scale=scale, softcap=softcap, dropout_p=0.0,
        )  # fmt: skip
