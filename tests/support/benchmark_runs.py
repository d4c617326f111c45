"""Rows, runs and repositories that the tests of the benchmarks share."""

import subprocess

from benchmarks.harness import results, runner
from benchmarks.harness.problems import Problem

SMALL = Problem(2, 4, 4, 24, 16, "fp32")


def row(provider="fastattn", p50="1", **columns):
    base = {
        "case": "grid", "mode": "forward", "provider": provider, "dtype": "bf16", "batch": "4", "q_heads": "16",
        "kv_heads": "16", "q_len": "4096", "kv_len": "4096", "head_dim": "128", "causal": "no", "p50_ms": p50,
        "p20_ms": p50, "p80_ms": p50, "min_ms": p50, "tflops": str(500 / float(p50)) if p50 else "",
        "gpu": "NVIDIA H100", "digest": "new", "date": "2026-12-01T00:00:00Z", "commit": "abc", "dirty": "no",
        "torch": "2.11.0", "triton": "3.6.0",
    }  # fmt: skip
    return base | columns


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def dry_run(tmp_path, suite, *arguments, dev=None):
    code = runner.main([suite, *arguments, "--dry-run", "--output", str(tmp_path)], device=dev)
    assert code == 0
    return results.read(tmp_path / "dry-run" / f"{suite}.csv")
