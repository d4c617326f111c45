"""Models whose parameters are divided among ranks, each of which has its own part of the batch: PyTorch's FSDP2."""

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
# What is called beside `forward`, and never by it.
_METHODS = ("decode", "encode", "hidden", "memory_keys_values", "step")

_Model = TypeVar("_Model", bound=nn.Module)


def fully_shard(model: _Model, **options: Any) -> _Model:
    """`torch.distributed.fsdp.fully_shard` for a model of `fastattn.nn`: each block by itself, then what is left.

    Parameters are divided among the ranks of a mesh dimension, or with a mesh of two copied along the first (HSDP), and
    gathered block by block. So they are for the methods beside ``forward`` too: `fastattn.generate`, which all ranks
    call together, ``encode``, ``decode``, ``hidden``, ``step``. PyTorch's function alone leaves those out. In place; to
    be called after `fastattn.convert`, and after `parallelize_module` on another dimension of the mesh.

    Args:
        model: a `CausalLM`, `EncoderDecoder`, torch.nn drop-in, or what holds such.
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
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of which each may be divided in its own way, or not at all.

    PyTorch's function wants all of them on one mesh; under `tensor_parallel_plan` some are DTensors and some are not.

    Args:
        parameters: those of a model; what has no gradient counts nothing.
        max_norm: of all gradients together, the 2-norm. They are scaled in place where it is more.

    Returns:
        The norm before, the same on every rank: one number.
    """
    parts: list[Tensor] = []
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for gradient in (p.grad for p in parameters if p.grad is not None):
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
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    return norm
