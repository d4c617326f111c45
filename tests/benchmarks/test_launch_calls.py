"""The host's share of a call, counted and not timed: the same on every machine and under any load."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.suites import launch

TARGETS = {
    "forward": (40.0, 22.0, 133),
    "forward and backward": (110.0, 102.0, 369),
    "append and attend": (60.0, 44.0, 259),
}
"""Case -> the most microseconds that it may take on the host, what `python -m benchmarks launch` measured on a Zen 4,
and how many functions the call called then."""


@pytest.fixture(scope="module")
def counted():
    found = launch.elsewhere("counts()")
    return {case: {name: launch.Calls(*x) for name, x in by.items()} for case, by in found.items()}


def most(case):
    """As many calls as the target holds at the time that one of them took."""
    target, measured, calls = TARGETS[case]
    return calls * target / measured


@pytest.mark.parametrize("case", TARGETS)
def test_calls_stay_within_what_the_target_holds(counted, case):
    """And Triton's binder does not: the limits would notice if launches were bound anew."""
    ours, bound = counted[case]["fastattn"], counted[case]["triton-binder"]
    assert ours.python + ours.c <= most(case) < bound.python + bound.c


def test_no_call_goes_through_the_dispatcher(counted):
    assert counted.keys() == launch.calls().keys() > TARGETS.keys()
    assert {case: by["fastattn"].operators for case, by in counted.items()} == dict.fromkeys(counted, 0)


def test_every_function_is_counted():
    def inner(x):
        return len(x)

    def call():
        return inner([]), max(1, 2)

    assert launch.count(call) == launch.Calls(2, 2, 0)
    x = torch.zeros(1)
    assert launch.count(lambda: torch.ops.aten.alias(x)).operators == 1
