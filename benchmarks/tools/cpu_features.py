"""The rate of every feature beside that of plain causal attention on this CPU, the two in turns.

`python -m benchmarks.tools.cpu_features [--variant avx2] [FEATURE ...]`: float32, one thread, 8 heads of 64, 1024
tokens, rates per allowed pair. The suite `cpu` measures a feature some minutes before or after causal attention, and
the rate of a virtual machine moves by more than a feature costs. So here a feature's share of the causal rate is the
median over pairs of calls.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.harness.attention import build_call
from benchmarks.harness.device import Call, Device
from benchmarks.harness.peers import OWN
from benchmarks.harness.problems import Problem, make_inputs
from benchmarks.suites.cpu import FEATURE_LENGTH, FEATURES, MODES, PLAIN, SIZES
from fastattn.backends.cpu import library

SECONDS = 1.0  # for each share
LEAST = 5  # pairs of calls


def prepare(changes: dict[str, object], mode: str) -> tuple[Call, float]:
    """(a call, which also checks the output; its floating-point operations over allowed pairs)."""
    problem = Problem(**{**SIZES, "length": FEATURE_LENGTH, **changes})
    inputs = make_inputs(problem, Device(), 0, mode == "backward")
    return build_call(OWN, problem, [inputs], mode), problem.flops(mode)


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call(0)
    return time.perf_counter() - start


def share(feature: tuple[Call, float], causal: tuple[Call, float]) -> float:
    (call, flops), (plain, plain_flops) = feature, causal
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < LEAST or time.perf_counter() < end:
        ratios.append(seconds(plain) / seconds(call))
    return statistics.median(ratios) * flops / plain_flops


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", metavar="FEATURE", help="default: all")
    parser.add_argument("--variant", help="of the kernels: avx2, for instance; default: the best of this processor")
    arguments = parser.parse_args(argv)
    names = arguments.features or list(FEATURES)
    if unknown := [name for name in names if name not in FEATURES]:
        parser.error(f"FEATURE: expected one of {', '.join(FEATURES)}, got {unknown[0]}")
    if arguments.variant and not library.load().fastattn_cpu_use_variant(arguments.variant.encode()):
        parser.error(f"--variant: not compiled, or not what this processor has: {arguments.variant}")
    torch.set_num_threads(1)
    causal = {mode: prepare(PLAIN["causal"], mode) for mode in MODES}
    variant = library.load().fastattn_cpu_variant().decode()
    print(f"share of the rate of causal attention, {FEATURE_LENGTH} tokens, {variant}, one thread")
    print(f"{'':20}" + "".join(f"{mode:>9}" for mode in MODES))
    for name in names:
        shares = (share(prepare(FEATURES[name], mode), causal[mode]) for mode in MODES)
        print(f"{name:20}" + "".join(f"{x:9.2f}" for x in shares), flush=True)


if __name__ == "__main__":
    main()
