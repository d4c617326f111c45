"""One dry run of every suite, for the tests of what is made from its rows."""

import fcntl
import os

import pytest

from benchmarks.harness import parity
from tests.support.benchmark_runs import dry_run


@pytest.fixture(scope="session")
def dry(tmp_path_factory):
    """A folder with rows of every suite, which one process of this run makes for all."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "dry"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            make_rows(folder)
            (folder / "done").touch()
    return folder / "dry-run"


def make_rows(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "gate", lambda device: [])  # once is enough: test_red_parity_records_nothing
        for suite, match in (
            ("forward", "L=1024"), ("backward", "L=1024"), ("features", "L=1024"), ("features", "L=16384 forward"),
            ("layers", "L=1024"), ("layers", "training step"), ("memory", "L=1024"), ("memory", "L=2048"),
            ("overhead", ""), ("launch", ""), ("cpu", "L=128"), ("cpu", "decode, 8/8"), ("decode", "L=1024"),
            ("generation", "64 tokens"), ("huggingface", "L=2048"), ("scaling", ""),
        ):  # fmt: skip
            dry_run(folder, suite, "--match", match)
