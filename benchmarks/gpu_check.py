"""Is it right on this GPU? Parity of every feature, the device tests, bit-equal repeats, the sanitizer; as data.

    python -m benchmarks.gpu_check --minutes 8

Writes <output>/<gpu>/parity.csv, from which `benchmarks.status` makes docs/status.md. Exit code 1 if anything failed.
"""

import argparse
import contextlib
import faulthandler
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn

from . import parity, results, runner
from .device import Compiling, Device, DryRun, choose
from .problems import DTYPES
from .provenance import ROOT, provenance

STEPS = ("parity", "tests", "repeats", "sanitizer")
SANITIZERS = ("memcheck", "racecheck")
# (Lq, Lk): one tile, tails, more keys than queries and fewer, several tiles.
REPEAT_SHAPES = ((1, 239), (239, 1), (3, 799), (127, 513), (128, 128), (257, 257), (1024, 1023), (2048, 2048))
REPEATS = 250


@dataclass
class Checks:
    """Where outcomes go."""

    device: Device
    output: Path
    deadline: float
    stamp: dict[str, str]
    tally: Counter[tuple[str, str]]
    problems: list[str]

    @property
    def left(self) -> float:
        return self.deadline - self.device.clock()

    def record(
        self, check: str, outcome: str, *, kernel: str = "", feature: str = "", dtype: str = "", head_dim: object = "",
        seconds: float = 0.0, note: str = "",
    ) -> None:  # fmt: skip
        """Store one outcome at once: "passed", "failed", "error", "not reached" or "not run"."""
        row = {
            "check": check, "kernel": kernel, "feature": feature, "dtype": dtype, "head_dim": str(head_dim),
            "outcome": outcome, "seconds": f"{seconds:.3g}", "note": note, **self.stamp,
        }  # fmt: skip
        results.upsert(self.output / self.device.folder / "parity.csv", [row])

    def count(self, check: str, outcome: str, problem: str = "") -> None:
        self.tally[check, outcome] += 1
        if problem:
            self.problems.append(f"{check}: {problem}")


# Parity of every feature


def check_parity(checks: Checks) -> None:
    """The matrix of `benchmarks.parity`, one row per kernel of each case."""
    for case in parity.matrix():
        if checks.left <= 0:
            checks.count("parity", "not run")
            continue
        started = time.monotonic()
        error = next((reason for _, reason in parity.failures(checks.device, [case])), None)
        for kernel, outcome in parity.outcomes(case.feature, error).items():
            checks.record(
                "parity", outcome, kernel=kernel, feature=case.feature, dtype=case.dtype, head_dim=case.head_dim,
                seconds=time.monotonic() - started, note=error or "",
            )  # fmt: skip
        checks.count("parity", "failed" if error else "passed", f"{case}: {error}" if error else "")


# The tests that take a device


class Recorder:
    """A pytest plugin: counts outcomes by test file and ends the run at the deadline."""

    def __init__(self, checks: Checks) -> None:
        self.checks, self.files, self.failed, self.stored = checks, {}, {}, 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, _, test = report.nodeid.partition("::")
            self.files.setdefault(file, Counter())[report.outcome] += 1
            if report.failed:
                self.failed.setdefault(file, []).append(test)
                self.checks.count("tests", "failed", report.nodeid)
            elif report.outcome == "passed":
                self.checks.count("tests", "passed")
        if time.monotonic() - self.stored > 2.0:
            self.store()
        if self.checks.left <= 0:
            import pytest

            pytest.exit("the time budget is spent", returncode=0)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.setdefault(report.nodeid, []).append("does not import")
            self.files.setdefault(report.nodeid, Counter())["failed"] += 1
            self.checks.count("tests", "failed", f"{report.nodeid} does not import")

    def store(self) -> None:
        self.stored = time.monotonic()
        for file, counts in self.files.items():
            failed = self.failed.get(file, [])
            note = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
            if failed:
                note += ": " + "; ".join(failed[:5])
            self.checks.record("tests", "failed" if failed else "passed", feature=Path(file).name, note=note)


def check_tests(checks: Checks) -> None:
    """pytest on the tests that take the ``device`` fixture, in this process so that each report counts at once."""
    if importlib.util.find_spec("pytest") is None:
        checks.count("tests", "not run", "pytest is not installed")
        return
    import pytest

    arguments = [str(ROOT / "tests"), "-q", "-p", "benchmarks.only_device", "-p", "no:cacheprovider", "--no-header",
                 "--continue-on-collection-errors", "--tb=line", "-rN"]  # fmt: skip
    if isinstance(checks.device, DryRun):
        arguments += ["--collect-only", "-qq"]
    elif importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    recorder = Recorder(checks)
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[recorder])
    recorder.store()


# Repeats


def run_once(device: Device, feature: str, q_len: int, kv_len: int, head_dim: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of one feature, as a call that gives the output and every gradient."""
    torch.manual_seed(0)
    dtype = torch.float32 if isinstance(device, DryRun) else DTYPES["bf16"]
    shape = parity.Shape(8, 4, 4, q_len, kv_len)
    tensors = [
        torch.randn(shape.batch, 4, length, head_dim, device=device.torch_device, dtype=dtype, requires_grad=True)
        for length in (q_len, kv_len, kv_len)
    ]
    drawn = parity.FEATURES[feature].options(shape, torch.Generator().manual_seed(0))
    options = {name: parity.on(device, option, dtype) for name, option in drawn.items()}
    leaves = [*tensors, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    dout = torch.randn(shape.batch, 4, q_len, head_dim, device=device.torch_device, dtype=dtype)

    def call() -> list[Tensor]:
        torch.manual_seed(0)  # the same dropout
        out = fastattn.attention(*tensors, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return call


@contextlib.contextmanager
def other_work(device: Device) -> Iterator[Callable[[], None]]:
    """A function that keeps the GPU busy on another stream, so that programs run in another order."""
    if device.torch_device != "cuda":
        yield lambda: None
        return
    stream = torch.cuda.Stream()
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a)

    yield work
    torch.cuda.synchronize()


def check_repeats(checks: Checks) -> None:
    """Every output element has one writer that adds in a fixed order: repeats must be equal bit for bit."""
    shapes = REPEAT_SHAPES[:2] if isinstance(checks.device, DryRun) else REPEAT_SHAPES
    dims = (16,) if isinstance(checks.device, DryRun) else (64, 128, 256)
    repeats = 2 if isinstance(checks.device, DryRun) else REPEATS
    for check, feature in (("determinism", "causal"), ("race", "causal"), ("race", "everything at once")):
        for head_dim in dims:
            started, outcome, note = time.monotonic(), "passed", ""
            for q_len, kv_len in shapes:
                if checks.left <= 0:
                    outcome, note = "not run", "the time budget is spent"
                    break
                try:
                    shape = (q_len, kv_len, head_dim)
                    different = count_different(checks.device, feature, shape, repeats, loaded=check == "race")
                except Exception as error:
                    outcome, note = "error", f"{q_len}x{kv_len}: {type(error).__name__}: {error}".splitlines()[0]
                    break
                if different:
                    outcome, note = "failed", f"{q_len}x{kv_len}: {different} of {repeats} repeats differ"
                    break
            checks.record(
                check, outcome, kernel="forward, backward", feature=feature, dtype="bf16", head_dim=head_dim,
                seconds=time.monotonic() - started, note=note or f"{repeats} repeats of {len(shapes)} shapes",
            )  # fmt: skip
            bad = outcome in ("failed", "error")
            checks.count(check, outcome, f"{feature}, head dim {head_dim}: {note}" if bad else "")


def count_different(device: Device, feature: str, shape: tuple[int, int, int], repeats: int, loaded: bool) -> int:
    """How many of the repeats differ from the first in any bit; ``shape`` is (Lq, Lk, D)."""
    call = run_once(device, feature, *shape)
    first = call()
    different = torch.zeros((), dtype=torch.int64, device=device.torch_device)
    with other_work(device) as work:
        for _ in range(repeats):
            if loaded:
                work()
            unequal = [(a != b).any() for a, b in zip(first, call(), strict=True)]
            different += torch.stack(unequal).any()
    return int(different)


# Sanitizer


def check_sanitizer(checks: Checks) -> None:
    """NVIDIA's compute-sanitizer over a few small calls in a process of its own."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for name in SANITIZERS:
        started = time.monotonic()
        outcome, note = "not run", ""
        if isinstance(checks.device, DryRun):
            sanitized(checks.device)
            note = "dry run"
        elif not Path(tool).is_file():
            note = "compute-sanitizer is not installed"
        elif checks.left < 20:
            note = "the time budget is spent"
        else:
            outcome, note = run_sanitizer(tool, name, min(120.0, checks.left / 4))  # the tests come after it
        checks.record(name, outcome, kernel="forward, backward", seconds=time.monotonic() - started, note=note)
        checks.count(name, outcome, note if outcome == "failed" else "")


def run_sanitizer(tool: str, name: str, limit: float) -> tuple[str, str]:
    """(outcome, note). Without torch's caching allocator, so that each tensor ends where its memory does."""
    words = [tool, "--tool", name, "--error-exitcode", "99"]
    words += [sys.executable, "-m", "benchmarks.gpu_check", "--sanitized"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "not run", f"did not finish within {limit:.0f} s"
    last = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    note = (last or result.stdout.splitlines() or [""])[-1][:200]
    if result.returncode == 0 and last:
        return "passed", note
    return ("failed" if last else "not run"), note


def sanitized(device: Device) -> None:
    """What runs under the sanitizer: tails in both directions, every optional operand."""
    for feature, head_dim in (("causal", 64), ("everything at once", 64), ("causal", 128)):
        run_once(device, feature, 77, 133, 16 if isinstance(device, DryRun) else head_dim)()


def compile_share(spec: str) -> None:
    """Be one of the processes that compile the parity matrix."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    cases = parity.matrix()
    for index in runner.share(spec, cases):
        with contextlib.suppress(Exception):
            cases[index].run(device)


def report(checks: Checks) -> str:
    """The table that ends the output."""
    lines = [f"{'check':12} {'passed':>7} {'failed':>7} {'error':>6} {'not run':>8}"]
    for check in dict.fromkeys(check for check, _ in checks.tally):
        counts = [checks.tally[check, outcome] for outcome in ("passed", "failed", "error", "not run")]
        lines.append(f"{check:12} {counts[0]:7} {counts[1]:7} {counts[2]:6} {counts[3]:8}")
    return "\n".join([*(problem[:200] for problem in checks.problems[:30]), *lines])


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors: tests every path without a GPU")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_share:
        compile_share(args.compile_share)
        return 0
    device = device or choose(args.dry_run)
    if args.sanitized:
        sanitized(device)
        return 0
    if device.torch_device != "cuda" and not isinstance(device, DryRun):
        print("needs a CUDA device; --dry-run tests the paths without one")
        return 2
    deadline = device.clock() + args.minutes * 60 - runner.RESERVE
    if device.torch_device == "cuda":
        faulthandler.dump_traceback_later(args.minutes * 60 + 60, exit=True)
    checks = Checks(device, runner.output(args, device), deadline, provenance(device), Counter(), [])
    print(", ".join(f"{name} {value}" for name, value in checks.stamp.items()))
    jobs = args.compile_jobs
    if jobs is None:
        jobs = (os.cpu_count() or 1) * 3 // 4 if device.torch_device == "cuda" else 0
    if jobs:
        seconds = runner.run_shares(["benchmarks.gpu_check"], jobs, args.minutes * 60 / 4)
        print(f"compiled ahead in {seconds:.0f} s")
    run = {"parity": check_parity, "tests": check_tests, "repeats": check_repeats, "sanitizer": check_sanitizer}
    # Tests take what they are given: they come last but keep their place in the list of steps.
    for step in sorted(args.steps, key=lambda step: step == "tests"):
        run[step](checks)
    faulthandler.cancel_dump_traceback_later()
    print(report(checks))
    print(f"rows in {checks.output / device.folder / 'parity.csv'}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
