"""The first minutes on a GPU, without one: the order, what stops what, predictions, the archive."""

import tarfile

import pytest

import fastattn
from benchmarks.harness import predictions, results
from benchmarks.harness.device import CudaDevice, DryRun
from benchmarks.tools import gpu_first, merge
from tests.support.benchmark_runs import row


def run(folder, *arguments, device=None):
    return gpu_first.main(["--dry-run", "--output", str(folder), *arguments], device=device)


def test_the_first_minutes_in_a_dry_run(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    marks = ("start: causal", "start: cache", "parity: 0 of 14", "forward forward grid bf16 D=128", "decode decode",
             "layers train TransformerEncoderLayer, padded", " flex: ", "check ", ".tar")  # fmt: skip
    places = [out.index(mark) for mark in marks]
    assert places == sorted(places)
    checks = {(r["check"], r["outcome"]) for r in results.read(tmp_path / "dry-run" / "parity.csv")}
    assert checks == {("start", "passed"), ("parity", "passed")}
    with tarfile.open(tmp_path / "dry-run.tar") as tar:
        names = set(tar.getnames())
    assert names == {f"dry-run/{name}.csv" for name in ("parity", "forward", "backward", "decode", "layers")}
    gpu, home = tmp_path / "gpu", tmp_path / "home"  # made-up figures are never merged: as if a GPU had made them
    (tmp_path / "dry-run").rename(gpu)
    assert len(list(merge.merge(results.archive(gpu), home))) == 5
    for path in gpu.glob("*.csv"):
        assert (home / "gpu" / path.name).read_text() == path.read_text()


def test_the_telling_cells_exist_and_flex_comes_last():
    labels = [cell.label for cell in gpu_first.telling(CudaDevice())]
    assert len(labels) == len(set(labels) | set(gpu_first.TELLING)) or len(labels) == len(gpu_first.TELLING)
    late = [i for i, label in enumerate(labels) if "other peers" in label or "FlexAttention" in label]
    assert late == list(range(late[0], len(labels)))


def test_a_red_path_blocks_its_own_rows(tmp_path, capsys, monkeypatch):
    right = fastattn.attention

    def wrong(*arguments, **options):
        results = right(*arguments, **options)
        return tuple(1.01 * x for x in results) if options.get("causal") else results

    monkeypatch.setattr("fastattn.testing.calls.attention", wrong)
    assert run(tmp_path) == 1
    forward = [r for r in results.read(tmp_path / "dry-run" / "forward.csv") if r["provider"] == "fastattn"]
    assert forward and {r["causal"] for r in forward} == {"no"}
    assert results.read(tmp_path / "dry-run" / "decode.csv")
    assert "forward bf16 D=128 L=4096 causal: parity red: causal, bf16, head dim 128" in capsys.readouterr().out


def test_it_stops_when_the_time_is_over(tmp_path, capsys):
    assert run(tmp_path, "--minutes", "0.2", device=DryRun(step=1.0)) == 0  # RESERVE leaves two seconds
    out = capsys.readouterr().out
    assert "of 15 cells measured" in out and "not run: rows: " in out
    assert (tmp_path / "dry-run.tar").exists()


def test_a_lost_device_ends_it_with_what_there_is(tmp_path, capsys, monkeypatch):
    def lose(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("fastattn.testing.calls.attention", lose)
    assert run(tmp_path) == 1
    assert "cells measured" not in capsys.readouterr().out
    assert (tmp_path / "dry-run.tar").exists() and not (tmp_path / "dry-run" / "forward.csv").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tflops": "400"}, "predicted 400 TFLOP/s, measured is 1.25 times as fast"),
        ({"tflops": "", "p50_ms": "0.5"}, "predicted 0.5 ms, measured is 0.50 times as fast"),
        ({"case": "", "of_matmul": "0.75"}, "predicted 75% of the peak, measured 80% of matrix products"),
        ({"head_dim": "64"}, ""),
        ({"causal": "yes"}, ""),
        ({"case": "", "q_len": "", "tflops": "500"}, "predicted 500 TFLOP/s, measured is 1.00 times as fast"),
    ],
)  # fmt: skip
def test_a_prediction_stands_beside_its_row(changes, text, tmp_path):
    stored = dict.fromkeys(results.FIELDS, "") | row(p50="") | changes
    results.upsert(tmp_path / "forward.csv", [stored])
    measured = row(tflops="500", note="", of_copy="", of_matmul="0.8")
    assert predictions.beside(measured, tmp_path) == text
    assert predictions.beside(measured | {"provider": "sdpa-cudnn"}, tmp_path) == ""
