"""The strategy "ulysses": ranks exchange tokens for heads, so that each attends with some heads over all tokens.

Source: Jacobs et al., DeepSpeed Ulysses, 2023 (arXiv:2309.14509). Here a key head goes to every rank that has one of
its query heads. So there may be fewer key heads than ranks, and the number of heads need not be a multiple of the
number of ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.distributed.blocks import of_heads
from fastattn.distributed.comm import Message, Peers
from fastattn.distributed.layout import Piece, length_of, pieces, placed
from fastattn.functional.sharded import heads_of, key_heads
from fastattn.spec import AttentionSpec


class Swap(NamedTuple):
    """The exchange of one tensor (B, heads, tokens, width): the heads that each rank gets and the tokens that it
    holds."""

    heads: list[slice]
    tokens: list[list[Piece]]

    @property
    def total(self) -> int:
        return sum(map(length_of, self.tokens))


def query_heads(heads: int, ranks: int) -> list[slice]:
    """The query heads of each rank; if they do not divide evenly, the first ranks have one more."""
    return [run.positions for (run,) in pieces("contiguous", heads, ranks)]


Attend = Callable[[AttentionSpec, int], tuple[Tensor, Tensor | None]]
"""Computes (out, lse) from a call with some of the heads and the number of the first one."""


def run(
    peers: Peers, rows: list[list[Piece]], keys: list[list[Piece]], spec: AttentionSpec, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    """(out, lse if the spec asks for it) of this rank's rows, differentiable.

    The spec's bias and mask are for its rows and all keys, its block mask is the whole's.
    ``rows`` and ``keys`` say where the tokens of each of these ranks lie in the tensors that ``attend`` gets.
    """
    q_heads = spec.q.shape[1]
    group = q_heads // spec.k.shape[1]
    own = query_heads(q_heads, peers.size)
    shared = [key_heads(heads, group) for heads in own]
    tensors, swaps = [spec.q, spec.k, spec.v], [Swap(own, rows), Swap(shared, keys), Swap(shared, keys)]
    for scores in (spec.bias, spec.mask):
        if scores is not None:
            wide = scores.expand(-1, q_heads, spec.q.shape[2], -1)
            tensors.append(wide if wide.dtype != torch.bool else wide.to(torch.uint8))
            swaps.append(Swap(own, rows))
    q, k, v, *rest = _Swap.apply(peers, swaps, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    bias = rest.pop(0) if spec.bias is not None else None
    mask = rest.pop(0).bool() if spec.mask is not None else None
    mine = own[peers.rank]
    if mine.stop == mine.start:  # nothing to compute, but every rank must run this in the backward pass
        none = (x[..., :0] for x in (spec.alibi_slopes, spec.sinks) if x is not None)  # their gradients are 0 here
        lse = q.sum(-1) + sum(x.sum() for x in (k, v, bias, *none) if x is not None)
        out = lse[..., None].expand(*q.shape[:3], v.shape[3]).to(q.dtype)
        lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    else:
        k, v = (heads_of(x, mine, group, shared[peers.rank].start) for x in (k, v))
        slopes, sinks = spec.alibi_slopes, spec.sinks
        local = spec._replace(
            q=q, k=k, v=v, bias=bias, mask=mask,
            alibi_slopes=None if slopes is None else slopes[:, mine], sinks=None if sinks is None else sinks[mine],
            block_mask=None if spec.block_mask is None else of_heads(spec.block_mask, mine),
        )  # fmt: skip
        out, lse = attend(local, mine.start)
    if not spec.return_lse:
        return _SwapBack.apply(peers, Swap(own, rows), out)[0], None  # pyright: ignore[reportOptionalSubscript]
    assert lse is not None
    out, lse = _SwapBack.apply(peers, Swap(own, rows), out, lse[..., None])  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse[..., 0]


def _to_heads(peers: Peers, swaps: list[Swap], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Exchange some tokens of all heads for all tokens of some heads."""
    sends, receives, arrivals, results = [], [], [], []
    for tag, (swap, x) in enumerate(zip(swaps, tensors, strict=True)):
        mine, batch, width = swap.heads[peers.rank], x.shape[0], x.shape[3]
        result = x.new_empty((batch, mine.stop - mine.start, swap.total, width))
        results.append(result)
        for rank in range(peers.size):
            part = x[:, swap.heads[rank]].contiguous()
            shape = (batch, mine.stop - mine.start, length_of(swap.tokens[rank]), width)
            if rank == peers.rank:
                arrivals.append((result, swap.tokens[rank], part))
                continue
            coming = x.new_empty(shape)
            arrivals.append((result, swap.tokens[rank], coming))
            sends += [Message(part, rank, tag)] if part.numel() else []
            receives += [Message(coming, rank, tag)] if coming.numel() else []
    peers.exchange(sends, receives)
    for result, held, coming in arrivals:
        for where, piece in placed(held):
            result[:, :, piece.positions] = coming[:, :, where]
    return results


def _to_tokens(peers: Peers, swaps: list[Swap], heads: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """The reverse exchange. If several ranks hold a head, their parts add up in the order of the ranks."""
    sends, receives, arrivals, results = [], [], [], []
    for tag, (swap, count, x) in enumerate(zip(swaps, heads, tensors, strict=True)):
        batch, width = x.shape[0], x.shape[3]
        own_length = length_of(swap.tokens[peers.rank])
        dtype = torch.promote_types(x.dtype, torch.float32)
        result = x.new_zeros((batch, count, own_length, width), dtype=dtype)
        results.append((result, x.dtype))
        for rank in range(peers.size):
            places = [x[:, :, piece.positions] for piece in swap.tokens[rank]]
            part = torch.cat(places, 2).contiguous()
            there = swap.heads[rank]
            if rank == peers.rank:
                arrivals.append((result, there, part))
                continue
            coming = x.new_empty((batch, there.stop - there.start, own_length, width))
            arrivals.append((result, there, coming))
            sends += [Message(part, rank, tag)] if part.numel() else []
            receives += [Message(coming, rank, tag)] if coming.numel() else []
    peers.exchange(sends, receives)
    for result, there, coming in arrivals:
        result[:, there] += coming
    return [result.to(dtype) for result, dtype in results]


class _Swap(torch.autograd.Function):
    """`_to_heads` in one exchange for all tensors, so that every rank exchanges the gradients in the same order."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, swaps: list[Swap], *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.peers, ctx.swaps, ctx.heads = peers, swaps, [x.shape[1] for x in tensors]
        ctx.set_materialize_grads(True)
        return tuple(_to_heads(peers, swaps, tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _peers, _swaps, *needed = ctx.needs_input_grad
        wanted = [i for i, need in enumerate(needed) if need]
        found = _to_tokens(
            ctx.peers, [ctx.swaps[i] for i in wanted], [ctx.heads[i] for i in wanted], [gradients[i] for i in wanted]
        )
        results: list[Tensor | None] = [None] * len(gradients)
        for i, gradient in zip(wanted, found, strict=True):
            results[i] = gradient
        return None, None, *results


class _SwapBack(torch.autograd.Function):
    """`_to_tokens` of out and lse, whose heads are on one rank each."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.peers, ctx.swap = peers, swap
        count = swap.heads[-1].stop
        return tuple(_to_tokens(peers, [swap] * len(tensors), [count] * len(tensors), list(tensors)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *_to_heads(ctx.peers, [ctx.swap] * len(gradients), gradients)
