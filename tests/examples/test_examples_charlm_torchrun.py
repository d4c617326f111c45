"""examples/charlm under torchrun, as a user starts and stops it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from examples.charlm import cli

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--model", "modern", "--block", "8", "--layers", "1", "--heads", "2", "--width", "16", "--batch", "4",
    "--device", "cpu", "--evaluate-every", "5", "--length", "4",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


def test_ctrl_c(tmp_path):
    """Every process ends, without a traceback of its own, and a checkpoint is left."""
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "own.txt", tmp_path / "output"
    path.write_text(20 * "the quick brown fox jumps over the lazy dog.\n", encoding="utf-8")
    options = ["--text", str(path), "--output", str(output), *SMALL]
    several = ["--steps", "100000", "--parallel", "dp=2", "--timeout", "20"]
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "examples.charlm", *options,
         *several],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        checkpoint, deadline = output / "modern.pt", time.monotonic() + 240
        while not checkpoint.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # what a terminal does
        printed, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert checkpoint.exists(), printed
    assert printed.count("stopped; the same command with --resume goes on from the last step") == 1, printed
    assert printed.count("2 processes") == 1
    own = [line for line in printed.splitlines() if "examples/charlm" in line]  # a traceback of torchrun's has none
    assert own == [], printed
    state = torch.load(checkpoint, weights_only=True)
    assert len(state["history"]["train"]) >= 5 and state["optimizer"]["state"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--parallel", "dp=2"], "expected sizes whose product is 1, the number of processes, got 2; torchrun"),
        (
            ["--parallel", "pp=2"],
            "argument --parallel: expected dp, cp or tp with positive sizes, as dp=2,tp=4, got pp",
        ),
        (["--parallel", "dp=0"], "positive sizes, as dp=2,tp=4, got dp=0"),
        (["--parallel", "dp"], "positive sizes, as dp=2,tp=4, got dp"),
    ],
)
def test_what_is_no_division(options, text, capsys):
    with pytest.raises(SystemExit):
        cli.parse_arguments(options)
    assert text in capsys.readouterr().err
