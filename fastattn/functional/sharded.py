"""Attention on DTensors: batch and heads divided among the ranks of a mesh, each of which computes its own part.

PyTorch's `redistribute` brings every operand to the ranks that need it. Gradients to which all ranks contribute, such
as that of a bias for all heads, come back as sums. Only DTensors import this module: it needs torch.distributed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastattn import backends, ops
from fastattn.backends import Explanation
from fastattn.block_mask import some_lines
from fastattn.ops.schema import heads_last
from fastattn.spec import AttentionSpec


def attention(spec: AttentionSpec, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a call whose q, k and v are DTensors, as DTensors divided as they are; lse may be None.

    Raises:
        TypeError, ValueError: operands on another mesh or on none, a divided sequence or head dim, or query heads that
            do not divide by the ranks that share them; or no backend for the part.
    """
    layout = _layout(spec)
    own = _own_part(spec, layout)
    seed = None
    if spec.dropout_p > 0.0:
        seed = _first_ranks(ops.draw_seed(own.q.device), layout.mesh)
        seed = ops.seed_of_part(seed, batch=layout.batch.start, head=layout.heads.start)
    out, lse = ops.attention(own, backends.choose(own, backend), seed)
    rows = spec.q.shape[:3]
    return layout.whole(out, (*rows, spec.v.shape[3])), None if lse is None else layout.whole(lse, rows)


def explain(spec: AttentionSpec, backend: str | None) -> Explanation:
    """The explanation for this rank's part; this redistributes the operands."""
    return backends.explain(_own_part(spec, _layout(spec)), backend)


class _Layout(NamedTuple):
    """How a call is divided."""

    mesh: DeviceMesh
    dims: tuple[int | None, ...]
    """of each mesh dimension: 0 if the batch is divided among its ranks, 1 if heads are, None if they do the same"""
    sizes: tuple[int, int]
    """(B, Hq) of the whole"""
    batch: slice
    """this rank's"""
    heads: slice

    def part(self, x: Tensor, batch: int | None, heads: int | None, sizes: tuple[int, int] | None = None) -> Tensor:
        """This rank's part of ``x``, where batch entries lie along dimension ``batch`` and heads along ``heads``.

        A dimension that lacks the whole's ``sizes`` broadcasts, and its gradient is the sum over all ranks.
        """
        where, full = (batch, heads), sizes or self.sizes
        divided = [place is not None and x.shape[place] == size for place, size in zip(where, full, strict=True)]
        if not isinstance(x, DTensor):
            for place, own, cut in zip(where, (self.batch, self.heads), divided, strict=True):
                if cut and place is not None:
                    x = x.narrow(place, own.start, own.stop - own.start)
            return x
        placements: list[Placement] = []
        gradients: list[Placement] = []
        for dim in self.dims:
            place = None if dim is None else where[dim]
            if dim is not None and place is not None and divided[dim]:
                placements.append(Shard(place))
                gradients.append(Shard(place))
            else:
                placements.append(Replicate())
                gradients.append(Replicate() if dim is None else Partial())
        if x.placements != tuple(placements) or placements != gradients:  # else it is spared, and its gradient's too
            x = x.redistribute(self.mesh, placements)
        return x.to_local(grad_placements=gradients)

    def whole(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The DTensor (B, Hq, ...) of which ``x`` is this rank's part."""
        # Views are judged by the strides of the whole, which are therefore in the order of the part's.
        order = (0, 2, 1, 3) if x.ndim == 4 and heads_last(x) else range(x.ndim)
        strides, step = [0] * x.ndim, 1
        for dim in reversed(order):
            strides[dim], step = step, step * shape[dim]
        placements = [Replicate() if dim is None else Shard(dim) for dim in self.dims]
        return DTensor.from_local(x, self.mesh, placements, shape=torch.Size(shape), stride=tuple(strides))


def _layout(spec: AttentionSpec) -> _Layout:
    """How the ranks share the call, by how q, k and v are divided."""
    assert isinstance(spec.q, DTensor)
    mesh = spec.q.device_mesh
    tensors = {"q": spec.q, "k": spec.k, "v": spec.v, "mask": spec.mask, "bias": spec.bias}
    tensors |= {"alibi_slopes": spec.alibi_slopes, "sinks": spec.sinks, "q_offset": spec.q_offset_tensor}
    tensors["kv_start"] = spec.kv_start
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise ValueError(f"{name}.device_mesh: expected q.device_mesh == {mesh}, got {x.device_mesh}")
        elif x is not None and (name in "qkv" or (x.requires_grad and torch.is_grad_enabled())):
            raise TypeError(
                f"{name}: expected a DTensor like the query, got a plain Tensor; DTensor.from_local makes one"
            )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"q.device_mesh: expected a mesh with this rank in it, got {mesh}")
    dims = tuple(_divided(spec, index) for index in range(mesh.ndim))
    batch, heads = spec.q.shape[:2]
    ranks = _ranks(mesh, dims, 1)
    if heads % ranks:
        raise ValueError(f"q.shape[1]: expected a multiple of the {ranks} ranks that share the heads, got {heads}")
    own = (_own_range(size, mesh, dims, dim, coordinate) for dim, size in enumerate((batch, heads)))
    return _Layout(mesh, dims, (batch, heads), *own)


def _divided(spec: AttentionSpec, index: int) -> int | None:
    """Which dimension of (batch, heads) a mesh dimension divides: that of q if it divides q, else of k or v."""
    found = None
    for name, x in (("q", spec.q), ("k", spec.k), ("v", spec.v)):
        assert isinstance(x, DTensor)
        placement = x.placements[index]
        if placement.is_replicate() or placement.is_partial():
            continue
        if type(placement) is Shard and placement.dim == 2:
            raise ValueError(
                f"{name}.placements: expected batch or heads divided, got {placement}, the sequence of (batch, heads, "
                "length, head_dim); fastattn.distributed.context_parallel_attention takes the local parts of those"
            )
        if type(placement) is not Shard or placement.dim > 2:
            raise ValueError(
                f"{name}.placements: expected Shard(0), Shard(1), Replicate() or Partial() of (batch, heads, length, "
                f"head_dim), got {placement}"
            )
        if found is None:
            found = 0 if placement.dim == 0 else 1  # a constant, also where a trace takes the number for a variable
    return found


def _ranks(mesh: DeviceMesh, dims: tuple[int | None, ...], wanted: int) -> int:
    ranks = 1
    for index, dim in enumerate(dims):
        ranks *= mesh.size(index) if dim == wanted else 1
    return ranks


def _own_range(
    size: int, mesh: DeviceMesh, dims: tuple[int | None, ...], wanted: int, coordinate: Sequence[int]
) -> slice:
    """What DTensor gives this rank of a dimension: chunks as those of `torch.chunk`, divided again by the next one."""
    start = 0
    for index, dim in enumerate(dims):
        if dim == wanted:
            chunk = -(-size // mesh.size(index))
            begin = min(coordinate[index] * chunk, size)
            start, size = start + begin, min(chunk, size - begin)
    return slice(start, start + size)


def _own_part(spec: AttentionSpec, layout: _Layout) -> AttentionSpec:
    """This rank's call."""
    batch, heads = layout.sizes
    kv_heads, ranks = spec.k.shape[1], _ranks(layout.mesh, layout.dims, 1)
    k, v = (layout.part(x, 0, 1, (batch, kv_heads if kv_heads % ranks == 0 else -1)) for x in (spec.k, spec.v))
    if kv_heads % ranks:
        group = heads // kv_heads
        shared = key_heads(layout.heads, group)
        k, v = (heads_of(x[:, shared], layout.heads, group, shared.start) for x in (k, v))
    places = {
        "q": (0, 1), "mask": (0, 1), "bias": (0, 1), "alibi_slopes": (0, 1), "sinks": (None, 0),
        "q_offset_tensor": (0, None), "cu_seqlens_q": (None, None), "cu_seqlens_k": (None, None),
        "seqused_k": (None, None), "kv_start": (0, None),
    }  # fmt: skip
    changes: dict[str, Any] = {
        name: layout.part(x, *places[name]) for name in places if (x := getattr(spec, name)) is not None
    }  # fmt: skip
    if spec.block_mask is not None:
        changes["block_mask"] = some_lines(spec.block_mask, lambda x: layout.part(x, 0, 1))
    return spec._replace(k=k, v=v, **changes)


def _first_ranks(seed: Tensor, mesh: DeviceMesh) -> Tensor:
    """The first rank's seed. Every rank draws, so that equal generators stay equal."""
    for index in range(mesh.ndim):  # one after the other, which all ranks do in one order
        placements = [Shard(0) if other == index else Replicate() for other in range(mesh.ndim)]
        seed = DTensor.from_local(seed, mesh, placements).full_tensor()[:1]
    return seed


def key_heads(own: slice, group: int) -> slice:
    """The key heads that serve query heads, ``group`` of these each."""
    return slice(own.start // group, -(-own.stop // group)) if own.stop > own.start else slice(0, 0)


def heads_of(x: Tensor, mine: slice, group: int, first: int) -> Tensor:
    """The key heads for the query heads ``mine``: in groups as they are if these are whole, else one for each.

    ``x`` has those of `key_heads`, from ``first`` on.
    """
    whole = mine.start % group == 0 and mine.stop % group == 0
    inside = mine.start // group == (mine.stop - 1) // group
    if whole or inside:
        return x
    return x[:, [head // group - first for head in range(mine.start, mine.stop)]]
