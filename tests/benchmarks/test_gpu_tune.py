"""The search for launch configurations, without a GPU."""

import dataclasses
from collections import Counter

import pytest

from benchmarks.harness import provenance, results, tuning
from benchmarks.harness.device import DryRun
from benchmarks.tools import gpu_tune
from fastattn.kernels.config import LaunchConfig


def test_tuner_dry_run_launches_and_finds_a_winner(tmp_path, capsys):
    arguments = ["--dry-run", "--output", str(tmp_path), "--match", "forward bf16 D=64"]
    assert gpu_tune.main(arguments) == 0
    rows = results.read(tmp_path / "dry-run" / "tune.csv")
    assert len(rows) == 6 and Counter(r["stage"] for r in rows)["winner"] == 2
    assert all(r["p50_ms"] and r["tflops"] and r["digest"] for r in rows)
    out = capsys.readouterr().out
    assert "2 of 2 searches" in out and "forward: 64: (" in out
    assert gpu_tune.main(["--table", str(tmp_path / "dry-run" / "tune.csv")]) == 0
    assert capsys.readouterr().out.strip() in out


def test_tuner_runs_backward_kernels(tmp_path, capsys):
    assert gpu_tune.main(["--dry-run", "--output", str(tmp_path), "--match", "dq bf16 D=64 causal"]) == 0
    assert "1 of 1 searches" in capsys.readouterr().out


def test_tuner_finds_how_to_decode(tmp_path, capsys):
    assert gpu_tune.main(["--dry-run", "--output", str(tmp_path), "--match", "decode bf16 D=64"]) == 0
    rows = results.read(tmp_path / "dry-run" / "tune.csv")
    assert len(rows) == 3 and Counter(r["stage"] for r in rows)["winner"] == 1
    assert all(r["p50_ms"] and r["tflops"] and r["split_programs"] for r in rows)
    out = capsys.readouterr().out
    assert "1 of 1 searches" in out and "decode: 64: (16, " in out and " programs, " in out


def test_decode_candidates_fit_and_keep_memory_busy():
    group = gpu_tune.Group("decode", "bf16", 128, True)
    pool = gpu_tune.candidates(group, "sm_90", {})
    assert {c.split_programs for c in pool} == {1, 2, 4} and len(set(pool)) == len(pool)
    for c in pool[1:]:
        on_the_way = 4 * 128 * c.block_n * c.num_stages
        assert on_the_way <= 227 * 1024 and (c.split_programs == 1 or c.split_programs * on_the_way <= 227 * 1024)
        assert gpu_tune.config_of(group.key(c)) == c


def test_tuner_varies_one_kernel():
    from fastattn.kernels import config

    candidate = LaunchConfig(16, 16, 1, 1)
    usual = config.lookup("forward", "sm_90", 64, 2)
    with gpu_tune.only("dkdv", candidate):
        assert config.lookup("dkdv", "sm_90", 64, 2) == candidate
        assert config.lookup("forward", "sm_90", 64, 2) == usual


def test_tuner_order_and_pruning(monkeypatch):
    group = gpu_tune.Group("forward", "bf16", 128, True)
    pool = gpu_tune.candidates(group, "sm_90", {})
    assert len(pool) == len(set(pool)) == 1 + tuning.UNKNOWN_AT_MOST
    close = set(tuning.near(pool[0], "forward", 128))
    assert {LaunchConfig(128, 128, 8, 3), LaunchConfig(64, 64, 8, 3), LaunchConfig(128, 64, 8, 4)} <= close
    assert all(candidate in close for candidate in pool[1:12])
    spilling = pool[1]
    fact = group.key(spilling) | {"spills": "8", "local": "8", "instructions": "100", "digest": "old"}
    facts = {tuple(group.key(spilling).values()): fact}
    assert gpu_tune.candidates(group, "sm_90", facts)[-1] == spilling
    fact["local"] = "2"  # what spills outside the loop costs nothing
    assert gpu_tune.candidates(group, "sm_90", facts)[-1] != spilling
    fact |= {"local": "8", "digest": provenance.digest()}
    assert spilling not in gpu_tune.candidates(group, "sm_90", facts)
    assert gpu_tune.groups()[0] == group


def test_tuner_records_what_does_not_compile(tmp_path):
    group = gpu_tune.Group("forward", "bf16", 64, False)
    tuner = gpu_tune.Tuner(DryRun(), tmp_path, 1e9, 0.01, provenance.provenance(DryRun()))
    pool = gpu_tune.candidates(group, "sm_90", {})[:2]

    def run():
        from fastattn.kernels import config

        if config.lookup("forward", "sm_90", 64, 2) == pool[1]:
            raise RuntimeError("out of resource: shared memory")

    medians = tuner.measure(group, pool, run, "search")
    assert medians.keys() == {pool[0]}
    bad = results.read(tmp_path / "dry-run" / "tune.csv")[0]
    assert bad["note"] == "cannot: out of resource: shared memory"


def test_tuner_skips_a_fast_winner_that_is_wrong(tmp_path, monkeypatch):
    group = gpu_tune.Group("forward", "bf16", 64, False)
    tuner = gpu_tune.Tuner(DryRun(), tmp_path, 1e9, 0.01, provenance.provenance(DryRun()))
    pool = gpu_tune.candidates(group, "sm_90", {})[:3]
    monkeypatch.setattr(gpu_tune, "runnable", lambda group, device: lambda: None)
    monkeypatch.setattr(tuner, "parity_error", lambda group, c: "out: wrong" if c == pool[0] else None)
    tuner.search(group, pool)
    stages = {gpu_tune.config_of(r): r["stage"] for r in results.read(tmp_path / "dry-run" / "tune.csv")}
    assert stages[pool[0]] == "wrong" and stages[pool[1]] == "winner"


def test_float16_searches_start_from_bfloat16(tmp_path):
    tuner = gpu_tune.Tuner(DryRun(), tmp_path, 1e9, 0.01, provenance.provenance(DryRun()))
    twin, group = gpu_tune.Group("forward", "bf16", 64, False), gpu_tune.Group("forward", "fp16", 64, False)
    pool = gpu_tune.candidates(group, "sm_90", {})
    assert tuner.shortlist(group, pool) == pool
    for number, candidate in enumerate(pool):
        tuner.record(twin, candidate, "search", (1.0, 100.0 - number, 1.0))
    assert tuner.shortlist(group, pool) == [pool[0], *pool[: -gpu_tune.CHUNK - 1 : -1]]
    assert tuner.shortlist(twin, pool) == pool


def test_resource_facts_are_stored(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.tools import compile_report

    def compile_case(case):
        return compile_report.Result(**dataclasses.asdict(case), registers=168, spills=4)

    monkeypatch.setattr(compile_report, "compile_case", compile_case)
    group = gpu_tune.Group("forward", "bf16", 64, False)
    candidate = gpu_tune.candidates(group, "sm_90", {})[0]
    path = tmp_path / "resources-sm_90.csv"
    results.upsert(path, [gpu_tune.resource_row("sm_90", group, candidate)])
    (fact,) = results.read(path)
    assert (fact["registers"], fact["spills"], fact["digest"]) == ("168", "4", provenance.digest())
