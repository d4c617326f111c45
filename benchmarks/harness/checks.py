"""The record of the outcomes of checks on a GPU, and the check of parity, for the commands that check."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import parity, results, runner
from .device import Device


@dataclass
class Checks:
    """The record of outcomes."""

    device: Device
    output: Path
    deadline: float
    stamp: dict[str, str]
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    lost: bool = False
    """Whether the device no longer answers."""

    @property
    def left(self) -> float:
        """Seconds left; 0 on a lost device."""
        return 0.0 if self.lost else self.deadline - self.device.clock()

    def see(self, error: BaseException) -> None:
        """Remember if an error leaves the device unusable."""
        self.lost = self.lost or runner.is_lost(error)

    def skip(self, check: str, what: str) -> str:
        """Count a check that is left out; return the reason."""
        reason = "the device is lost" if self.lost else "the time budget is spent"
        self.tally[check, "not run"] += 1
        self.not_run.append(f"{check}: {what}")
        return reason

    def dead(self, text: str) -> None:
        """Processes that were to compile ahead died: a failure, though all is compiled when it is needed."""
        self.count("compile", "failed", text)

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


def check_parity(checks: Checks, cases: Sequence[parity.ParityCase]) -> dict[parity.ParityCase, Exception]:
    """Store one row per kernel of each case; return the failed cases with their reasons."""
    red = {}
    for case in cases:
        if checks.left <= 0:
            checks.skip("parity", str(case))
            continue
        started = time.monotonic()
        error = next((error for _, error in parity.failures(checks.device, [case])), None)
        reason = None if error is None else parity.describe(error)
        for kernel, outcome in parity.outcomes(case.feature, reason).items():
            checks.record(
                "parity", outcome, kernel=kernel, feature=case.feature, dtype=case.dtype, head_dim=case.head_dim,
                seconds=time.monotonic() - started, note=reason or "",
            )  # fmt: skip
        checks.count("parity", "failed" if error else "passed", f"{case}: {reason}" if error else "")
        if error is not None:
            red[case] = error
            checks.see(error)
    return red


def report(checks: Checks) -> str:
    """The table that ends the output."""
    lines = [f"{'check':12} {'passed':>7} {'failed':>7} {'error':>6} {'not run':>8}"]
    for check in dict.fromkeys(check for check, _ in checks.tally):
        counts = [checks.tally[check, outcome] for outcome in ("passed", "failed", "error", "not run")]
        lines.append(f"{check:12} {counts[0]:7} {counts[1]:7} {counts[2]:6} {counts[3]:8}")
    if checks.not_run:
        more = len(checks.not_run) - 20
        lines.append("not run: " + "; ".join(checks.not_run[:20]) + (f"; and {more} more" if more > 0 else ""))
    return "\n".join([*(problem[:200] for problem in checks.problems[:30]), *lines])
