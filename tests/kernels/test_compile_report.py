"""The tool that compiles kernels without a GPU. What all of them need stands in a table: test_resources.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(tmp_path, *arguments):
    """The finished process of the tool, where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "benchmarks.tools.compile_report", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_report_has_a_row_for_each_target(tmp_path):
    path = tmp_path / "report.json"
    kernels = ("combine", "append")
    done = run(tmp_path, "--kernel", *kernels, "--dims", "64", "--features", "plain", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [(row["arch"], row["kernel"]) for row in rows] == [
        (arch, name) for arch in ARCHITECTURES for name in kernels
    ]
    for row in rows:
        assert not row["error"] and row["spills"] == 0 < row["registers"], row
        assert f"{row['arch']:7} {row['kernel']:8}   64 plain" in done.stdout


@pytest.mark.slow
def test_what_does_not_compile_is_reported(tmp_path):
    done = run(tmp_path, "--arch", "sm_80", "--kernel", "delta", "--dims", "1048576", "--features", "plain")
    assert done.returncode == 1 and "delta    1048576 plain" in done.stdout
    assert "Error" in done.stdout.splitlines()[-1]
