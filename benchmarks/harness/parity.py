"""The parity matrix: every feature on this device, held to the rule of `fastattn.testing`.

A small part of it is the gate before every benchmark; `benchmarks.tools.gpu_check` records all of it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.functional import Backend

from .device import Device, DryRun
from .parity_features import FEATURES, CacheFeature, shrink
from .problems import DTYPES


@dataclass(frozen=True)
class ParityCase:
    feature: str
    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.feature}, {self.dtype}, head dim {self.head_dim}"

    def arguments(self, device: Device) -> tuple[torch.dtype, int]:
        """The dtype and head dim for this device: small ones in a dry run."""
        head_dim = FEATURES[self.feature].head_dim or self.head_dim
        if isinstance(device, DryRun):
            return torch.float32, min(head_dim, 16)
        return DTYPES[self.dtype], head_dim

    def run(self, device: Device, backend: Backend | None = None) -> None:
        """Raise AssertionError if a result breaks the rule."""
        FEATURES[self.feature].check(device, *self.arguments(device), backend)

    def launch(self, device: Device) -> None:
        """Run only the kernels, which compiles them."""
        feature: Any = FEATURES[self.feature]
        feature.call(device, *self.arguments(device), feature.shape)()

    def specialisations(self) -> set[tuple[object, ...]]:
        """The parts of a feature on which the compiled code of each of its kernels depends."""
        feature, (dtype, head_dim) = FEATURES[self.feature], self.arguments(Device())
        if isinstance(feature, CacheFeature):
            shape = feature.shape
            options = feature.options(shape.heads[0], torch.Generator())
            rows = shape.heads[0] // shape.heads[1] * shape.q_len
            code = (shape.page, feature.num_splits == 1, rows > 32, shape.q_len > 1, *sorted(options))
        else:
            options = feature.options(shrink(feature.shape), torch.Generator())
            code = tuple(sorted((name, *(getattr(x, "shape", [])[2:3])) for name, x in options.items()))
            code += (feature.shape.v_dim,)
        return {
            (kernel, dtype, head_dim, *(() if kernel in ("delta", "combine", "append") else code))
            for kernel in feature.kernels
        }


def matrix() -> list[ParityCase]:
    """Every feature in both half precisions and three head dims, and in float32 at one; most informative first."""
    cases = [
        ParityCase(feature, dtype, head_dim)
        for head_dim, dtype, feature in itertools.product((64, 128, 256), ("bf16", "fp16"), FEATURES)
        if FEATURES[feature].head_dim is None or head_dim == 128
    ]
    single = [ParityCase(feature, "fp32", 64) for feature in FEATURES]
    order = {("bf16", 64): 0, ("bf16", 128): 1, ("fp16", 128): 2}
    return sorted(cases + single, key=lambda case: order.get((case.dtype, case.head_dim), 3))


def to_compile(cases: Sequence[ParityCase]) -> int:
    """How many kernels the cases compile together."""
    return len(set().union(*(case.specialisations() for case in cases)))


def gate(device: Device) -> list[ParityCase]:
    """The cases that must pass before anything is recorded: plain and causal as benchmarked, each feature once."""
    if device.torch_device == "cpu":
        return [ParityCase(feature, "fp32", 64) for feature in FEATURES if feature != "2048 tokens"]
    plain = [
        ParityCase(feature, dtype, head_dim)
        for dtype, head_dim, feature in itertools.product(("bf16", "fp16"), (128, 64, 256), ("plain", "causal"))
    ]
    return plain + [ParityCase(feature, "bf16", 64) for feature in FEATURES if feature not in ("plain", "causal")]


def failures(device: Device, cases: list[ParityCase]) -> Iterator[tuple[ParityCase, Exception]]:
    """The cases that break the rule or do not run, with the reason."""
    for case in cases:
        try:
            case.run(device)
        except Exception as error:  # a failure to compile or launch counts like a wrong number
            yield case, error


def describe(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def outcomes(feature: str, error: str | None) -> dict[str, str]:
    """The outcome of one case for each kernel that it runs.

    ``error`` is None or the text of a failure; `check_attention` and `check_kvcache` name the first wrong result, and
    check results in the order of ``kernels_of``.
    """
    kernels, kernels_of = FEATURES[feature].kernels, FEATURES[feature].kernels_of
    if error is None:
        return dict.fromkeys(kernels, "passed")
    wrong = error.removeprefix("AssertionError: ").partition(":")[0]
    if wrong not in kernels_of:
        return dict.fromkeys(kernels, "error")
    before = list(kernels_of)[: list(kernels_of).index(wrong)]
    result = dict.fromkeys(kernels, "not reached")
    result |= {name: "passed" for key in before for name in kernels_of[key] if name in result}
    return result | {name: "failed" for name in kernels_of[wrong] if name in result}
