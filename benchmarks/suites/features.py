"""Features against all peers that have them: GQA, bias, masks, dropout, windows, documents, block-sparse patterns.

To add a feature, add a row to FEATURES, and a field to `problems.Problem` if it is of a new kind.
"""

import functools
import itertools
from typing import Any

from benchmarks.harness.attention import measure
from benchmarks.harness.gate import needs
from benchmarks.harness.peers import FAST, OTHERS
from benchmarks.harness.problems import Problem
from benchmarks.harness.runner import Cell

DEVICES = ("cuda",)
TOKENS = 16384
LENGTHS = (4096, 1024)

# Case -> the fields that it changes in a Problem of 16 heads with head dim 128.
FEATURES: dict[str, dict[str, Any]] = {
    "GQA 32/8": {"q_heads": 32, "kv_heads": 8, "causal": True},
    "key padding": {"mask": "padding"},
    "boolean mask": {"mask": "random"},
    "bias": {"bias": "constant"},
    "bias with gradient": {"bias": "learned"},
    "dropout 0.1": {"dropout_p": 0.1},
    "causal + key padding": {"mask": "padding", "causal": True},
    "causal + bias": {"bias": "constant", "causal": True},
    "causal + dropout 0.1": {"dropout_p": 0.1, "causal": True},
    "causal + window 1024": {"window": 1024, "causal": True},
    "causal + ALiBi": {"alibi": True, "causal": True},
    "causal + softcap 30": {"softcap": 30.0, "causal": True},
    "causal + sinks": {"sinks": True, "causal": True},
}
LONG = 16384
# The same for one long sequence. The others are compared with the first line: operations count only the allowed pairs,
# and "causal as a block mask" visits the same tiles.
LONG_FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal + window 1024": {"window": 1024, "causal": True},
    "documents, packed": {"pattern": "documents", "packed": True, "causal": True},
    "documents, block mask": {"pattern": "documents", "causal": True},
    "causal as a block mask": {"pattern": "causal"},
    "prefix LM": {"pattern": "prefix"},
    "causal + every 8th block": {"pattern": "strided", "causal": True},
    "causal + window 1024 + softcap 30": {"window": 1024, "softcap": 30.0, "causal": True},
}


def cells() -> list[Cell]:
    """Most important first: long sequences, then the others at the first of LENGTHS."""
    wanted = [(LONG, case, changes, 1) for case, changes in LONG_FEATURES.items()]
    wanted += [
        (length, case, changes, 1 if length == LENGTHS[0] else 2)
        for length, (case, changes) in itertools.product(LENGTHS, FEATURES.items())
    ]
    found = []
    for (length, case, changes, priority), mode in itertools.product(wanted, ("forward", "backward")):
        if case == "bias with gradient" and mode == "forward":
            continue  # the same as a constant bias
        heads = {"q_heads": 16, "kv_heads": 16}
        problem = Problem(**{"batch": TOKENS // length, "length": length, "head_dim": 128, **heads, **changes})
        run = functools.partial(measure, suite="features", case=case, problem=problem, mode=mode)
        label, compiles = f"{case} L={length} {mode}", ("features", case, length, mode)
        own, others = functools.partial(run, providers=FAST), functools.partial(run, providers=OTHERS)
        found.append(Cell("features", label, own, priority, compiles, needs(problem)))
        # FlexAttention compiles each case, which takes longer than measuring all others.
        found.append(Cell("features", f"{label}, other peers", others, 3, (*compiles, "others"), needs(problem)))
    return found
