"""bench_overhead and bench_cpu under pytest-benchmark, for its statistics and comparisons while developing.

pytest benchmarks/test_host.py --benchmark-group-by=param:case --benchmark-autosave
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import bench_cpu, bench_overhead
from .attention import build_call
from .device import Device
from .problems import Problem, make_inputs


@pytest.mark.parametrize("provider", ["fastattn", "sdpa"])
@pytest.mark.parametrize("case", bench_overhead.host_calls("cpu"))
def test_overhead(benchmark: Callable[..., Any], case: str, provider: str):
    call = bench_overhead.host_calls("cpu")[case].get(provider)
    if call is None:
        pytest.skip("torch has no such call")
    with torch.set_grad_enabled("gradients" in case):
        benchmark(call)


@pytest.mark.parametrize("provider", ["fastattn", "sdpa"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", bench_cpu.CASES)
def test_cpu(benchmark: Callable[..., Any], case: str, mode: str, provider: str):
    problem = Problem(**(bench_cpu.SIZES | {"length": 128} | bench_cpu.CASES[case]))
    sets = [make_inputs(problem, Device(), seed, mode == "backward") for seed in range(2)]
    benchmark(functools.partial(build_call(provider, problem, sets, mode), 0))
