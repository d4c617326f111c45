"""Models whose parameters are divided among ranks, each of which has its own part of the batch: PyTorch's FSDP2."""

from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method

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
