"""Attention and models on more than one device, on torch.distributed."""

from fastattn.distributed.context import context_parallel_attention, explain
from fastattn.distributed.cost import Choice, Cost, Link
from fastattn.distributed.shards import positions, shard, unshard

__all__ = [
    "Choice",
    "Cost",
    "Link",
    "context_parallel_attention",
    "explain",
    "positions",
    "shard",
    "unshard",
]
