"""Attention and models on more than one device, on torch.distributed."""

from fastattn.distributed.context import context_parallel_attention, explain
from fastattn.distributed.cost import Choice, Cost, Link
from fastattn.distributed.shards import positions, shard, unshard
from fastattn.distributed.tensor_parallel import tensor_parallel_plan

__all__ = [
    "Choice",
    "Cost",
    "Link",
    "context_parallel_attention",
    "explain",
    "positions",
    "shard",
    "tensor_parallel_plan",
    "unshard",
]
