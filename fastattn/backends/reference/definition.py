"""The definition of the operator: the specification that every backend is held to.

For query row ``i`` at absolute position ``x = i + q_offset`` and key ``j``::

    s[i, j] = cap(scale * <q_i, k_j>) + bias[i, j] - alibi_slope * |x - j|      -inf where not allowed(i, j)
    p       = exp(s - lse),  lse = log(sum_j exp(s) + exp(sink))
    o_i     = sum_j dropout(p)[i, j] v_j

``cap(s) = softcap * tanh(s / softcap)``, and each term only where it is asked for. ``allowed`` is the AND of
``mask[i, j]``, ``j >= kv_start`` and ``x - left <= j <= x + right``; causal is right = 0. A row with nothing allowed,
and no sink, gives output 0, lse -inf and gradients 0.
"""

import torch
from torch import Tensor

from fastattn.backends.reference.dropout import dropout_keep, keep_scale
from fastattn.backends.reference.packed import packed_sequences
from fastattn.block_mask import dense_rows
from fastattn.spec.operands import Operands, Options


def attention(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options, first_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the dtype of the inputs, with all Lq x Lk scores in memory; differentiable to any order.

    ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D), ``v`` (B, Hk, Lk, Dv). ``first_batch`` is the index of batch entry 0 for
    dropout.
    """
    if operands.cu_seqlens_q is not None:
        return _attention_packed(q, k, v, operands, options)
    s, _, _ = scores(q, k, cut(operands, (0, q.shape[2]), (0, k.shape[2])), options, 0, 0)
    if operands.sinks is not None:  # the sink is one more score, with a value vector of 0
        s = torch.cat([s, operands.sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)], -1)
    if s.shape[-1] == 0:
        return grouped_matmul(s, v), s.sum(-1) - torch.inf  # zeros and -inf, on the graph of q, k and v
    maximum = s.detach().amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    e = torch.exp(s - maximum)
    total = e.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    p = (e / total)[..., : k.shape[2]]
    lse = (maximum + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    if operands.seed is not None:
        batch, heads, rows, keys = p.shape
        keep = dropout_keep(operands.seed, options.dropout_p, batch, heads, (0, rows), (0, keys), first_batch)
        p = torch.where(keep, p * keep_scale(options.dropout_p), 0.0)
    return grouped_matmul(p, v), lse


def scores(
    q: Tensor, k: Tensor, operands: Operands, options: Options, row: int, key: int, nearest: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(s, tanh under the cap, distance) for query rows ``row ..`` in ``q`` and keys ``key ..`` in ``k``.

    ``s`` is (B, Hq, rows, keys), from operands that `cut` has cut to it; ``distance = x - j``, broadcastable to it.
    With ``nearest``, ALiBi counts distances from there: that shifts a whole row by a constant, which the softmax
    ignores.
    """
    s = grouped_matmul(q, k.mT) * options.scale
    tanh = None
    if options.softcap is not None:
        tanh = torch.tanh(s / options.softcap)
        s = tanh * options.softcap
    if operands.bias is not None:
        s = s + operands.bias.to(s.dtype)
    keys = torch.arange(key, key + k.shape[2], device=q.device)
    distance = positions(row, q.shape[2], operands, options, q.device) - keys
    if operands.alibi_slopes is not None:
        far = distance.abs() if nearest is None else distance.abs() - nearest
        s = s - operands.alibi_slopes.to(s.dtype)[:, :, None, None] * far.to(s.dtype)
    if operands.mask is not None:
        s = s.masked_fill(~operands.mask, -torch.inf)
    if operands.kv_start is not None:
        s = s.masked_fill(keys < operands.kv_start.view(-1, 1, 1, 1), -torch.inf)
    if options.right is not None:
        s = s.masked_fill(distance < -options.right, -torch.inf)
    if options.left is not None:
        s = s.masked_fill(distance > options.left, -torch.inf)
    return s, tanh, distance


def positions(row: int, rows: int, operands: Operands, options: Options, device: torch.device) -> Tensor:
    """Absolute positions of query rows ``row .. row + rows``: (rows, 1), or (B, 1, rows, 1) for offsets per entry."""
    offset = options.q_offset
    if operands.q_offset_tensor is not None:
        offset = operands.q_offset_tensor.view(-1, 1, 1, 1)
    assert offset is not None  # only packed sequences have None, and each of them brings its own
    return torch.arange(row, row + rows, device=device)[:, None] + offset


def grouped_matmul(p: Tensor, v: Tensor) -> Tensor:
    """p (B, Hq, rows, n) @ v (B, Hk, n, m): each key head serves its group of query heads."""
    batch, q_heads, rows, n = p.shape
    grouped = p.reshape(batch, v.shape[1], q_heads // v.shape[1] * rows, n)
    return (grouped @ v).view(batch, q_heads, rows, v.shape[3])


def cut(operands: Operands, rows: tuple[int, int], keys: tuple[int, int]) -> Operands:
    """The same operands for query rows ``rows[0] .. rows[1]`` and keys ``keys[0] .. keys[1]``, block mask as a mask."""
    mask = None if operands.mask is None else cut_scores(operands.mask, rows, keys)
    bias = None if operands.bias is None else cut_scores(operands.bias, rows, keys)
    if operands.block_mask:
        blocks = dense_rows(operands.block_mask, rows, keys)
        mask = blocks if mask is None else mask & blocks
    return operands._replace(mask=mask, bias=bias, block_mask=[])


def cut_scores(x: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """A 4-D tensor that broadcasts to the scores, for some rows and keys."""
    if x.shape[2] != 1:
        x = x[:, :, rows[0] : rows[1]]
    if x.shape[3] != 1:
        x = x[..., keys[0] : keys[1]]
    return x


def _attention_packed(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each sequence by itself; rows after the last give 0."""
    out, lse = [], []
    for one in packed_sequences(operands, options):
        results = attention(
            q[:, :, one.rows], k[:, :, one.keys], v[:, :, one.keys], one.operands, one.options, one.number
        )
        out.append(results[0])
        lse.append(results[1])
    rest = q.shape[2] - sum(x.shape[2] for x in lse)
    out.append(v.new_zeros(*q.shape[:2], rest, v.shape[3]))
    lse.append(lse[0].new_full((*q.shape[:2], rest), -torch.inf))
    return torch.cat(out, 2), torch.cat(lse, 2)
