"""Heads divided among ranks: parameters that a plan has turned into DTensors, and attention of a rank's own heads."""

from typing import Any, overload

from torch import Tensor

from fastattn import backends, ops
from fastattn.functional import divided
from fastattn.functional.attention import attention
from fastattn.functional.varlen import attention_varlen, varlen_spec
from fastattn.spec import is_dtensor, make_spec


@overload
def own_part(parameter: Tensor) -> Tensor: ...
@overload
def own_part(parameter: Tensor | None) -> Tensor | None: ...
def own_part(parameter: Tensor | None) -> Tensor | None:
    """This rank's part of a parameter that is divided by heads; any other parameter unchanged."""
    if parameter is None or not is_dtensor(parameter):
        return parameter
    return parameter.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def for_own_heads(parameter: Tensor) -> Tensor:
    """A parameter that every rank has and applies to its own heads, so that its gradient is the sum of all ranks'."""
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return parameter.redistribute(mesh, parameter.placements).to_local(grad_placements=[Partial()] * mesh.ndim)


def attention_of_heads(first: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`fastattn.attention` of this rank's query heads, which begin at ``first``.

    If the generators of all ranks agree, dropout drops the same weights as in one call with all heads.
    """
    if first == 0 or not options["dropout_p"]:
        return attention(q, k, v, **options)
    if (division := divided.current()) is not None:
        return division.attention(q, k, v, first_head=first, **options)
    spec = make_spec(q, k, v, **options)
    seed = ops.seed_of_part(ops.draw_seed(q.device), head=first)
    return ops.attention(spec, backends.choose(spec, None), seed)[0]


def attention_varlen_of_heads(
    first: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, **options: Any
) -> Tensor:
    """`fastattn.attention_varlen`, likewise."""
    if first == 0 or not options["dropout_p"]:
        return attention_varlen(q, k, v, cu_seqlens, cu_seqlens_k, **options)
    if (division := divided.current()) is not None:
        starts = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "seqused_k": None}
        return division.attention_varlen(q, k, v, first_head=first, **starts, **options)
    spec = varlen_spec(q, k, v, cu_seqlens, cu_seqlens_k, (None, None), **options)
    seed = ops.seed_of_part(ops.draw_seed(q.device), head=first)
    return ops.attention(spec, backends.choose(spec, None), seed)[0].squeeze(0).transpose(0, 1)


def of_all_heads(weights: Tensor, like: Tensor, average: bool) -> Tensor:
    """Attention weights of all heads, or their mean, from this rank's (N, H, L, S); ``like`` is divided by heads."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    part = weights.mean(dim=1) / mesh.size() if average else weights
    whole = DTensor.from_local(part, mesh, [Partial() if average else Shard(1)])
    return whole.redistribute(mesh, [Replicate()]).to_local()
