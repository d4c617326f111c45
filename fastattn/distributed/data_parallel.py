"""PyTorch's FSDP2 for fastattn's models: ranks divide the parameters and the batch."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from fastattn.nn import Block

_LAYERS = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Public methods that `forward` never calls.
_METHODS = ("decode", "encode", "hidden", "memory_keys_values", "step")

_Model = TypeVar("_Model", bound=nn.Module)


def fully_shard(model: _Model, **options: Any) -> _Model:
    """`torch.distributed.fsdp.fully_shard` for a model of `fastattn.nn`: each block by itself, then the rest.

    The ranks of a mesh dimension divide the parameters and gather them block by block. With a mesh of two dimensions,
    the first has copies (HSDP). This also covers methods beside ``forward``: `fastattn.generate`, which all ranks call
    together, ``encode``, ``decode``, ``hidden`` and ``step``. PyTorch's function alone does not cover them. It works in
    place. Call it after `fastattn.convert`, and after `parallelize_module` on another dimension of the mesh.

    Args:
        model: a `CausalLM`, `EncoderDecoder` or torch.nn drop-in, or a module that holds one.
        options: those of PyTorch's function: mesh, reshard_after_forward, mp_policy, offload_policy.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if module is not model and isinstance(module, _LAYERS):
            _shard(module, options)
    _shard(model, options)
    return model


def _shard(module: nn.Module, options: dict[str, Any]) -> None:
    _fully_shard(module, **options)
    for name in _METHODS:
        if hasattr(type(module), name):
            register_fsdp_forward_method(module, name)


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters that are each divided in their own way, or not at all.

    PyTorch's function needs all of them on one mesh; under `tensor_parallel_plan` some are DTensors and some are not.

    Args:
        parameters: those of a model, or one; parameters without a gradient do not count.
        max_norm: the largest 2-norm of all gradients together. If it is larger, this scales them in place.

    Returns:
        The norm before scaling, one number, the same on every rank.
    """
    parts: list[Tensor] = []
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    for gradient in (p.grad for p in given if p.grad is not None):
        groups: tuple[dist.ProcessGroup, ...] = ()
        own = gradient
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            parts.append(gradient.to_local())
            gradient = gradient.redistribute(mesh, [Replicate() if p.is_partial() else p for p in gradient.placements])
            groups = tuple(mesh.get_group(i) for i, p in enumerate(gradient.placements) if not p.is_replicate())
            own = gradient.to_local()
        else:
            parts.append(own)
        squares.setdefault(groups, []).append(own)
    total = torch.zeros(())
    for groups, own in squares.items():
        square = torch.nn.utils.get_total_norm(own).square()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = square + total.to(square)
    norm = total.sqrt()
    if parts:
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    return norm
