"""Runs without a GPU: budgets, the parity gate, failures, compiling ahead."""

import dataclasses
import faulthandler
import shutil
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks.harness import attention, gate, parity, provenance, results, runner
from benchmarks.harness.device import CudaDevice, Device, DryRun
from benchmarks.harness.runner import Bench, Cell
from benchmarks.tools import gpu_check, gpu_first, gpu_tune
from fastattn.backends.cpu import library
from tests.support.benchmark_runs import SMALL, dry_run

ROOT = Path(__file__).resolve().parents[2]


def test_a_budget_keeps_the_most_important_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])
    minutes = (runner.RESERVE + 5.5) / 60  # the matrix products take two seconds of it, each cell one
    rows = dry_run(tmp_path, "forward", "--minutes", str(minutes), dev=DryRun(step=1.0))
    own = [r for r in rows if r["provider"] == "fastattn"]
    assert len(own) == 4
    assert all(
        (r["dtype"], r["q_len"], r["head_dim"]) in (("bf16", "4096", "128"), ("bf16", "4096", "64")) for r in own
    )
    assert "4 of 108 cells measured" in capsys.readouterr().out


def spoil(results, wrong):
    return tuple(1.01 * x for x in results) if wrong else results


def test_red_parity_blocks_what_rests_on_it(tmp_path, capsys, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr("fastattn.testing.calls.attention", lambda *a, **o: spoil(right(*a, **o), o.get("causal")))
    cases = [parity.ParityCase(feature, "fp32", 64) for feature in ("causal", "plain", "cache")]
    monkeypatch.setattr(parity, "gate", lambda device: cases)
    arguments = ["forward", "decode", "--dry-run", "--match", "L=1024"]
    assert runner.main([*arguments, "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "parity red: causal, fp32, head dim 64: AssertionError: out:" in out
    assert "cells rest on what is red and are not measured" in out and "\n0 of " not in out
    rows = [r for r in results.read(tmp_path / "dry-run" / "forward.csv") if r["provider"] == "fastattn"]
    assert {r["causal"] for r in rows} == {"no"} and all(r["note"].endswith("parity red: causal") for r in rows)
    assert results.read(tmp_path / "dry-run" / "decode.csv")
    assert runner.main([*arguments, "--ignore-gate", "--output", str(tmp_path)]) == 1
    assert {r["causal"] for r in results.read(tmp_path / "dry-run" / "forward.csv")} >= {"no", "yes"}


def test_what_a_red_case_blocks():
    red = parity.ParityCase("causal", "bf16", 128)
    cells = {(c.suite, c.label): c for c in runner.cells_of(["forward", "features", "decode", "layers"], CudaDevice())}

    def blocked(case):
        return {name for name, cell in cells.items() if gate.blocks(case, cell.rests_on)}

    own = blocked(red)
    assert ("forward", "bf16 D=128 L=4096 causal") in own and ("features", "causal + sinks L=4096 forward") in own
    assert not own & {
        ("forward", "bf16 D=128 L=4096 full"), ("forward", "bf16 D=64 L=4096 causal"),
        ("decode", "32/8 heads, batch 8, contiguous L=32768"),
    }  # fmt: skip
    assert {suite for suite, _ in blocked(parity.ParityCase("softcap", "bf16", 64))} == {"features"}
    assert not any("page 16 " in label for _, label in blocked(parity.ParityCase("cache", "bf16", 64)))
    assert not blocked(parity.ParityCase("offset per batch entry", "bf16", 64))


def test_a_lost_device_ends_the_gate(tmp_path, capsys, monkeypatch):
    def lose(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("fastattn.testing.calls.attention", lose)
    assert runner.main(["forward", "--dry-run", "--output", str(tmp_path)]) == 1
    assert "stopped: CUDA error: an illegal memory access" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.csv"))


def test_a_call_that_fails_when_repeated_costs_no_other(tmp_path, monkeypatch):
    calls = []

    def build_call(name, *arguments):
        def call(repeat):
            calls.append(name)
            if name == "sdpa-math":
                raise RuntimeError("out of luck")

        return call

    monkeypatch.setattr(attention, "build_call", build_call)
    bench = Bench(DryRun(), tmp_path, stamp=provenance.provenance(DryRun()))
    attention.measure(bench, "forward", "a", SMALL, "forward", ["fastattn", "sdpa-flash", "sdpa-math"])
    notes = {r["provider"]: (r["note"], bool(r["p50_ms"])) for r in results.read(tmp_path / "dry-run" / "forward.csv")}
    assert notes["sdpa-math"] == ("cannot: out of luck", False)
    assert notes["fastattn"][1] and notes["sdpa-flash"][1]


@pytest.mark.parametrize("module", [runner, gpu_check, gpu_tune, gpu_first])
def test_figures_of_unknown_code_are_not_measured(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(provenance, "revision", lambda: ("unknown", "unknown"))
    monkeypatch.setattr(gpu_tune, "architecture", lambda device: "sm_90")
    assert module.main(["--output", str(tmp_path)], device=PretendedGpu()) == 2
    assert "export FASTATTN_COMMIT=" in capsys.readouterr().out and not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("suite", ["huggingface", "cpu"])
def test_pytorchs_kernels_are_not_measured_for_ours(suite, tmp_path, monkeypatch, capsys):
    """Where the CPU library is missing, or of other sources."""
    monkeypatch.setattr(library, "problem", lambda: "expected sources a, built from b; build it again: make ext-cpu")
    monkeypatch.setattr(parity, "gate", lambda device: pytest.fail("it went on"))
    assert runner.main([suite, "--output", str(tmp_path)], device=Device()) == 2
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("expected the CPU kernels") and line.endswith("make ext-cpu")
    assert not list(tmp_path.rglob("*.csv"))


def test_suites_take_turns():
    suites = [cell.suite for cell in runner.cells_of(["forward", "backward", "decode", "layers"], CudaDevice())]
    assert {*suites[:4]} == {"forward", "backward", "decode", "layers"}
    labels = [cell.label for cell in runner.cells_of(["features", "decode"], CudaDevice())]
    first = next(i for i, label in enumerate(labels) if "other peers" in label or "FlexAttention" in label)
    usual = max(i for i, label in enumerate(labels) if "contiguous L=8192" in label and "Flex" not in label)
    assert usual < len(labels) and first > 40  # what compiles for each shape comes late


def test_a_failing_cell_costs_only_itself_and_a_lost_device_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])

    def fail(text):
        def run(bench):
            raise RuntimeError(text)

        return run

    def good(bench):
        bench.record("forward", {"case": "good", "provider": "fastattn", "mode": "forward", "dtype": "fp32"})

    def run(*cells):
        monkeypatch.setattr(runner, "cells_of", lambda suites, device: list(cells))
        return runner.main(["forward", "--dry-run", "--output", str(tmp_path)])

    assert run(Cell("forward", "a", fail("a bug")), Cell("forward", "b", good)) == 0
    assert "forward a: RuntimeError: a bug" in capsys.readouterr().out
    assert "good" in {r["case"] for r in results.read(tmp_path / "dry-run" / "forward.csv")}
    lost = fail("CUDA error: an illegal memory access was encountered")
    assert run(Cell("forward", "a", lost), Cell("forward", "b", fail("never reached"))) == 1
    out = capsys.readouterr().out
    assert "stopped: CUDA error: an illegal memory access" in out and "never reached" not in out


def test_what_cannot_run_is_a_row_with_the_reason(tmp_path):
    bench = Bench(DryRun(), tmp_path, stamp=provenance.provenance(DryRun()))
    attention.measure(bench, "features", "dropout", dataclasses.replace(SMALL, dropout_p=0.1), "forward", ["flex"])
    (cannot,) = results.read(tmp_path / "dry-run" / "features.csv")
    assert cannot["note"] == "cannot: no dropout" and cannot["p50_ms"] == ""
    bench.refused("features", {"provider": "a"}, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"))
    assert results.read(tmp_path / "dry-run" / "features.csv")[-1]["note"] == "cannot: out of memory"


def test_options_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])
    assert runner.main(["forward", "--list", "--match", "D=64"]) == 0  # without a GPU: nothing to list
    assert capsys.readouterr().out == ""
    assert runner.main(["forward", "--list", "--match", "D=64", "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 36
    if not torch.cuda.is_available():
        assert runner.main(["forward"]) == 0
        assert "nothing to measure on 'cpu'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["no-such-suite"])
    monkeypatch.setenv("OUT", str(tmp_path))
    match = ["--match", "bf16 D=64 L=512 full", "--providers", "fastattn", "--note", "shared machine"]
    assert runner.main(["forward", *match, "--dry-run"]) == 0
    rows = results.read(tmp_path / "dry-run" / "forward.csv")
    assert {r["provider"] for r in rows} == {"fastattn", "torch"}
    assert rows[-1]["note"] == "backend torch; shared machine"


class PretendedGpu(DryRun):
    """What `main` takes for a GPU; nothing may be put on it."""

    torch_device = "cuda"


def pretend(module, monkeypatch):
    """Nothing to check and one cell; returns the seconds after which each guard against hangs would end the run."""
    guards = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: guards.append(seconds))
    monkeypatch.setattr(parity, "gate", lambda device: [])
    monkeypatch.setattr(parity, "matrix", list)
    for limit in ("measure_matmul", "measure_copy"):
        monkeypatch.setattr(Bench, limit, lambda self, suite, when="": None)
    cell = Cell("forward", "a", lambda bench: bench.record("forward", {"case": "a", "provider": "fastattn"}))
    monkeypatch.setattr(runner, "cells_of", lambda suites, device: [cell])
    monkeypatch.setattr(gpu_tune, "groups", list)
    monkeypatch.setattr(gpu_tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(gpu_check, "STEPS", ("parity",))
    for name in ("kinds", "main_paths"):
        monkeypatch.setattr(gpu_first, name, list)
    for name in ("TELLING", "OF_CUDA", "LAST"):
        monkeypatch.setattr(gpu_first, name, ())
    monkeypatch.setattr(gpu_first, "check_cuda", lambda checks: None)
    return guards


@pytest.mark.parametrize("module", [runner, gpu_check, gpu_tune])
def test_a_gpu_run_compiles_ahead_and_guards_against_hangs(module, tmp_path, monkeypatch, capsys):
    guards = pretend(module, monkeypatch)
    shares = []
    monkeypatch.setattr(runner, "run_shares", lambda *words, **_: shares.append(words) or 1.0)
    arguments = ["--minutes", "6", "--output", str(tmp_path), "--compile-jobs", "3"]
    assert module.main(arguments, device=PretendedGpu()) == 0
    ((words, jobs, limit, *_),) = shares
    assert words[0].startswith("benchmarks") and jobs == 3 and 60 < limit < 180
    assert guards == [420.0] and "compiled ahead in 1 s" in capsys.readouterr().out


def test_all_files_of_a_run_are_in_one_archive(tmp_path, monkeypatch):
    """A machine that keeps eight files of a run keeps them all."""
    monkeypatch.setattr(parity, "gate", lambda device: [])
    suites = runner.SUITES[:9]

    def cell(suite):
        return Cell(suite, "a", lambda bench: bench.record(suite, {"case": "a", "provider": "fastattn"}))

    monkeypatch.setattr(runner, "cells_of", lambda names, device: [cell(suite) for suite in suites])
    assert runner.main(["all", "--dry-run", "--output", str(tmp_path)]) == 0
    with tarfile.open(tmp_path / "dry-run.tar") as tar:
        assert set(tar.getnames()) == {f"dry-run/{suite}.csv" for suite in suites}


def test_a_dry_run_never_writes_among_real_results(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    arguments = types.SimpleNamespace(output=None)
    assert not runner.output(arguments, DryRun()).is_relative_to(results.HERE)
    assert runner.output(arguments, Device()) == results.HERE


def test_compiling_ahead_deals_every_task_once(monkeypatch):
    tasks = list(range(10))
    dealt = [index for i in range(3) for index in runner.share(f"{i}/3", tasks)]
    assert sorted(dealt) == tasks and runner.share("0/3", tasks)[0] == 0
    ran = []
    monkeypatch.setattr(parity, "gate", lambda device: [])
    cells = [Cell("forward", str(i), lambda bench, i=i: ran.append(i), compiles=key) for i, key in enumerate("aab")]
    cells += [Cell("forward", "fails", lambda bench: 1 / 0, compiles="c"), Cell("forward", "none", ran.append)]
    monkeypatch.setattr(runner, "cells_of", lambda suites, device: cells)
    assert runner.main(["forward", "--compile-share", "0/1"]) == 0
    assert ran == [0, 2]


def test_compiling_processes_are_ended_at_the_limit(monkeypatch):
    started = time.monotonic()
    runner.run_shares(["benchmarks", "overhead"], jobs=2, limit=0.2)
    assert time.monotonic() - started < 10


def test_compiling_processes_that_fail_are_counted(capsys):
    runner.run_shares(["benchmarks.no_such_module"], jobs=2, limit=60.0)
    assert "2 of 2 compiling processes failed: " in capsys.readouterr().out


@pytest.mark.parametrize("module", [runner, gpu_check, gpu_first, gpu_tune])
def test_compiling_processes_that_die_fail_the_run(module, tmp_path, monkeypatch, capsys):
    """It goes on, because what is not compiled ahead is compiled when it is measured, and ends with exit code 1."""

    def run_shares(words, jobs, limit, report=print):
        report(f"{jobs} of {jobs} compiling processes failed: ImportError: no")
        return 1.0

    pretend(module, monkeypatch)
    monkeypatch.setattr(runner, "run_shares", run_shares)
    arguments = ["--minutes", "6", "--output", str(tmp_path), "--compile-jobs", "3"]
    assert module.main(arguments, device=PretendedGpu()) == 1
    out = capsys.readouterr().out
    assert "3 of 3 compiling processes failed: ImportError: no" in out and "compiled ahead in 1 s" in out


def test_module_runs():
    command = [sys.executable, "-m", "benchmarks", "overhead", "--list"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 overhead  sdpa\n" in result.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target, module",
    [
        ("gpu-check", "benchmarks.tools.gpu_check"),
        ("gpu-bench", "benchmarks all"),
        ("gpu-tune", "benchmarks.tools.gpu_tune"),
        ("gpu-first", "benchmarks.tools.gpu_first"),
    ],
)
def test_make_targets_need_no_environment(target, module):
    command = ["make", "--dry-run", "--no-print-directory", target, "MINUTES=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"python3 -m {module} --minutes 3\n"
