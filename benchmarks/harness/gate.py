"""Which cells a failed parity case blocks: exactly those whose figures depend on it."""

from collections.abc import Callable, Mapping

from . import parity
from .device import Device
from .parity import ParityCase
from .problems import Problem

BASIC = ("plain", "causal", "key padding + causal", "cache", "dropout")
"""The cases for cells that name none: whole layers and models."""
PER_HEAD_DIM = ("plain", "causal")
"""These hold in every dtype and head dim: a failure in one says nothing about the others."""


def features_of(problem: Problem) -> tuple[str, ...]:
    """The parity features that a benchmarked problem depends on."""
    parts = {
        "causal" if problem.causal else "plain": True,
        "GQA 4/2": problem.q_heads != problem.kv_heads,
        "boolean mask": problem.mask == "random",
        "key padding + causal": problem.mask == "padding",
        "bias": bool(problem.bias),
        "bias gradient": problem.bias == "learned",
        "dropout": problem.dropout_p > 0.0,
        "window + causal": problem.window is not None,
        "ALiBi, learned": problem.alibi,
        "softcap": problem.softcap is not None,
        "sinks, learned": problem.sinks,
        "packed sequences": problem.packed,
        "block mask": bool(problem.pattern) and not problem.packed,
    }
    return tuple(feature for feature, has in parts.items() if has)


def needs(problem: Problem) -> tuple[ParityCase, ...]:
    """The parity cases that a benchmarked problem depends on."""
    return tuple(ParityCase(feature, problem.dtype, problem.head_dim) for feature in features_of(problem))


def red_cases(
    device: Device, cases: list[ParityCase], lost: Callable[[Exception], bool]
) -> dict[ParityCase, Exception]:
    """The failed cases with their reasons; prints them. It stops if the device is lost, and the last reason says so."""
    red = {}
    for case, error in parity.failures(device, cases):
        red[case] = error
        print(f"parity red: {case}: {parity.describe(error)}")
        if lost(error):
            break
    print(f"parity: {len(cases) - len(red)} of {len(cases)} cases green")
    return red


def blocking(rests_on: tuple[ParityCase, ...] | None, red: Mapping[ParityCase, Exception]) -> list[ParityCase]:
    """The failed cases among those that a cell depends on."""
    return [case for case in red if blocks(case, rests_on)]


def blocks(red: ParityCase, rests_on: tuple[ParityCase, ...] | None) -> bool:
    """A case in float32 comes from a machine without a GPU and counts for every dtype and head dim."""
    if rests_on is None:
        return red.feature in BASIC
    for need in rests_on:
        everywhere = red.feature not in PER_HEAD_DIM or red.dtype == "fp32"
        if need.feature == red.feature and (everywhere or need == red):
            return True
    return False
