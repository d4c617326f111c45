"""Is it right on this GPU? Parity of every feature, tensors of more than 2^31 elements, bit-equal repeats, the
sanitizer, the device tests; as data.

    python -m benchmarks.tools.gpu_check --minutes 8

The most informative checks come first. It writes <output>/<gpu>/parity.csv after each check; `benchmarks.tools.status`
makes docs/status.md from it. At the end it names the checks that it had no time for. Exit code 1 if any failed.
"""

import argparse
import contextlib
import faulthandler
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import parity, results, runner
from benchmarks.harness.checks import Checks, check_parity, report
from benchmarks.harness.device import Compiling, Device, DryRun, choose
from benchmarks.harness.large import check_large
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.repeats import check_repeats, check_sanitizer, sanitized
from benchmarks.tools.status import CUDA

STEPS = ("parity", "large", "repeats", "sanitizer", "tests")
OUTCOMES = {"passed": "passed", "failed": "failed", "skipped": "not run"}
SECONDS_PER_KERNEL = 2.0
"""Seconds to compile one kernel, roughly, for the forecast only."""


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
            if which := dict(report.user_properties).get("cuda_pass"):
                self.checks.record(CUDA, OUTCOMES[report.outcome], kernel=which, note=reason(report.longrepr))
        if time.monotonic() - self.stored > 2.0:
            self.store()
        if self.checks.left <= 0:
            import pytest

            self.checks.not_run.append("tests: the rest")

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


def reason(outcome: Any) -> str:
    """Why a test failed or was skipped, in one line, from a report's ``longrepr``."""
    if isinstance(outcome, tuple):  # of a skipped one: file, line, text
        return str(outcome[2])
    crash = getattr(outcome, "reprcrash", None)
    return (str(crash.message if crash else outcome or "").splitlines() or [""])[0][:200]


def check_tests(checks: Checks) -> None:
    """pytest on the tests that take the ``device`` fixture, in this process so that each report counts at once."""
    if importlib.util.find_spec("pytest") is None:
        checks.count("tests", "not run", "pytest is not installed")
        return
    if checks.left <= 0:
        checks.skip("tests", "all")
        return
    import pytest

    arguments = [str(ROOT / "tests"), "-q", "-p", "benchmarks.harness.only_device", "-p", "no:cacheprovider",
                 "--no-header", "--continue-on-collection-errors", "--tb=line", "-rN"]  # fmt: skip
    if isinstance(checks.device, DryRun):
        arguments += ["--collect-only", "-qq"]
    elif importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    recorder = Recorder(checks)
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[recorder])
    recorder.store()


def compile_share(spec: str) -> None:
    """Be one of the processes that compile the parity matrix, by launching its kernels."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    cases = parity.matrix()
    for index in runner.share(spec, cases):
        with contextlib.suppress(Exception):
            cases[index].launch(device)


def forecast(jobs: int) -> str:
    """What compiling the parity matrix will take."""
    cases = parity.matrix()
    kernels = parity.to_compile(cases)
    seconds = SECONDS_PER_KERNEL * kernels / jobs
    return f"{len(cases)} cases of parity compile {kernels} kernels: about {seconds:.0f} s in {jobs} processes"


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors: tests every path without a GPU")
    parser.add_argument("--sanitized", help=argparse.SUPPRESS)  # be what runs under the sanitizer: a feature
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_share:
        compile_share(args.compile_share)
        return 0
    device = device or choose(args.dry_run)
    if args.sanitized:
        return sanitized(device, args.sanitized)
    if device.torch_device != "cuda" and not isinstance(device, DryRun):
        print("needs a CUDA device; --dry-run tests the paths without one")
        return 2
    deadline = device.clock() + args.minutes * 60 - runner.RESERVE
    checks = Checks(device, runner.output(args, device), deadline, provenance(device))
    print(", ".join(f"{name} {value}" for name, value in checks.stamp.items()))
    if runner.refuse_unknown(device, checks.stamp):
        return 2
    if device.torch_device == "cuda":
        faulthandler.dump_traceback_later(args.minutes * 60 + 60, exit=True)
    most = max(1, (os.cpu_count() or 1) * 3 // 4)
    jobs = args.compile_jobs
    if jobs is None:
        jobs = most if device.torch_device == "cuda" else 0
    print(forecast(jobs or most))
    if jobs:
        seconds = runner.run_shares(["benchmarks.tools.gpu_check"], jobs, args.minutes * 60 / 4, checks.dead)
        print(f"compiled ahead in {seconds:.0f} s")
    run = {
        "parity": lambda checks: check_parity(checks, parity.matrix()),
        "large": check_large,
        "repeats": check_repeats,
        "sanitizer": check_sanitizer,
        "tests": check_tests,
    }
    for step in (step for step in STEPS if step in args.steps):
        print(f"{step}: {max(0.0, checks.left):.0f} s left", file=sys.stderr, flush=True)
        run[step](checks)
    faulthandler.cancel_dump_traceback_later()
    print(report(checks))
    results.archive(checks.output / device.folder)
    print(f"rows in {checks.output / device.folder / 'parity.csv'}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
