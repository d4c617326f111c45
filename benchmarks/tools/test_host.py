"""The suites overhead and cpu under pytest-benchmark, for its statistics and comparisons while developing.

pytest benchmarks/tools/test_host.py --benchmark-group-by=param:case --benchmark-autosave
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.attention import build_call
from benchmarks.harness.device import Device
from benchmarks.harness.problems import Problem, make_inputs
from benchmarks.suites import cpu, overhead


@pytest.mark.parametrize("provider", ["fastattn", "sdpa"])
@pytest.mark.parametrize("case", overhead.host_calls("cpu"))
def test_overhead(benchmark: Callable[..., Any], case: str, provider: str):
    call = overhead.host_calls("cpu")[case].get(provider)
    if call is None:
        pytest.skip("torch has no such call")
    with torch.set_grad_enabled("gradients" in case):
        benchmark(call)


@pytest.mark.parametrize("provider", ["fastattn", "sdpa"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", cpu.CASES)
def test_cpu(benchmark: Callable[..., Any], case: str, mode: str, provider: str):
    problem = Problem(**{**cpu.SIZES, "length": 128, **cpu.CASES[case]})
    sets = [make_inputs(problem, Device(), seed, mode == "backward") for seed in range(2)]
    benchmark(functools.partial(build_call(provider, problem, sets, mode), 0))
