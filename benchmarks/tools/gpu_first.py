"""The first minutes on a GPU: does it start, is it right, and how fast are the most informative rows?

    python -m benchmarks.tools.gpu_first --minutes 9

In this order: one kernel of each kind, parity of the main paths, then cells of the suites against cuDNN's and
FlashAttention-2's kernels as PyTorch has them, with what was predicted of them; then parity and cells of the CUDA C++
kernels, if `make ext` has compiled them, forward and backward each; then FlexAttention compiled. A red path blocks the
cells that rest on it and no others. Every row is stored at once, and all files are in one archive,
<output>/<gpu>.tar, which is written anew after each step and cell. Ends by itself before the time is over.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import cuda_kernels, gate, parity, predictions, results, runner, summary
from benchmarks.harness.checks import Checks, check_parity, report
from benchmarks.harness.device import Compiling, Device, DryRun, choose
from benchmarks.harness.parity import ParityCase
from benchmarks.harness.parity_features import FEATURES
from benchmarks.harness.peers import CUDA, PEERS
from benchmarks.harness.provenance import provenance
from benchmarks.harness.runner import Bench, Cell
from benchmarks.tools import status

PROVIDERS = ("fastattn", CUDA, "sdpa", "sdpa-cudnn", "sdpa-flash", "flex", "torch")
KINDS = ("causal", "bias gradient", "cache")
"""Features that between them launch every kernel."""
MAIN = (
    *(("causal", dtype, dim) for dtype, dim in (("bf16", 128), ("bf16", 64), ("bf16", 256), ("fp16", 128))),
    ("plain", "bf16", 128), ("key padding + causal", "bf16", 64), ("cache", "bf16", 128), ("GQA 4/2", "bf16", 64),
    ("packed sequences", "bf16", 64), ("block mask", "bf16", 64), ("cache, pages of 16", "bf16", 64),
    ("bias gradient", "bf16", 64), ("dropout", "bf16", 64), ("everything at once", "bf16", 64),
)  # fmt: skip
"""The paths that most callers take: feature, dtype, head dim."""
TELLING = (
    ("forward", "bf16 D=128 L=4096 causal"),
    ("backward", "bf16 D=128 L=4096 causal"),
    ("decode", "32/8 heads, batch 8, contiguous L=32768"),
    ("layers", "TransformerEncoderLayer L=4096 train, padded"),
    ("forward", "bf16 D=128 L=4096 full"),
    ("backward", "bf16 D=128 L=4096 full"),
    ("forward", "bf16 D=128 L=16384 causal"),
    ("backward", "bf16 D=128 L=16384 causal"),
    ("forward", "bf16 D=128 L=16384 full"),
    ("backward", "bf16 D=128 L=16384 full"),
)
"""Suite and label of a cell, most telling first."""
OF_CUDA = tuple(
    (suite, f"bf16 {shape}, CUDA C++")
    for shape in ("D=128 L=4096 causal", "D=128 L=16384 full", "D=64 L=4096 causal", "D=256 L=4096 causal")
    for suite in ("forward", "backward")
)
LAST = (
    ("forward", "bf16 D=128 L=4096 causal, other peers"),
    ("backward", "bf16 D=128 L=4096 causal, other peers"),
    ("decode", "32/8 heads, batch 8, contiguous L=32768, FlexAttention"),
    ("forward", "bf16 D=128 L=16384 causal, other peers"),
    ("backward", "bf16 D=128 L=16384 causal, other peers"),
)
"""FlexAttention, which compiles for each shape."""


def kinds() -> list[ParityCase]:
    return [ParityCase(feature, "bf16", 64) for feature in KINDS]


def main_paths() -> list[ParityCase]:
    return [ParityCase(*case) for case in MAIN]


def telling(device: Device, names: Sequence[tuple[str, str]] = (*TELLING, *OF_CUDA, *LAST)) -> list[Cell]:
    """The cells of these names.

    Raises:
        KeyError: a suite has no such cell any more.
    """
    suites = list(dict.fromkeys(suite for suite, _ in names))
    found = {(cell.suite, cell.label): cell for cell in runner.cells_of(suites, device)}
    return [found[name] for name in names]


def check_cuda(checks: Checks) -> None:
    """Parity of the CUDA C++ kernels, each pass in a process of its own; one row for each case."""
    missing = PEERS[CUDA].missing(checks.device.torch_device)
    for which in cuda_kernels.PASSES:
        if missing or checks.left <= 0:
            note = missing or checks.skip(status.CUDA, which)
            checks.record(status.CUDA, "not run", kernel=which, note=note)
            if missing:
                checks.count(status.CUDA, "not run")
                checks.not_run.append(f"{status.CUDA}: {which}: {missing}")
            continue
        for case, wrong in cuda_kernels.outcomes(which, min(cuda_kernels.SECONDS, checks.left / 2)).items():
            outcome = "failed" if wrong else "passed"
            feature = "causal" if case.causal else "plain"
            checks.record(
                status.CUDA, outcome, kernel=which, feature=feature, dtype=case.dtype, head_dim=case.head_dim,
                note=wrong,
            )  # fmt: skip
            checks.count(status.CUDA, outcome, f"{which}: {case}: {wrong}" if wrong else "")


def start_kernels(checks: Checks) -> None:
    """Launch every kernel once, without checking the results."""
    for case in kinds():
        started, outcome, note = time.monotonic(), "passed", ""
        if checks.left <= 0:
            outcome, note = "not run", checks.skip("start", str(case))
        else:
            try:
                case.launch(checks.device)
                checks.device.synchronize()
            except Exception as error:
                checks.see(error)
                outcome, note = "error", parity.describe(error)
            checks.count("start", outcome, f"{case}: {note}" if note else "")
        seconds = time.monotonic() - started
        print(f"start: {case}: {outcome} in {seconds:.1f} s {note}".rstrip(), flush=True)
        checks.record(
            "start", outcome, kernel=", ".join(FEATURES[case.feature].kernels), feature=case.feature,
            dtype=case.dtype, head_dim=case.head_dim, seconds=seconds, note=note,
        )  # fmt: skip


def line(row: results.Row) -> str:
    """A row as one line of the output, with its prediction."""
    shape = f"D={row['head_dim']} L={row['kv_len']}{' causal' if row['causal'] == 'yes' else ''}" * bool(row["q_len"])
    words = [f"{row['suite']} {row['mode']} {row['case']} {row['dtype']} {shape} {row['provider']}:"]
    words += [f"{float(row['p50_ms']):.4g} ms"] if row["p50_ms"] else []
    words += [f"{float(row['tflops']):.4g} TFLOP/s"] if row["tflops"] else []
    words += [f"{float(row['of_copy']):.0%} of a copy"] if row["of_copy"] else []
    words += [f"({row['note']})"] if row["note"] else []
    words += [f"-- {text}"] if (text := predictions.beside(row)) else []
    return " ".join(" ".join(words).split())


def measure(
    checks: Checks, bench: Bench, red: dict[ParityCase, Exception], names: Sequence[tuple[str, str]]
) -> None:  # fmt: skip
    """The cells of these names that rest on nothing red, each printed and stored as it comes."""
    cells = []
    for cell in telling(bench.device, names):
        if why := gate.blocking(cell.rests_on, red):
            checks.tally["rows", "not run"] += 1
            checks.not_run.append(f"{cell.suite} {cell.label}: parity red: {', '.join(map(str, why))}")
        else:
            cells.append(cell)
    shown, done = len(bench.rows), 0

    def after(cell: Cell) -> None:
        nonlocal shown, done
        rows, shown, done = bench.rows[shown:], len(bench.rows), done + 1
        for row in rows:
            print(line(row), flush=True)
        own = [row for row in rows if row["provider"] in ("fastattn", CUDA) and row["suite"] == cell.suite]
        checks.count("rows", "passed" if all(row["p50_ms"] for row in own) else "error")
        results.archive(bench.output / bench.device.folder)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SDPA explains every refusal; the rows say "cannot"
        try:
            runner.run_cells(bench, cells, checks.deadline, after)
        except runner.Fatal as error:
            checks.lost = True
            checks.problems.append(f"stopped: {error}")
    for row in bench.rows[shown:]:
        print(line(row))
    for cell in cells[done:]:
        checks.skip("rows", f"{cell.suite} {cell.label}")


def compile_share(spec: str) -> None:
    """Be one of the processes that compile what this run needs, by running it once."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    bench = Bench(device, Path(), only=PROVIDERS, record_rows=False)
    tasks: list[Callable[[], None]] = [lambda case=case: case.launch(device) for case in (*kinds(), *main_paths())]
    tasks += [lambda cell=cell: cell.run(bench) for cell in telling(device) if cell.compiles is not None]
    for index in runner.share(spec, tasks):
        with contextlib.suppress(Exception):  # shown when the same is run to be measured
            tasks[index]()
        device.free()


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    """Return 0, or 1 if something failed, or 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="everything counted in")
    parser.add_argument("--seconds", type=float, default=0.1, help="for which each call is repeated")
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors: tests every path without a GPU")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_share:
        compile_share(args.compile_share)
        return 0
    started = time.monotonic()
    device = device or choose(args.dry_run)
    if device.torch_device != "cuda" and not isinstance(device, DryRun):
        print("needs a CUDA device; --dry-run tests the paths without one")
        return 2
    stamp = provenance(device)
    print(", ".join(f"{name} {value}" for name, value in stamp.items()), flush=True)
    if runner.refuse_unknown(device, stamp):
        return 2
    deadline = device.clock() + args.minutes * 60 - runner.RESERVE
    if device.torch_device == "cuda":
        faulthandler.dump_traceback_later(max(10.0, args.minutes * 60), exit=True)  # the rows are stored by then
    checks = Checks(device, runner.output(args, device), deadline, stamp)
    start_kernels(checks)  # before compiling: this fails first
    results.archive(checks.output / device.folder)
    if device.torch_device == "cuda" and not checks.lost:
        jobs = (os.cpu_count() or 1) * 3 // 4 if args.compile_jobs is None else args.compile_jobs
        if jobs:
            seconds = runner.run_shares(["benchmarks.tools.gpu_first"], jobs, args.minutes * 60 / 4, checks.dead)
            print(f"compiled ahead in {seconds:.0f} s", flush=True)
    red = check_parity(checks, main_paths())
    results.archive(checks.output / device.folder)
    print(f"parity: {len(red)} of {len(MAIN)} main paths red, {checks.left:.0f} s left", flush=True)
    bench = Bench(device, checks.output, args.seconds, PROVIDERS, stamp=stamp)
    if not checks.lost:
        measure(checks, bench, red, TELLING)
    check_cuda(checks)
    results.archive(checks.output / device.folder)
    if not checks.lost:
        of_cuda = () if PEERS[CUDA].missing(device.torch_device) else OF_CUDA
        measure(checks, bench, red, (*of_cuda, *LAST))
    faulthandler.cancel_dump_traceback_later()
    print(summary.short(bench.rows))
    print(report(checks))
    print(f"{time.monotonic() - started:.0f} s; rows in {results.archive(checks.output / device.folder)}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
