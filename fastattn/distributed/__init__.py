"""Attention and models on more than one device, on torch.distributed."""

from fastattn.distributed.context import context_parallel_attention, explain
from fastattn.distributed.cost import Choice, Cost, Link
from fastattn.distributed.data_parallel import clip_grad_norm_, fully_shard
from fastattn.distributed.job import Job, RankFailed, job
from fastattn.distributed.models import ContextParallel, context_parallel
from fastattn.distributed.shards import positions, shard, shard_batch, unshard
from fastattn.distributed.tensor_parallel import tensor_parallel_plan

__all__ = [
    "Choice",
    "ContextParallel",
    "Cost",
    "Job",
    "Link",
    "RankFailed",
    "clip_grad_norm_",
    "context_parallel",
    "context_parallel_attention",
    "explain",
    "fully_shard",
    "job",
    "positions",
    "shard",
    "shard_batch",
    "tensor_parallel_plan",
    "unshard",
]
