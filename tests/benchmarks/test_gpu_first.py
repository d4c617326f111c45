"""The first minutes on a GPU, without one: the order, what stops what, predictions, the archive."""

import contextlib
import dataclasses
import json
import sys
import tarfile

import pytest

import fastattn
from benchmarks.harness import cuda_kernels, peers, predictions, results
from benchmarks.harness.device import CudaDevice, Device, DryRun
from benchmarks.harness.problems import WrongResult
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
    assert checks == {("start", "passed"), ("parity", "passed"), ("CUDA C++", "not run")}
    assert "not run: CUDA C++: forward: needs a CUDA device; CUDA C++: backward: needs a CUDA device" in out
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
    assert len(labels) == len(gpu_first.TELLING) + len(gpu_first.OF_CUDA) + len(gpu_first.LAST)
    late = [i for i, label in enumerate(labels) if "other peers" in label or "FlexAttention" in label]
    assert late == list(range(late[0], len(labels)))
    of_cuda = [i for i, label in enumerate(labels) if label.endswith("CUDA C++")]
    assert of_cuda == list(range(late[0] - len(of_cuda), late[0])) and len(of_cuda) == 8


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
    assert "of 10 cells measured" in out and "not run: rows: " in out and "causal, other peers" in out
    assert (tmp_path / "dry-run.tar").exists()


def test_a_lost_device_ends_it_with_what_there_is(tmp_path, capsys, monkeypatch):
    def lose(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("fastattn.testing.calls.attention", lose)
    assert run(tmp_path) == 1
    assert "cells measured" not in capsys.readouterr().out
    assert (tmp_path / "dry-run.tar").exists() and not (tmp_path / "dry-run" / "forward.csv").exists()


# The CUDA C++ kernels


def without_library(attention, factor=1.0):
    """What asks for the backend "cuda" gets the default one's results, times ``factor``."""

    def call(*arguments, **options):
        if options.get("backend") != "cuda":
            return attention(*arguments, **options)
        results = attention(*arguments, **options | {"backend": None})
        return tuple(factor * x for x in results) if isinstance(results, tuple) else factor * results

    return call


def test_a_pass_of_the_cuda_kernels_that_is_red_costs_its_rows_alone(tmp_path, capsys, monkeypatch):
    """As if the library were there, the forward pass right and the backward wrong."""
    monkeypatch.setattr(fastattn, "attention", without_library(fastattn.attention))
    there = dataclasses.replace(peers.PEERS[peers.CUDA], cpu=True, problem=lambda: None)
    monkeypatch.setitem(peers.PEERS, peers.CUDA, there)
    cases = [cuda_kernels.Case("fp32", 32, causal) for causal in (True, False)]  # what a dry run makes of the problems
    known = {"forward": dict.fromkeys(cases, ""), "backward": dict.fromkeys(cases, "AssertionError: dq")}
    monkeypatch.setattr(cuda_kernels, "_known", known)
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    assert out.index("decode decode") < out.index("grid bf16 D=128 L=4096 causal fastattn-cuda:") < out.index(" flex: ")
    assert "CUDA C++: backward: causal, fp32, head dim 32: AssertionError: dq" in out

    def measured(suite):
        return [r for r in results.read(tmp_path / "dry-run" / f"{suite}.csv") if r["provider"] == peers.CUDA]

    forward, backward = measured("forward"), measured("backward")
    assert len(forward) == len(backward) == len(gpu_first.OF_CUDA) // 2
    assert all(row["p50_ms"] for row in forward)
    assert all(row["note"].startswith("cannot: parity red: backward: ") and not row["p50_ms"] for row in backward)
    for each in (*forward, *backward):
        prediction = predictions.of(each)
        assert prediction is not None and prediction["mode"] == each["mode"]
        assert (prediction["provider"], prediction["head_dim"]) == (peers.CUDA, each["head_dim"])
    checks = [r for r in results.read(tmp_path / "dry-run" / "parity.csv") if r["check"] == "CUDA C++"]
    assert {(r["kernel"], r["outcome"]) for r in checks} == {("forward", "passed"), ("backward", "failed")}


def child(monkeypatch, code):
    monkeypatch.setattr(cuda_kernels, "command", lambda which: [sys.executable, "-c", code])


def test_a_deadlock_costs_its_limit_and_the_cases_before_it_are_known(monkeypatch):
    first = cuda_kernels.CASES[0]
    child(monkeypatch, f"import time; print({json.dumps([first, ''])!r}, flush=True); time.sleep(60)")
    monkeypatch.setattr(cuda_kernels, "_known", {})
    found = cuda_kernels.outcomes("forward", 2.0)
    assert found[first] == "" and len(found) == len(cuda_kernels.CASES)
    assert {text for case, text in found.items() if case != first} == {"no result within 2 s"}


def test_a_pass_that_dies_says_why(monkeypatch):
    first = cuda_kernels.CASES[0]
    child(monkeypatch, f"print({json.dumps([first, 'out'])!r}, flush=True); raise RuntimeError('illegal instruction')")
    found = cuda_kernels.run("forward", 30.0)
    assert found.pop(first) == "out" and set(found.values()) == {"RuntimeError: illegal instruction"}


def test_the_process_names_each_case_that_is_wrong(monkeypatch, capsys):
    def check(which, case):
        assert case.head_dim != 64, f"{which}: largest error"

    monkeypatch.setattr(cuda_kernels, "check", check)
    cuda_kernels.main("backward")
    found = {cuda_kernels.Case(*case): text for case, text in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == cuda_kernels.CASES
    assert {case.head_dim for case, text in found.items() if text} == {64}


@pytest.mark.parametrize("which", cuda_kernels.PASSES)
def test_a_case_is_held_to_the_rule(which, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(cuda_kernels, "CudaDevice", Device)
    case = cuda_kernels.Case("bf16", 64, True)
    for factor in (1.0, 1.05):
        attention = without_library(right, factor)
        monkeypatch.setattr(fastattn, "attention", attention)
        monkeypatch.setattr("fastattn.testing.calls.attention", attention)
        with contextlib.nullcontext() if factor == 1.0 else pytest.raises((AssertionError, WrongResult)):
            cuda_kernels.check(which, case)


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
