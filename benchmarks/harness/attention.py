"""Time one attention problem on every provider, for the suites of attention."""

from collections.abc import Sequence

import torch

import fastattn

from .device import Call
from .peers import CUDA, OWN, PEERS
from .problems import Inputs, Problem, check_output, fit, make_inputs, options
from .runner import Bench, raise_if_lost


def measure(
    bench: Bench, suite: str, case: str, problem: Problem, mode: str, providers: Sequence[str]
) -> None:  # fmt: skip
    """Time the providers against each other and record a row for each, also for one that cannot compute the problem.

    ``mode`` is "forward", without autograd, or "backward", after a forward pass that is not timed.
    """
    key = {"case": case, "mode": mode, **problem.key()}
    actual = fit(problem, bench.device)
    sets = [make_inputs(actual, bench.device, seed, mode == "backward") for seed in range(bench.device.input_sets)]
    calls: dict[str, Call] = {}
    for name in bench.providers(providers):
        try:
            calls[name] = build_call(name, actual, sets, mode)
        except Exception as error:
            bench.refused(suite, key | {"provider": name}, error)
    try:
        timings = bench.time(calls)
    except Exception as error:  # one of them fails when repeated: timing each alone shows which
        raise_if_lost(error)
        timings = {}
        for name, call in calls.items():
            try:
                timings |= bench.time({name: call})
            except Exception as own_error:
                bench.refused(suite, key | {"provider": name}, own_error)
    for name, timing in timings.items():
        note = f"backend {backend_of(actual, sets[0])}" if name == OWN else ""
        bench.record(suite, key | {"provider": name}, timing, flops=problem.flops(mode), note=note)


def build_call(name: str, problem: Problem, sets: Sequence[Inputs], mode: str) -> Call:
    """The call to time, after one run whose output is checked; each repeat takes the next set of inputs."""
    if name == "sdpa-math":
        sets = sets[:1]  # it keeps the scores, so that only one graph fits
    prepared = [PEERS[name].prepare(problem, x) for x in sets]
    first, n = prepared[0], len(prepared)
    if mode == "forward":
        with torch.no_grad():
            check_output(first.to_heads(first.call()), problem, sets[0], name in (OWN, CUDA))

        def forward(repeat: int) -> None:
            with torch.no_grad():
                prepared[repeat % n].call()

        return forward

    outputs = [p.call() for p in prepared]
    check_output(first.to_heads(outputs[0]), problem, sets[0], name in (OWN, CUDA))

    def backward(repeat: int) -> None:
        p = prepared[repeat % n]
        torch.autograd.grad(outputs[repeat % n], p.leaves, p.dout, retain_graph=True)

    backward(0)
    return backward


def backend_of(problem: Problem, x: Inputs) -> str:
    """The backend of fastattn that a row was measured on, so that no other one serves unnoticed."""
    return fastattn.explain(x.q, x.k, x.v, **options(problem, x)).backend
