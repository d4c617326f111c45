"""Launches that are repeated are those that Triton's own way makes: on a stand-in for a GPU, with every Triton."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastattn.kernels import replay

ROOT = Path(__file__).resolve().parents[2]
TRITONS = {
    "installed": "",
    "3.6.0": os.environ.get("FASTATTN_TRITON_3_6", ""),
    "3.9.0": os.environ.get("FASTATTN_TRITON_3_9", ""),
}


def checks():
    source = (ROOT / "tests" / "support" / "replay_checks.py").read_text()
    return [line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def check_")]


@pytest.mark.parametrize("version", TRITONS)
def test_repeated_launches(version):
    folder = TRITONS[version]
    if version != "installed" and not folder:
        pytest.skip(f"Triton {version} is not here: make test installs it")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, str(ROOT), *sys.path]))
    command = [sys.executable, "-m", "tests.support.replay_checks"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    *done, last = result.stdout.split("\n")[:-1]
    assert done == checks() and len(done) >= 10
    assert version == "installed" or last == f"Triton {version}"


@pytest.mark.parametrize(("own", "current", "entered"), [(1, 0, [1]), (0, 0, []), (None, 0, [])])
def test_the_device_of_the_tensor_is_made_the_current_one(monkeypatch, own, current, entered):
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: devices.append(index) or contextlib.nullcontext())
    with replay.on_device(SimpleNamespace(is_cuda=own is not None, get_device=lambda: own)):
        assert devices == entered


def test_interpreted_kernels_are_launched_as_they_are():
    if replay.INTERPRETED.value:
        assert replay.replayed(checks) is checks
