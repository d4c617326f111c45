"""The CPU path against torch's: attention forward and backward, masks, and a layer with key padding."""

import functools
import itertools
import sys

from . import runner
from .attention import measure
from .bench_layers import measure_layer
from .problems import Problem
from .runner import Cell

DEVICES = ("cpu",)
LENGTHS = (128, 512, 1024)
PROVIDERS = ("fastattn", "sdpa")

SIZES: dict[str, object] = {"batch": 2, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32"}

# Case -> what it changes in a Problem of these sizes.
CASES: dict[str, dict[str, object]] = {
    "full": {},
    "causal": {"causal": True},
    "GQA 8/2": {"kv_heads": 2},
    "key padding": {"mask": "padding"},
    "causal + key padding": {"mask": "padding", "causal": True},
    "bias": {"bias": "constant"},
    "bias with gradient": {"bias": "learned"},
    "dropout 0.1": {"dropout_p": 0.1},
}


def cells() -> list[Cell]:
    found = []
    for length, (case, changes), mode in itertools.product(LENGTHS, CASES.items(), ("forward", "backward")):
        problem = Problem(**(SIZES | {"length": length} | changes))
        run = functools.partial(measure, suite="cpu", case=case, problem=problem, mode=mode, providers=PROVIDERS)
        found.append(Cell("cpu", f"{case} L={length} {mode}", run, 2 if length == 1024 else 1))
    for length, mode, padded in itertools.product((128, 512), ("train", "eval"), (True, False)):
        run = functools.partial(
            measure_layer, suite="cpu", kind="MultiheadAttention", length=length, mode=mode, padded=padded,
            providers=("fastattn", "torch"), dtype="fp32", tokens=1024, width=256,
        )  # fmt: skip
        found.append(Cell("cpu", f"MultiheadAttention L={length} {mode}{', padded' if padded else ''}", run, 1))
    return found


if __name__ == "__main__":
    sys.exit(runner.main(suites=("cpu",)))
