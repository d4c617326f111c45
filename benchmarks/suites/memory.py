"""Peak memory of one attention call against its length, with and without a mask."""

import functools
import itertools
from collections.abc import Callable

import torch

from benchmarks.harness.peers import PEERS
from benchmarks.harness.problems import Problem, fit, make_inputs
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cuda",)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PROVIDERS = ("fastattn", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
CASES = {"causal": {"causal": True}, "key padding": {"mask": "padding"}}


def measure_memory(bench: Bench, case: str, length: int, mode: str) -> None:
    """What a call allocates beyond its inputs, in MiB; the output and the gradients are part of it."""
    problem = Problem(1, 16, 16, length, 128, **CASES[case])
    key = {"case": case, "mode": mode, **problem.key()}
    inputs = make_inputs(fit(problem, bench.device), bench.device, 0, grad=mode != "forward")
    for name in bench.providers(PROVIDERS):
        try:
            prepared = PEERS[name].prepare(problem, inputs)
            run = forward_only if mode == "forward" else forward_backward
            call = functools.partial(run, prepared.call, prepared.leaves, prepared.dout)
            call()  # compiles, and makes what libraries keep for good
            peak = bench.device.peak_memory(call)
        except Exception as error:
            bench.refused("memory", key | {"provider": name}, error)
        else:
            bench.record("memory", key | {"provider": name}, peak_mib=peak)


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
