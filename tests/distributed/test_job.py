"""Processes that train together: what one of them fails of is said by the others, soon; and one process's losses."""

import pytest
import torch

import fastattn.distributed as fd
from fastattn.testing import assert_parity
from tests.support import ranks_job as work

GONE = "RankFailed: rank 1 ended or stopped without an error of its own: killed, out of memory, or its machine is gone"
STORE = "RankFailed: the process that holds the store of the job (the launcher or rank 0) is gone or stopped"
SAID = {
    "killed": GONE,
    "stopped": GONE,
    "raised": "RankFailed: rank 1 raised ValueError: on purpose",
    "first raised": "RankFailed: rank 0 raised ValueError: on purpose",
    "first killed": STORE,
    "first stopped": STORE,
    "killed on joining": GONE,
    "late": "RankFailed: rank 1 did not come to a message in time: alive, but slow or at something else",
    "interrupted": "ended after step 2",
}


@pytest.mark.parametrize("kind", SAID)
def test_a_rank_that_fails(ranks, kind):
    found = work.run(kind, 3 if kind in ("killed", "stopped", "raised") else 2)
    failed = found.pop(work.failing(kind))
    for answer, seconds in found:
        assert answer.startswith(SAID[kind]), answer
        assert seconds < work.TIMEOUT + 20.0  # a few, on a machine with nothing else to do
    if kind.endswith("raised"):
        assert failed is not None and failed[0] == "ValueError: on purpose"


def test_what_is_no_job(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(RuntimeError, match="start the program with torchrun --nproc-per-node 6"),
        fd.job({"a": 2, "b": 3}),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected a product of 2, the number of processes, got a=3"), fd.job({"a": 3}):
        pass


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(work.TEXT, encoding="utf-8")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("kind", "sizes", "dropout"),
    [("modern", (2, 1, 2), 0.0), ("gpt", (2, 2, 1), 0.0), ("modern", (1, 2, 2), 0.0), ("gpt", (1, 1, 4), 0.2)],
)
def test_the_losses_of_the_example_are_those_of_one_process(ranks, folder, kind, sizes, dropout):
    """With dropout, too, where ranks share the heads alone."""
    assert_losses(ranks.run(work.fit, sizes, kind, folder, torch.float32, None, dropout), kind, folder, dropout)


@pytest.mark.slow  # eight processes of its own
def test_data_sequence_and_heads_divided_together(ranks, folder):
    assert_losses(work.fit_on_eight(folder), "modern", folder)


def assert_losses(of_ranks, kind, folder, dropout=0.0):
    """Those of one process."""
    exact, eager = (work.fit(None, None, kind, folder, d, dropout=dropout) for d in (torch.float64, torch.float32))
    for found in of_ranks:
        for name, *numbers in zip(("train", "validation"), found, exact, eager, strict=False):
            assert_parity(*(torch.tensor(x, dtype=d) for x, d in zip(numbers, DTYPES, strict=True)), name=name)


DTYPES = (torch.float32, torch.float64, torch.float32)


def test_an_interrupted_run_goes_on_in_one_process(ranks, folder):
    """The checkpoint of several, after a step between two evaluations, is that of one."""
    assert ranks.run(work.fit, (2, 1, 2), "modern", folder, torch.float32, 4) == ["interrupted"] * 4
    exact, eager = (work.fit(None, None, "modern", folder, dtype) for dtype in (torch.float64, torch.float32))
    found = work.fit(None, None, "modern", folder, resume="ranks.pt")
    for numbers in zip(found[:2], exact, eager, strict=False):
        assert_parity(*(torch.tensor(x, dtype=d) for x, d in zip(numbers, DTYPES, strict=True)))
