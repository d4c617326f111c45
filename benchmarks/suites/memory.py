"""Peak memory of one attention call against its length, with and without a mask.

On a GPU it is the memory of PyTorch's allocator, for 16 heads of 128. On a CPU it is the growth of a process, for one
head of 64, so that the longest calls take seconds.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import resident
from benchmarks.harness.device import Device, DryRun
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problems import Problem, fit, make_inputs
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cuda", "cpu")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PROVIDERS = {
    "cuda": ("fastattn", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math"),
    "cpu": ("fastattn", "sdpa"),
}
CASES = {"causal": {"causal": True}, "key padding": {"mask": "padding"}}


def measure_memory(bench: Bench, case: str, length: int, mode: str) -> None:
    """The memory of a call beyond its inputs, in MiB, with the output and the gradients."""
    on_cpu = bench.device.torch_device == "cpu" and not isinstance(bench.device, DryRun)
    sizes: dict[str, Any] = {"head_dim": 64, "dtype": "fp32"} if on_cpu else {"head_dim": 128}
    heads = 1 if on_cpu else 16
    problem = Problem(1, heads, heads, length, **sizes, **CASES[case])
    key = {"case": case, "mode": mode, **problem.key()}
    for name in bench.providers(PROVIDERS["cpu" if on_cpu else "cuda"]):
        try:
            if on_cpu:
                peak = resident.peak(prepare, name, problem, mode)
            else:
                call = prepare(name, problem, mode, bench.device)
                call()  # compiles, and allocates what libraries keep
                peak = bench.device.peak_memory(call)
        except Exception as error:
            bench.refused("memory", key | {"provider": name}, error)
        else:
            bench.record("memory", key | {"provider": name}, peak_mib=peak)


def prepare(name: str, problem: Problem, mode: str, device: Device | None = None) -> Callable[[], Any]:
    """A call of a peer. Without a device it is on the CPU, where a short call first loads what is loaded once."""
    if device is None:
        prepare(name, dataclasses.replace(problem, length=128), mode, Device())()
        device = Device()
    prepared = PEERS[name].prepare(problem, make_inputs(fit(problem, device), device, 0, grad=mode != "forward"))
    run = forward_only if mode == "forward" else forward_backward
    return functools.partial(run, prepared.call, prepared.leaves, prepared.dout)


def forward_only(call: Callable[[], torch.Tensor], *_: object) -> torch.Tensor:
    with torch.no_grad():
        return call()


def forward_backward(
    call: Callable[[], torch.Tensor], leaves: list[torch.Tensor], dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(call(), leaves, dout)


def cells() -> list[Cell]:
    return [
        Cell(
            "memory", f"{case} L={length} {mode}",
            functools.partial(measure_memory, case=case, length=length, mode=mode), 2, ("memory", case, mode),
        )
        for case, mode, length in itertools.product(CASES, ("forward", "forward+backward"), LENGTHS)
    ]  # fmt: skip
