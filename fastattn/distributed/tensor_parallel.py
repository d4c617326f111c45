"""Models whose heads and hidden units are divided among ranks, by PyTorch's own `parallelize_module`."""

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from fastattn.nn import Attention, FeedForward


def tensor_parallel_plan(model: nn.Module, ranks: int) -> dict[str, ParallelStyle]:
    """The plan by which `torch.distributed.tensor.parallel.parallelize_module` divides a model of `fastattn.nn`.

    Each rank has some of the heads and some of the hidden units; the input and the output of every layer are whole on
    every rank, as are embeddings, norms and the output layer. For training and evaluation; not with a KV cache::

        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model, mesh["tp"].size()))

    Args:
        model: a `fastattn.nn.CausalLM`, `EncoderDecoder`, `Encoder`, `Decoder` or `Block`, or what holds such.
        ranks: of the mesh dimension.

    Returns:
        Name of each linear layer -> how it is divided.

    Raises:
        ValueError: nothing to divide; heads or hidden units that do not divide by ranks; query and key norm, sinks or
            ALiBi, which belong to heads and would not be divided with them.

    Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053).
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Attention):
            of_heads = {"qk_norm": module.q_norm, "sinks": module.sinks, "ALiBi positions": module.alibi}
            for term, found in of_heads.items():
                if found is not None:
                    raise ValueError(f"model: expected attention without {term} under tensor parallelism, got {name!r}")
            for heads, count in (("num_heads", module.num_heads), ("num_kv_heads", module.num_kv_heads)):
                _divides(f"{prefix}{heads}", count, ranks)
            columns, row = ("q_proj", "k_proj", "v_proj"), "out_proj"
        elif isinstance(module, FeedForward):
            _divides(f"{prefix}up_proj.out_features", module.up_proj.out_features, ranks)
            columns = ("up_proj",) if module.gate_proj is None else ("gate_proj", "up_proj")
            row = "down_proj"
        else:
            continue
        plan |= {prefix + column: ColwiseParallel() for column in columns} | {prefix + row: RowwiseParallel()}
    if not plan:
        raise ValueError(f"model: expected one with fastattn.nn.Attention or FeedForward, got {type(model).__name__}")
    return plan


def _divides(name: str, count: int, ranks: int) -> None:
    if count % ranks:
        raise ValueError(f"{name}: expected a multiple of {ranks} ranks, got {count}")
