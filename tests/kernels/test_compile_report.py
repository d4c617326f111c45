"""Every kernel compiles for every target without a GPU, and fits Hopper's registers at the shipped launch configs."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, tool, *arguments):
    """Output of `python -m benchmarks.tools.TOOL`, where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", f"benchmarks.tools.{tool}", "--jobs", "1", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.stdout + result.stderr


def report(tmp_path, *arguments):
    """Rows of the compile report."""
    path = tmp_path / "report.json"
    output = run(tmp_path, "compile_report", "--json", str(path), *arguments)
    assert path.exists(), output
    rows = json.loads(path.read_text())
    return rows["rows"] if isinstance(rows, dict) else rows


def predicted_share(tmp_path, row, block_m, block_n):
    """What the static model says of the row's kernel with another tile: 0 where that does not compile or fit."""
    warps, stages, pipelined = re.fullmatch(r"\d+x\d+ w(\d+) s(\d+)( pipelined)?", row["config"]).groups()
    path = tmp_path / "shares.csv"
    path.unlink(missing_ok=True)
    run(
        tmp_path, "static_model", "--csv", str(path),
        "--tile", f"{block_m},{block_n},{warps},{stages},2,{int(bool(pipelined))}", "--kernel", row["kernel"],
        "--dims", str(row["dim"]), "--features", row["feature"],
    )  # fmt: skip
    return float(next(csv.DictReader(path.open()))["share"]) if path.exists() else 0.0


def assert_spills_cost_nothing(tmp_path, row):
    """No spilled register is accessed in the inner loop, except where each smaller tile is predicted to be slower."""
    if not row["local"]:
        return
    if row["kernel"] == "decode" and row["feature"] == "odd_dim":
        return  # it reads rows in pieces, for which 128 keys a tile leave too few registers; the model lacks decode
    assert row["kernel"] in ("forward", "dkdv", "dk", "dv", "dq"), describe(row)
    block_m, block_n = map(int, re.match(r"(\d+)x(\d+)", row["config"]).groups())
    share = predicted_share(tmp_path, row, block_m, block_n)
    for smaller in ((block_m // 2, block_n), (block_m, block_n // 2)):
        if min(smaller) >= 16:
            other = predicted_share(tmp_path, row, *smaller)
            assert share >= other, f"{share} with spills, {other} at {smaller}: {describe(row)}"


def describe(row):
    return f"{row['arch']} {row['kernel']} D{row['dim']} {row['feature']} {row['config']}: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["64", "128"])
def test_hopper_defaults_fit(dim, tmp_path):
    rows = report(tmp_path, "--arch", "sm_90", "--dims", dim, "--features", "plain", "causal", "packed", "block_mask")
    assert {row["kernel"] for row in rows} >= {"forward", "dkdv", "dq", "delta", "decode", "combine", "append"}
    for row in rows:
        assert not row["error"], describe(row)
        assert_spills_cost_nothing(tmp_path, row)
        if row["kernel"] in ("forward", "dkdv", "dq"):  # tiles of a decode step are too short for wgmma
            assert row["wgmma"] > 0 and row["smallest_n"] >= 16 and not row["serialised"], describe(row)
            assert row["prefetch"] >= 1, describe(row)
    shared = {(row["kernel"], row["feature"]): row["shared"] for row in rows}
    for kernel in ("forward", "dkdv", "dq"):  # as many tiles are loaded ahead where a block mask says which
        assert shared[kernel, "block_mask"] >= shared[kernel, "plain"], shared


@pytest.mark.slow
def test_hopper_at_head_dim_256(tmp_path):
    rows = report(
        tmp_path, "--arch", "sm_90", "--dims", "256", "--features", "causal", "dropout", "block_mask", "odd_dim"
    )
    assert {row["kernel"] for row in rows} >= {"forward", "dk", "dv", "dq"}
    for row in rows:
        assert not row["error"], describe(row)
        if row["kernel"] in ("forward", "dk", "dv", "dq"):
            assert_spills_cost_nothing(tmp_path, row)
            assert row["smallest_n"] >= 16 and row["mma_sync"] == 0 and not row["serialised"], describe(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_everything_at_once_compiles(arch, tmp_path):
    rows = report(tmp_path, "--arch", arch, "--dims", "64", "--features", "everything")
    assert {row["kernel"] for row in rows} >= {"forward", "dkdv", "dq", "dbias", "decode"}
    for row in rows:
        assert not row["error"], describe(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_loops_of_the_cache_kernels_spill_nothing(arch, tmp_path):
    kernels, features = ("decode", "combine", "append"), ("plain", "paged", "chunk")
    rows = report(tmp_path, "--arch", arch, "--dims", "64", "128", "--kernel", *kernels, "--features", *features)
    assert len(rows) == 2 * (3 + 1 + 2)
    for row in rows:
        outside = arch == "sm_90" and row["local"] == row["local_edge"] == 0  # counted there alone
        assert not row["error"] and (row["spills"] == 0 or outside), describe(row)
