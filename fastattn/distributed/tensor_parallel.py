"""Models whose heads and hidden units are divided among ranks, by PyTorch's own `parallelize_module`."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from fastattn.nn import Attention, FeedForward


def tensor_parallel_plan(model: nn.Module, ranks: int, *, vocabulary: bool = False) -> dict[str, ParallelStyle]:
    """The plan by which `torch.distributed.tensor.parallel.parallelize_module` divides a model of `fastattn.nn`.

    Each rank has some of the heads and some of the hidden units, and a KV cache of its heads; the input and the output
    of every layer are whole on every rank, as are embeddings and norms. For training and `fastattn.generate`::

        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model, mesh["tp"].size()))

    Args:
        model: a `fastattn.nn.CausalLM`, `EncoderDecoder`, `Encoder`, `Decoder` or `Block`, or what holds such.
        ranks: of the mesh dimension.
        vocabulary: divide the output layer too, `model.head`. Logits are then a DTensor divided by tokens of the
            vocabulary, and no rank ever holds all of them: loss and backward pass belong inside of
            `torch.distributed.tensor.parallel.loss_parallel()`. For training alone.

    Returns:
        Name of each layer -> how it is divided.

    Raises:
        TypeError: vocabulary without a linear ``head``.
        ValueError: nothing to divide; heads, hidden units or a vocabulary that do not divide by ranks; an output layer
            tied to an embedding, which is whole.

    Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053).
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Attention):
            for heads, count in (("num_heads", module.num_heads), ("num_kv_heads", module.num_kv_heads)):
                _divides(f"{prefix}{heads}", count, ranks)
            columns, row = ("q_proj", "k_proj", "v_proj"), "out_proj"
            plan[name] = _Heads()
        elif isinstance(module, FeedForward):
            _divides(f"{prefix}up_proj.out_features", module.up_proj.out_features, ranks)
            columns = ("up_proj",) if module.gate_proj is None else ("gate_proj", "up_proj")
            row = "down_proj"
        else:
            continue
        plan |= {prefix + column: ColwiseParallel() for column in columns} | {prefix + row: RowwiseParallel()}
    if not plan:
        raise ValueError(f"model: expected one with fastattn.nn.Attention or FeedForward, got {type(model).__name__}")
    if vocabulary:
        _check_head(model, ranks)
        plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return plan


def _divides(name: str, count: int, ranks: int) -> None:
    if count % ranks:
        raise ValueError(f"{name}: expected a multiple of {ranks} ranks, got {count}")


def _check_head(model: nn.Module, ranks: int) -> None:
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"model.head: expected a torch.nn.Linear with vocabulary=True, got {type(head).__name__}")
    _divides("head.out_features", head.out_features, ranks)
    if any(isinstance(part, nn.Embedding) and part.weight is head.weight for part in model.modules()):
        raise ValueError("model.head.weight: expected one that is not tied to an embedding with vocabulary=True")


class _Heads(ParallelStyle):
    """The heads of an `Attention` and what belongs to each of them: sinks, slopes; norms are every head's."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Attention)
        ranks = device_mesh.size()
        module.num_heads //= ranks
        module.num_kv_heads //= ranks
        module.first_head = device_mesh.get_local_rank() * module.num_heads
        for name in ("sinks", "alibi_slopes"):
            if (parameter := getattr(module, name)) is not None:
                module.register_parameter(name, self._placed(parameter, device_mesh, Shard(0)))
        for norm in (module.q_norm, module.k_norm):
            if norm is not None and norm.weight is not None:
                norm.register_parameter("weight", self._placed(norm.weight, device_mesh, Replicate()))
        return module

    def _placed(self, parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
        with torch.no_grad():
            placed = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
        return nn.Parameter(placed, requires_grad=parameter.requires_grad)
