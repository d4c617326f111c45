"""Every kernel compiles for every target without a GPU, and fits Hopper's registers at the shipped launch configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_TRITONS = {
    "3.6.0": os.environ.get("FASTATTN_TRITON_3_6", ""),
    "3.9.0": os.environ.get("FASTATTN_TRITON_3_9", ""),
}


def report(tmp_path, *arguments, python_path=()):
    """Rows of `python -m benchmarks.tools.compile_report`, where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*python_path, str(ROOT), *filter(None, sys.path)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.tools.compile_report", "--json", str(path), "--jobs", "1", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), result.stdout + result.stderr
    rows = json.loads(path.read_text())
    return rows["rows"] if isinstance(rows, dict) else rows


def hardly_spills_in_its_loop(row):
    """Spilled registers are accessed by less than a twentieth of the inner loop's instructions."""
    return 20 * row["local"] <= row["instructions"]


def describe(row):
    return f"{row['arch']} {row['kernel']} D{row['dim']} {row['feature']} {row['config']}: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["64", "128"])
def test_hopper_defaults_fit(dim, tmp_path):
    rows = report(tmp_path, "--arch", "sm_90", "--dims", dim, "--features", "plain", "causal", "packed", "block_mask")
    assert {row["kernel"] for row in rows} >= {"forward", "dkdv", "dq", "delta", "decode", "combine", "append"}
    for row in rows:
        assert not row["error"], describe(row)
        assert hardly_spills_in_its_loop(row), describe(row)
        if row["kernel"] in ("forward", "dkdv", "dq"):  # tiles of a decode step are too short for wgmma
            assert row["wgmma"] > 0 and row["smallest_n"] >= 16 and not row["serialised"], describe(row)
            assert row["prefetch"] >= 1, describe(row)
    shared = {(row["kernel"], row["feature"]): row["shared"] for row in rows}
    for kernel in ("forward", "dkdv", "dq"):  # as many tiles are loaded ahead where a block mask says which
        assert shared[kernel, "block_mask"] >= shared[kernel, "plain"], shared


@pytest.mark.slow
def test_hopper_at_head_dim_256(tmp_path):
    rows = report(tmp_path, "--arch", "sm_90", "--dims", "256", "--features", "causal")
    for row in rows:
        assert not row["error"], describe(row)
        assert hardly_spills_in_its_loop(row), describe(row)
        if row["kernel"] in ("forward", "dq"):
            assert row["wgmma"] > 0 and not row["serialised"], describe(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_everything_at_once_compiles(arch, tmp_path):
    rows = report(tmp_path, "--arch", arch, "--dims", "64", "--features", "everything")
    assert {row["kernel"] for row in rows} >= {"forward", "dkdv", "dq", "dbias", "decode"}
    for row in rows:
        assert not row["error"], describe(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_cache_kernels_spill_nothing(arch, tmp_path):
    kernels, features = ("decode", "combine", "append"), ("plain", "paged", "chunk")
    rows = report(tmp_path, "--arch", arch, "--dims", "64", "128", "--kernel", *kernels, "--features", *features)
    assert len(rows) == 2 * (3 + 1 + 2)
    for row in rows:
        assert not row["error"] and row["spills"] == 0, describe(row)


KERNEL_GROUPS = [("forward",), ("dkdv",), ("dq",), ("dbias", "delta", "decode", "combine", "append")]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNEL_GROUPS, ids=lambda kernels: kernels[0])
@pytest.mark.parametrize("version", OTHER_TRITONS)
def test_every_feature_compiles_with_the_oldest_and_the_newest_triton(version, kernels, tmp_path):
    folder = OTHER_TRITONS[version]
    if not folder:
        pytest.skip(f"no Triton {version} in its variable; `make test` installs it")
    options = ("--arch", "sm_90", "--dims", "64", "--kernel", *kernels, "--features", "all")
    rows = report(tmp_path, *options, python_path=[folder])
    assert rows and {row["triton"] for row in rows} == {version}
    for row in rows:
        assert not row["error"], describe(row)
        if row["feature"] == "causal":
            assert hardly_spills_in_its_loop(row) and not row["serialised"], describe(row)
