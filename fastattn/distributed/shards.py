"""Cut a batch among the ranks of a mesh dimension, and put it together again."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn.distributed.comm import Ranks
from fastattn.distributed.layout import Balance, Piece, check_balance, length_of, pieces, placed
from fastattn.nn.model import IGNORED, next_labels


def shard(
    x: Tensor, *, mesh: DeviceMesh, dim: int, balance: Balance = "contiguous", cu_seqlens: Tensor | None = None
) -> Tensor:
    """Cut this rank's part from ``x``, which every rank has: tokens, labels, rows of masks. Differentiable; no
    messages.

    Args:
        x: any tensor.
        mesh: as in `context_parallel_attention`.
        dim: the dimension of the tokens.
        balance: as in `context_parallel_attention`; lengths need not divide by ranks.
        cu_seqlens: where documents begin, as in `context_parallel_attention`; only ``"documents"`` reads it.

    Returns:
        A copy, of x's shape except in ``dim``.

    Raises:
        ValueError: ``x`` has no such dimension.
    """
    dim = checked_dim(dim, x)
    peers = Ranks(mesh)
    own = cut_of(balance, x.shape[dim], peers.size, cu_seqlens)[peers.rank]
    index = torch.cat([torch.arange(x.shape[dim], device=x.device)[piece.positions] for piece in own])
    return x.index_select(dim, index)


def checked_dim(dim: int, x: Tensor) -> int:
    """``dim`` counted from the first dimension of ``x``."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected a dimension of x, {-x.ndim} to {x.ndim - 1}, got {dim}")
    return dim % x.ndim


def cut_of(balance: Balance, total: int, ranks: int, cu_seqlens: Tensor | None) -> list[list[Piece]]:
    """The pieces of each rank; ``cu_seqlens`` are required if the pieces depend on them."""
    check_balance(balance)
    if balance != "documents":
        return pieces(balance, total, ranks)
    if cu_seqlens is None:
        raise ValueError("cu_seqlens: expected a Tensor with balance='documents', got None")
    return pieces(balance, total, ranks, tuple(cu_seqlens.tolist()))


def positions(
    length: int, *, mesh: DeviceMesh, balance: Balance = "contiguous", cu_seqlens: Tensor | None = None
) -> Tensor:
    """The position of each of this rank's tokens in the whole, int64 (own tokens,); for rotary embeddings and labels.

    Args:
        length: of the whole.
        mesh, balance, cu_seqlens: as in `shard`.
    """
    whole = torch.arange(length, device=mesh.device_type)
    return shard(whole, mesh=mesh, dim=0, balance=balance, cu_seqlens=cu_seqlens)


@torch.no_grad()
def unshard(
    x: Tensor, *, mesh: DeviceMesh, dim: int, balance: Balance = "contiguous", cu_seqlens: Tensor | None = None,
    timeout: float | None = None,
) -> Tensor:  # fmt: skip
    """Assemble the whole from every rank's part, on every rank: the inverse of `shard`. Without gradient.

    Args:
        x: this rank's part.
        mesh, dim, balance, cu_seqlens: as in `shard`.
        timeout: seconds to wait for a message; None is the process group's own.

    Raises:
        ValueError: ``x`` has no dimension ``dim``; or the parts have other lengths than `shard` cuts, and every rank
            raises.
        RuntimeError: another rank raised, ended or made another call; the text names it.
    """
    dim = checked_dim(dim, x)
    peers = Ranks(mesh, timeout)
    headers = peers.headers([x.shape[dim]], f"{(*x.shape[:dim], None, *x.shape[dim + 1 :])} {x.dtype}")
    lengths = [numbers[0] for numbers, _ in headers]
    cut = cut_of(balance, sum(lengths), peers.size, cu_seqlens)
    for rank, (_, words) in enumerate(headers):
        if words != headers[0][1]:
            raise ValueError(
                f"x: expected the same shape and dtype on every rank, got {headers[0][1]} on rank 0 and {words} on "
                f"rank {rank}"
            )
        if lengths[rank] != length_of(cut[rank]):
            raise ValueError(
                f"x.shape[{dim}]: expected {length_of(cut[rank])} of {sum(lengths)} on rank {rank} with "
                f"balance={balance!r}, got {lengths[rank]}"
            )
    x = x.movedim(dim, 0).contiguous()
    raw = x.view(torch.uint8) if x.dtype == torch.bool else x  # gloo cannot send bool
    each = math.prod(raw.shape[1:])
    parts = peers.gather(raw.view(-1), [length * each for length in lengths])
    whole = x.new_empty((sum(lengths), *x.shape[1:]))
    for part, own in zip(parts, cut, strict=True):
        for where, piece in placed(own):
            whole[piece.positions] = part.view(-1, *x.shape[1:])[where].view(x.dtype)
    return whole.movedim(0, dim)


def shard_batch(
    batch: Mapping[str, Tensor], *, mesh: DeviceMesh, dim: int = -1, balance: Balance = "contiguous",
    cu_seqlens: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """This rank's part of a batch that every rank has, for a model inside `context_parallel`; no messages.

    Args:
        batch: the model's arguments by name; each has its tokens in ``dim``.
        mesh, balance, cu_seqlens: as in `shard`. Give the model the ``cu_seqlens`` of the whole, unchanged.
        dim: the dimension of the tokens; by default the last.

    Returns:
        A part of each argument. With ``input_ids``, as models of transformers take them, also ``position_ids``; with
        ``labels`` also ``shift_labels`` and ``num_items_in_batch``, because those models count and shift without
        knowledge of shards. The loss is then the mean of the ranks' losses, and its gradient the mean of theirs.

    Raises:
        ValueError: tensors of different lengths.
    """
    lengths = {name: x.shape[dim] for name, x in batch.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"batch: expected the same length in dimension {dim} of each, got {lengths}")
    whole = dict(batch)
    if "input_ids" in batch:
        tokens = batch["input_ids"]
        if "position_ids" not in batch:
            place = torch.arange(tokens.shape[dim], device=tokens.device)
            if cu_seqlens is not None:
                place = place - cu_seqlens[torch.bucketize(place, cu_seqlens[1:-1], right=True)]
            whole["position_ids"] = place.expand_as(tokens)
        if "labels" in batch:
            whole["shift_labels"] = next_labels(batch["labels"], cu_seqlens)
    how: dict[str, Any] = {"mesh": mesh, "dim": dim, "balance": balance, "cu_seqlens": cu_seqlens}
    parts = {name: shard(x, **how) for name, x in whole.items()}
    if "shift_labels" in whole:
        parts["num_items_in_batch"] = (whole["shift_labels"] != IGNORED).sum() / mesh.size()
    return parts
