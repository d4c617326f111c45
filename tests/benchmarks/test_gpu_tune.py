"""The search for launch configurations, without a GPU."""

import dataclasses
from collections import Counter

import pytest

from benchmarks.harness import provenance, results, tuning
from benchmarks.harness.device import DryRun
from benchmarks.tools import gpu_tune
from fastattn.kernels import config
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
    candidate = LaunchConfig(16, 16, 1, 1)
    usual = config.lookup("forward", "sm_90", 64, 2)
    with gpu_tune.only("dkdv", candidate):
        assert config.lookup("dkdv", "sm_90", 64, 2) == candidate
        assert config.lookup("forward", "sm_90", 64, 2) == usual


def fact(candidate, **values):
    """A row of facts as the search finds it: that of a candidate of the forward kernel at head dim 128."""
    key = tuning.fact_key("forward", 128, candidate)
    row = dict.fromkeys(results.CANDIDATES_FIELDS, "") | dict(zip(results.CANDIDATES_KEY, key, strict=True))
    return {key: row | {"instructions": "100", "share": "0.5", "digest": "old"} | values}


def test_tuner_order_and_pruning():
    group = gpu_tune.Group("forward", "bf16", 128, True)
    pool = gpu_tune.candidates(group, "sm_90", {})
    assert len(pool) == len(set(pool)) == 1 + tuning.UNKNOWN_AT_MOST
    close = set(tuning.near(pool[0], "forward", 128))
    assert {LaunchConfig(128, 128, 8, 3), LaunchConfig(64, 64, 8, 3), LaunchConfig(128, 64, 8, 4)} <= close
    assert all(candidate in close for candidate in pool[1:12])
    spilling = pool[1]
    assert gpu_tune.candidates(group, "sm_90", fact(spilling, local="8"))[-1] == spilling
    assert gpu_tune.candidates(group, "sm_90", fact(spilling, local="2"))[-1] != spilling  # outside the loop, most
    current = provenance.code_digest(without=tuning.UNRELATED)
    for values in ({"local": "8"}, {"error": "out of shared memory"}):
        facts = fact(spilling, **values, digest=current)
        assert spilling not in gpu_tune.candidates(group, "sm_90", facts)
    assert gpu_tune.groups()[0] == group


def test_candidates_that_are_predicted_to_be_slow_are_left_out():
    current = provenance.code_digest(without=tuning.UNRELATED)
    best, slow, far = LaunchConfig(128, 128, 8, 3), LaunchConfig(64, 64, 8, 3), LaunchConfig(64, 16, 4, 3)
    facts = {}
    for candidate, share in ((best, "0.8"), (slow, "0.5"), (far, "0.7")):
        facts |= fact(candidate, share=share, digest=current)
    for causal, dtype in ((True, "bf16"), (False, "fp16")):  # which does not change what is known
        group = gpu_tune.Group("forward", dtype, 128, causal)
        pool = gpu_tune.candidates(group, "sm_90", facts)
        close = set(tuning.near(pool[0], "forward", 128))
        assert set(pool) == {pool[0], far, *close} - {slow} and best in close and far not in close
    older = {key: row | {"digest": "old"} for key, row in facts.items()}
    assert slow in gpu_tune.candidates(group, "sm_90", older)


def test_stored_facts_leave_out_candidates():
    """Only those of the present kernels do, so they are made again after a change."""
    facts = tuning.load_facts("sm_90")
    (digest,) = {row["digest"] for row in facts.values()}
    assert digest == provenance.code_digest(without=tuning.UNRELATED), "gpu_tune --resources sm_90"
    searched = {(row["kernel"], row["head_dim"]) for row in facts.values()}
    assert searched
    for group in gpu_tune.groups():
        if (group.kernel, str(group.head_dim)) in searched:
            known = gpu_tune.candidates(group, "sm_90", facts)
            close = {*tuning.near(known[0], group.kernel, group.head_dim)}
            every = {*close, *config.search_space(group.kernel, group.head_dim)}
            assert len(known) <= len(every) // 2, group


def test_tuner_records_what_does_not_compile(tmp_path):
    group = gpu_tune.Group("forward", "bf16", 64, False)
    tuner = gpu_tune.Tuner(DryRun(), tmp_path, 1e9, 0.01, provenance.provenance(DryRun()))
    pool = gpu_tune.candidates(group, "sm_90", {})[:2]

    def run():
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

    def compile_case(case, memory):
        m, n, warps, stages, _, pipelined = map(int, case.override.split(","))
        name = f"{m}x{n} w{warps} s{stages}" + " pipelined" * pipelined
        return compile_report.Result(**dataclasses.asdict(case), config=name, registers=168, spills=4)

    monkeypatch.setattr(compile_report, "compile_case", compile_case)
    arguments = ["--resources", "sm_90", "--match", "dq bf16 D=64", "--output", str(tmp_path), "--compile-jobs", "1"]
    assert gpu_tune.main(arguments) == 0
    rows = results.read(tuning.facts_path("sm_90", tmp_path))
    shapes = {c[:3] for c in map(dataclasses.astuple, config.search_space("dq", 64)) if c[0] >= 16 * c[2] and c[1] > 16}
    assert {tuple(int(row[name]) for name in ("block_m", "block_n", "num_warps")) for row in rows} == shapes
    fact = rows[0]
    assert (fact["registers"], fact["spills"], fact["head_dim"]) == ("168", "4", "64")
    assert fact["digest"] == provenance.code_digest(without=tuning.UNRELATED)
