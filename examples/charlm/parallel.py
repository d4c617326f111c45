"""One model in several processes: which process has which sequences, characters and heads. A single process has all.

The training loop uses `Ranks` and is otherwise that of one process.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor.parallel import parallelize_module

import fastattn.distributed as fd
from fastattn.nn import CausalLM

BALANCE = "zigzag"  # of characters: under causal order each process has as much work


@dataclass(frozen=True)
class Sizes:
    """How many processes share the sequences of a batch (dp), the characters of a sequence (cp), the heads (tp)."""

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """From "dp=2,tp=4"; what is not named is 1. The type of an argument."""
        try:
            found = cls(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})
        except (TypeError, ValueError):
            found = None
        if found is None or min(asdict(found).values()) < 1:
            raise argparse.ArgumentTypeError(f"expected dp, cp or tp with positive sizes, as dp=2,tp=4, got {text}")
        return found


class Ranks:
    """The processes of a run, seen from one of them; without a job it is the only one."""

    def __init__(self, job: fd.Job | None = None) -> None:
        self.job = job
        self.first = job is None or job.first
        self.number = 0 if job is None else job.rank
        self.count = 1 if job is None else job.mesh.size()
        self.scale = 1
        """factor for a process's share of a mean, such that the mean over processes is the whole mean"""
        if job is not None:
            self.data = job.mesh["dp", "cp"]._flatten("data")  # processes with data of their own
            self.scale = self.data.size()

    def divide(self, model: CausalLM) -> None:
        """Give each process its part of the model, in place: heads by tp, the rest of the parameters by dp and cp."""
        if self.job is None:
            return
        heads, characters = self.job.mesh["tp"], self.job.mesh["cp"]
        if heads.size() > 1:
            parallelize_module(model, heads, fd.tensor_parallel_plan(model, heads.size()))
        if characters.size() > 1:
            parallelize_module(model, characters, fd.ContextParallel(balance=BALANCE))
        fd.fully_shard(model, mesh=self.data)

    def own(self, batch: Tensor) -> Tensor:
        """This process's part of a batch (sequences, characters) that every process has."""
        if self.job is None:
            return batch
        mesh = self.job.mesh
        rows = batch[mesh.get_local_rank("dp") :: mesh["dp"].size()]
        return fd.shard(rows, mesh=mesh["cp"], dim=1, balance=BALANCE)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes with data of their own, in place."""
        if self.job is not None:
            dist.all_reduce(x, group=self.data.get_group())
        return x.div_(self.scale)

    def clip_grad_norm_(self, model: nn.Module, most: float) -> None:
        fd.clip_grad_norm_(model.parameters(), most)

    def seed(self, seed: int) -> None:
        """Seed dropout: differently for each process with data of its own, equally for those that share heads."""
        if self.job is not None and self.data.size() > 1:
            torch.manual_seed(seed + self.data.get_local_rank())

    def stopped(self) -> bool:
        """Whether somebody pressed Ctrl-C; all processes call this together. In one process Ctrl-C raises."""
        return self.job is not None and self.job.interrupted()

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole weights and optimizer state, as of one process, on the first process; elsewhere empty.

        A model that is too large for one process needs `torch.distributed.checkpoint` instead.
        """
        weights, state = get_state_dict(model, optimizer, options=self._options(cpu_offload=True))
        return {"model": weights, "optimizer": state}

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a result of `state`, from any number of processes; every process has it."""
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=self._options(),
        )  # fmt: skip

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of the weights, as in `state`."""
        found = get_model_state_dict(model, options=self._options(cpu_offload=True))
        return {name: tensor.clone() for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load a result of `weights`; the first process sends it to the others."""
        set_model_state_dict(model, dict(weights), options=self._options(broadcast_from_rank0=True))

    def _options(self, **options: Any) -> StateDictOptions:
        return StateDictOptions() if self.job is None else StateDictOptions(full_state_dict=True, **options)

    def gather(self, x: Any) -> list[Any]:
        """What every process has."""
        if self.job is None:
            return [x]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, x)
        return found
