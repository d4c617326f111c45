"""Attention in eager PyTorch: the specification that every other backend is held to. No Triton import.

For query row ``i`` at absolute position ``i + q_offset`` and key ``j``::

    s[i, j] = scale * <q_i, k_j> + bias[i, j]        -inf where not allowed(i, j)
    p       = exp(s - lse),  lse = log(sum_j exp(s))
    o_i     = sum_j dropout(p)[i, j] v_j

``allowed`` is the AND of ``mask[i, j]`` and, if causal, ``j <= i + q_offset``. A row with nothing allowed gives output
0, lse -inf and gradients 0.

`attention` is that definition written down, differentiable to any order. `attention_forward` and `attention_backward`
compute the same in blocks of queries, with memory O(block x Lk); they fill buffers, as the fused kernels do.
"""

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

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
    seed: Tensor, dropout_p: float, batch: int, heads: int, start: int, end: int, kv_len: int
) -> Tensor:
    """Which probabilities dropout keeps: bool (batch, heads, end - start, kv_len) for query rows ``start .. end``.

    A function of (seed, b, h, i, j) alone: Philox gives each row two keys, a full-avalanche 32-bit mix keyed by them
    gives each element its bits, and the upper 24 of these, as a fraction, are compared with ``dropout_p``.
    ``seed`` is one int64 element.
    """

    def index(first: int, last: int, dim: int) -> Tensor:
        return torch.arange(first, last, device=seed.device).view([-1 if d == dim else 1 for d in range(3)])

    k0, k1 = _philox_row_keys(int(seed), index(0, batch, 0), index(0, heads, 1), index(start, end, 2))
    x = torch.arange(kv_len, device=seed.device, dtype=torch.int32) * _int32(0x9E3779B1) ^ k0[..., None]

    def xor_shift(bits: int) -> None:  # int32 shifts bring in the sign: mask it off
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))

    xor_shift(16)
    x.mul_(_int32(0x7FEB352D))
    xor_shift(15)
    x.bitwise_xor_(k1[..., None]).mul_(_int32(0x846CA68B))
    xor_shift(16)
    fraction = x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return fraction >= math.ceil(struct.unpack("f", struct.pack("f", dropout_p))[0] * (1 << 24))


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, q_offset_tensor: Tensor | None,
    causal: bool, q_offset: int, scale: float, start: int,
) -> Tensor:  # fmt: skip
    """s (B, Hq, rows, Lk) for the query rows ``start .. start + rows`` in ``q``; mask and bias cut to those rows."""
    batch, q_heads, rows, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads * rows, head_dim)
    s = (grouped @ k.transpose(-1, -2)).view(batch, q_heads, rows, kv_len) * scale
    if bias is not None:
        s = s + bias.to(s.dtype)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if causal:
        offset = q_offset if q_offset_tensor is None else q_offset_tensor.view(-1, 1, 1, 1)
        position = torch.arange(start, start + rows, device=q.device)[:, None] + offset
        s = s.masked_fill(torch.arange(kv_len, device=q.device) > position, -torch.inf)
    return s


def _grouped_matmul(p: Tensor, v: Tensor) -> Tensor:
    """p (B, Hq, rows, Lk) @ v (B, Hk, Lk, Dv), each key head serving its group of query heads."""
    batch, q_heads, rows, kv_len = p.shape
    grouped = p.reshape(batch, v.shape[1], q_heads // v.shape[1] * rows, kv_len)
    return (grouped @ v).view(batch, q_heads, rows, v.shape[3])


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
    q_offset_tensor: Tensor | None = None, seed: Tensor | None = None, *,
    causal: bool = False, q_offset: int = 0, scale: float, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, in the dtype of the inputs, with all Lq x Lk scores in memory. Returns (out, lse).

    ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D), ``v`` (B, Hk, Lk, Dv); ``mask`` (bool) and ``bias`` 4-D, broadcastable
    to (B, Hq, Lq, Lk); ``q_offset_tensor`` (B,) in place of ``q_offset``; ``seed`` one int64 element.
    """
    s = _scores(q, k, mask, bias, q_offset_tensor, causal, q_offset, scale, 0)
    if k.shape[2] == 0:
        return _grouped_matmul(s, v), s.sum(-1) - torch.inf  # zeros and -inf, on the graph of q, k and v
    maximum = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - maximum.masked_fill(maximum == -torch.inf, 0.0))
    total = e.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    p = e / total
    lse = (maximum.masked_fill(empty, 0.0) + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    if dropout_p > 0.0 and seed is not None:
        keep = dropout_keep(seed, dropout_p, s.shape[0], s.shape[1], 0, s.shape[2], s.shape[3])
        p = torch.where(keep, p * _keep_scale(dropout_p), 0.0)
    return _grouped_matmul(p, v), lse


def _keep_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _query_blocks(q: Tensor, kv_len: int) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks of query rows whose scores hold at most BLOCK_ELEMENTS values, or one row."""
    batch, q_heads, q_len, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, batch * q_heads * kv_len))
    for start in range(0, q_len, rows):
        yield start, min(start + rows, q_len)


def _rows(operand: Tensor | None, start: int, end: int) -> Tensor | None:
    """The part of a mask or bias that concerns these query rows."""
    return operand if operand is None or operand.shape[2] == 1 else operand[:, :, start:end]


def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    q_offset_tensor: Tensor | None, seed: Tensor | None, *,
    causal: bool, q_offset: int, scale: float, dropout_p: float,
) -> None:  # fmt: skip
    """Fill ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq) block by block; half precision is computed in float32."""
    dtype = _compute_dtype(q.dtype)
    k, v = k.to(dtype), v.to(dtype)
    if k.shape[2] == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    for start, end in _query_blocks(q, k.shape[2]):
        s = _scores(
            q[:, :, start:end].to(dtype), k, _rows(mask, start, end), _rows(bias, start, end),
            q_offset_tensor, causal, q_offset, scale, start,
        )  # fmt: skip
        block_lse = torch.logsumexp(s, -1, keepdim=True)
        p = s.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0.0)).exp_()
        if dropout_p > 0.0 and seed is not None:
            keep = dropout_keep(seed, dropout_p, s.shape[0], s.shape[1], start, end, s.shape[3])
            p.mul_(keep).mul_(_keep_scale(dropout_p))
        out[:, :, start:end] = _grouped_matmul(p, v)
        lse[:, :, start:end] = block_lse.squeeze(-1)


def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, dout: Tensor, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, bias: Tensor | None,
    q_offset_tensor: Tensor | None, seed: Tensor | None, *,
    causal: bool, q_offset: int, scale: float, dropout_p: float,
) -> None:  # fmt: skip
    """Fill the gradients block by block, recomputing the probabilities from ``lse``.

    ``dbias`` has the shape of ``bias``, or is None where it is not wanted; ``dlse`` may be None.
    """
    dtype = _compute_dtype(q.dtype)
    k_, v_ = k.to(dtype), v.to(dtype)
    dk_, dv_ = torch.zeros_like(k_), torch.zeros_like(v_)
    dbias_ = None if dbias is None else torch.zeros_like(dbias, dtype=dtype)
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    if kv_len == 0:
        dq.zero_()
    for start, end in _query_blocks(q, kv_len) if kv_len else ():
        q_, dout_ = q[:, :, start:end].to(dtype), dout[:, :, start:end].to(dtype)
        s = _scores(
            q_, k_, _rows(mask, start, end), _rows(bias, start, end), q_offset_tensor, causal, q_offset, scale, start
        )
        block_lse = lse[:, :, start:end, None]
        p = s.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0.0)).exp_()
        dp = _grouped_matmul(dout_, v_.transpose(-1, -2))
        dropped = p
        if dropout_p > 0.0 and seed is not None:
            keep = dropout_keep(seed, dropout_p, batch, q_heads, start, end, kv_len) * _keep_scale(dropout_p)
            dropped, dp = p * keep, dp * keep
        delta = (dout_ * out[:, :, start:end].to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, start:end, None].to(dtype)
        ds = dp.sub_(delta).mul_(p)
        grouped = (batch, kv_heads, q_heads // kv_heads * (end - start))
        dv_ += dropped.reshape(*grouped, kv_len).transpose(-1, -2) @ dout_.reshape(*grouped, v_dim)
        dk_ += ds.reshape(*grouped, kv_len).transpose(-1, -2) @ q_.reshape(*grouped, head_dim) * scale
        dq[:, :, start:end] = _grouped_matmul(ds, k_) * scale
        if dbias_ is not None:
            target = dbias_ if dbias_.shape[2] == 1 else dbias_[:, :, start:end]
            target += ds.sum_to_size(target.shape)
    dk.copy_(dk_)
    dv.copy_(dv_)
    if dbias is not None and dbias_ is not None:
        dbias.copy_(dbias_)
