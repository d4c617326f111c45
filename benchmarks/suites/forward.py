"""Forward attention against every peer: 16k tokens, hidden size 2048, lengths 512 to 16k.

The grid of the FlashAttention papers: B * L = 16384, H * D = 2048, D of 64, 128 and 256, causal and not, bfloat16 and
float16.
"""

import functools
import itertools
from collections.abc import Iterator

from benchmarks.harness.attention import measure
from benchmarks.harness.gate import needs
from benchmarks.harness.peers import CUDA, FAST, OTHERS, OWN
from benchmarks.harness.problems import Problem
from benchmarks.harness.runner import Cell

DEVICES = ("cuda",)
TOKENS, HIDDEN = 16384, 2048
LENGTHS = (4096, 1024, 16384, 2048, 512, 8192)
OTHERS_LENGTHS = (4096, 1024, 16384)


def grid(mode: str) -> Iterator[Cell]:
    """The cells of one direction. Peers that are slow to compile or to run come last."""
    for length, head_dim, causal, dtype in itertools.product(LENGTHS, (128, 64, 256), (True, False), ("bf16", "fp16")):
        heads = HIDDEN // head_dim
        problem = Problem(TOKENS // length, heads, heads, length, head_dim, dtype, causal)
        label = f"{dtype} D={head_dim} L={length} {'causal' if causal else 'full'}"
        priority = 4 if dtype == "fp16" else 2 if head_dim == 256 else 0
        run = functools.partial(measure, suite=mode, case="grid", problem=problem, mode=mode)
        own, rests_on = functools.partial(run, providers=FAST), needs(problem)
        yield Cell(mode, label, own, priority, (mode, dtype, head_dim, causal), rests_on)
        if dtype == "bf16" and length in OTHERS_LENGTHS:
            compiles = (mode, "others", dtype, head_dim, causal, length)  # FlexAttention compiles for each shape
            others = functools.partial(run, providers=OTHERS)
            yield Cell(mode, f"{label}, other peers", others, 3, compiles, rests_on)
            ours = functools.partial(run, providers=(OWN, CUDA, "sdpa-cudnn"))
            yield Cell(mode, f"{label}, CUDA C++", ours, 3, (mode, dtype, head_dim, causal), rests_on)


def cells() -> list[Cell]:
    return list(grid("forward"))
