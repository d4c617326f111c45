"""The CPU path against PyTorch's: full and causal attention, every feature per allowed pair, and layers.

Plain attention is measured on one and on two threads; the peers take turns within a cell. After the run the ratios are
printed that `csrc/cpu/README.md` keeps; with ``--ratios`` alone, those of the stored rows.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator

import torch

from . import results, runner
from .attention import measure
from .bench_layers import measure_layer
from .device import Device
from .peers import OWN
from .problems import Problem
from .runner import Bench, Cell

DEVICES = ("cpu",)
LENGTHS = (128, 512, 1024, 2048, 4096)
HEAD_DIMS = (64, 128)
THREADS = (1, 2)
MODES = ("forward", "backward")
SDPA = "sdpa"
ANY_PEER = (OWN, SDPA, "flex", "sdpa-math")

SIZES: dict[str, object] = {"batch": 1, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32"}
PLAIN: dict[str, dict[str, object]] = {"full": {}, "causal": {"causal": True}}

# Of the features: their rates are held against that of "causal". Packed documents are far shorter than a tile.
FEATURE_LENGTH = 1024
FEATURES: dict[str, dict[str, object]] = {
    "window 256": {"window": 256, "causal": True},
    "softcap 30": {"softcap": 30.0, "causal": True},
    "ALiBi": {"alibi": True, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "GQA 8/2": {"kv_heads": 2, "causal": True},
    "mask": {"mask": "random", "causal": True},
    "bias": {"bias": "constant", "causal": True},
    "bias with gradient": {"bias": "learned", "causal": True},
    "dropout 0.1": {"dropout_p": 0.1, "causal": True},
    "packed documents": {"pattern": "documents", "packed": True, "causal": True},
    "block mask": {"pattern": "causal"},
    "bf16": {"dtype": "bf16", "causal": True},
    "fp16": {"dtype": "fp16", "causal": True},
}

# Case -> what it changes in a Problem of these sizes.
CASES = PLAIN | FEATURES


def cells() -> list[Cell]:
    """Most important first: plain attention, features, long sequences, layers."""
    found = []
    for length, head_dim, threads in itertools.product(LENGTHS, HEAD_DIMS, THREADS):
        for (case, changes), mode in itertools.product(PLAIN.items(), MODES):
            problem = Problem(**(SIZES | {"length": length, "head_dim": head_dim} | changes))
            priority = 3 if length > 2048 else 1
            found.append(attention_cell(case, problem, mode, threads, (OWN, SDPA), priority))
    for (case, changes), mode in itertools.product(FEATURES.items(), MODES):
        problem = Problem(**(SIZES | {"length": FEATURE_LENGTH} | changes))
        found.append(attention_cell(case, problem, mode, 1, ANY_PEER, 2))
    for length, mode, padded in itertools.product((64, 256, 1024), ("train", "eval"), (True, False)):
        run = functools.partial(
            measure_layer, suite="cpu", kind="MultiheadAttention", length=length, mode=mode, padded=padded,
            providers=("fastattn", "torch"), dtype="fp32", tokens=1024, width=256,
        )  # fmt: skip
        found.append(Cell("cpu", f"MultiheadAttention L={length} {mode}{', padded' if padded else ''}", run, 2))
    return found


def attention_cell(
    case: str, problem: Problem, mode: str, threads: int, providers: tuple[str, ...], priority: int
) -> Cell:  # fmt: skip
    run = functools.partial(
        measure_threads, case=case, problem=problem, mode=mode, threads=threads, providers=providers
    )
    label = f"{case} L={problem.length} D={problem.head_dim} {mode}, {counted(threads)}"
    return Cell("cpu", label, run, priority)


def counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def measure_threads(
    bench: Bench, case: str, problem: Problem, mode: str, threads: int, providers: tuple[str, ...]
) -> None:  # fmt: skip
    """`measure` on this many threads, which become part of the case."""
    before, stamp, ceiling = torch.get_num_threads(), bench.stamp, bench.matmul_tflops
    torch.set_num_threads(threads)
    bench.stamp = stamp | {"threads": str(threads)}
    bench.matmul_tflops = {}  # measured on another number of threads
    try:
        measure(bench, "cpu", f"{case}, {counted(threads)}", problem, mode, providers)
    finally:
        torch.set_num_threads(before)
        bench.stamp, bench.matmul_tflops = stamp, ceiling


# Ratios


def ratios(rows: Iterable[results.Row]) -> Iterator[str]:
    """Lines that say how often fastattn is as fast as a peer, and which share of the causal rate a feature has."""
    timed = [row for row in rows if row["p50_ms"] and row["mode"] in MODES]
    for (case, mode), group in grouped(timed, "case", "mode"):
        speedups = {f"L={own['q_len']} D={own['head_dim']}": best for own, best in against(group, (SDPA,))}
        if case.partition(",")[0] in PLAIN and speedups:
            worst = min(speedups, key=speedups.__getitem__)
            mean = math.exp(sum(map(math.log, speedups.values())) / len(speedups))
            yield f"{case:28} {mode:9} {mean:5.2f} x SDPA in the mean, least {speedups[worst]:.2f} at {worst}"
    at_length = [row for row in timed if row["q_len"] == str(FEATURE_LENGTH) and row["head_dim"] == "64"]
    for mode in MODES:
        rates = {
            row["case"]: float(row["tflops"]) for row in at_length if row["provider"] == OWN and row["mode"] == mode
        }
        peers = {row["case"]: best for row, best in against([r for r in at_length if r["mode"] == mode], ANY_PEER[1:])}
        for feature in FEATURES:
            name, causal = f"{feature}, 1 thread", rates.get("causal, 1 thread")
            if name in rates and causal:
                best = f", {peers[name]:.2f} x the best peer" if name in peers else ""
                yield f"{name:28} {mode:9} {rates[name] / causal:5.2f} of the causal rate{best}"


def against(rows: Iterable[results.Row], peers: tuple[str, ...]) -> Iterator[tuple[results.Row, float]]:
    """(row of fastattn, how many times as long the fastest of the peers takes) for each problem that both compute."""
    names = [name for name in results.KEY if name != "provider"]
    for _, group in grouped(rows, *names):
        own = [row for row in group if row["provider"] == OWN]
        others = [float(row["p50_ms"]) for row in group if row["provider"] in peers]
        if own and others:
            yield own[0], min(others) / float(own[0]["p50_ms"])


def grouped(rows: Iterable[results.Row], *names: str) -> list[tuple[tuple[str, ...], list[results.Row]]]:
    """Rows with the same values in these columns, in the order in which they first occur."""
    groups: dict[tuple[str, ...], list[results.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def main() -> int:
    status = 0 if sys.argv[1:] == ["--ratios"] else runner.main(suites=("cpu",))
    path = results.output_folder(None) / Device().folder / "cpu.csv"
    print(*ratios(results.read(path)), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
