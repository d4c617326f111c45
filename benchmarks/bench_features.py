"""Features against whichever peers have them: GQA, bias, masks, key padding, dropout.

Another feature is another row of FEATURES, and a field of `problems.Problem` if it is of a new kind.
"""

import functools
import itertools
import sys

from . import runner
from .attention import measure
from .peers import FAST, OTHERS
from .problems import Problem
from .runner import Cell

DEVICES = ("cuda",)
TOKENS = 16384
LENGTHS = (4096, 1024)

# Case -> what it changes in a Problem of 16 heads with head dim 128.
FEATURES: dict[str, dict[str, object]] = {
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


def cells() -> list[Cell]:
    found = []
    for (length, (case, changes)), mode in itertools.product(
        itertools.product(LENGTHS, FEATURES.items()), ("forward", "backward")
    ):
        if case == "bias with gradient" and mode == "forward":
            continue  # the same as a constant bias
        heads = {"q_heads": 16, "kv_heads": 16}
        problem = Problem(**{"batch": TOKENS // length, "length": length, "head_dim": 128, **heads, **changes})
        run = functools.partial(
            measure, suite="features", case=case, problem=problem, mode=mode, providers=(*FAST, *OTHERS)
        )
        found.append(Cell("features", f"{case} L={length} {mode}", run, 1, ("features", case, length, mode)))
    return found


if __name__ == "__main__":
    sys.exit(runner.main(suites=("features",)))
