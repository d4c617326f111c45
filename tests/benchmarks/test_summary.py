"""Ratios, targets and charts of rows."""

import pytest

from benchmarks.harness import results, runner, summary
from benchmarks.tools import plot
from tests.support.benchmark_runs import row


def test_ratios_and_means():
    rows = [
        row(p50="2"), row("sdpa-flash", "3"), row("sdpa-cudnn", "1"),
        row(p50="2", q_len="512"), row("sdpa-flash", "12", q_len="512"), row("sdpa-cudnn", "", q_len="512"),
    ]  # fmt: skip
    short, long = summary.cells(rows)
    assert (short.length, short.best_peer(), short.ratio()) == (512, ("sdpa-flash", 12.0), 6.0)
    assert (long.best_peer(), long.ratio(), long.ratio("sdpa-flash")) == (("sdpa-cudnn", 1.0), 0.5, 1.5)
    means = summary.mean_ratios(rows)
    assert means["sdpa-flash"] == (pytest.approx(3.0), 2) and means["sdpa-cudnn"] == (pytest.approx(0.5), 1)
    assert means["best peer"] == (pytest.approx(3.0**0.5), 2)
    assert summary.table(rows) == [
        ["", "L=512", "L=4096"],
        ["D=128, full, bf16, forward", "250 (6.00x)", "250 (0.50x)"],
    ]


def test_the_cuda_kernels_are_shown_beside_the_peers_and_are_none():
    (cell,) = summary.cells([row(p50="2"), row("fastattn-cuda", "1"), row("sdpa-cudnn", "3")])
    assert cell.best_peer() == ("sdpa-cudnn", 3.0) and cell.ratio("fastattn-cuda") == 0.5


def test_steps_over_a_cache_are_held_against_reading_and_not_among_the_peers():
    step = {"case": "8/8 heads, int8 cache", "mode": "decode", "q_len": "1", "kv_len": "512"}
    steps = [row(p50="2", **step) | {"mbytes": "50"}, row("read", "1.5", **step), row("unquantised", "3", **step)]
    plain = [row(p50="2"), row("sdpa", "3")]
    assert summary.held_against_reading([*plain, *steps]) == (steps, plain)
    assert summary.decode_table(steps)[1:] == [["8/8 heads, int8 cache, bf16, decode", "2 ms", "25.0", "0.75", "1.50x"]]
    text = summary.short([x | {"suite": "cpu"} for x in (*plain, *steps)])
    assert "best peer 1.50x (1)" in text and "steps over a KV cache" in text


def test_targets():
    suites = {name: [] for name in ("forward", "backward", "features", "layers")}
    assert {line[2] for line in summary.targets_table(suites)[1:]} == {"not measured yet"}
    suites["forward"] = [row(p50="1"), row("sdpa-flash", "1.3"), row("sdpa-cudnn", "0.7")]
    suites["features"] = [row(case="a"), row("flex", "2", case="a"), row(case="b"), row("flex", "1.4", case="b")]
    base = {"case": "MultiheadAttention, padded", "mode": "eval"}
    suites["layers"] = [row(**base), row("torch", "1.6", **base), row("torch-compile", "0.5", **base)]
    met = {line[0]: line[2:] for line in summary.targets_table(suites)[1:]}
    assert [met[target.text] for target in summary.TARGETS] == [
        ["1.30x", "yes"], ["0.70x", "no"], ["not measured yet", ""],
        ["1.40x", "no"], ["1.60x", "yes"], ["1.60x", "yes"],
    ]  # fmt: skip


def test_short_summary_fits_the_tail_of_an_output(dry):
    rows = [r | {"suite": path.stem} for path in dry.glob("*.csv") for r in results.read(path)]
    text = summary.short(rows)
    for suite in runner.SUITES:
        assert f"{suite}, " in text
    assert "added p50" in text


def test_charts_are_drawn(dry, tmp_path):
    pytest.importorskip("matplotlib")
    made = {path.name: path for path in plot.draw_all(dry, tmp_path)}
    assert {"forward-bf16.png", "backward-bf16.png", "features.png", "memory.png", "layers.png", "cpu.png"} <= set(made)
    assert b"<svg" in made.pop("scaling.svg").read_bytes()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.values())
    assert "decode-bf16.png" not in made  # only where there are data


def test_tables_of_a_folder(dry):
    text = plot.tables(dry)
    assert "## forward" in text and "| against | geometric mean | cells |" in text


def test_scaling_says_the_quickest_way_and_how_the_checks_went():
    played = {"case": "8 GPUs, InfiniBand", "mode": summary.PLAYED, "q_len": "32768", "peak_mib": "2048"}
    slow, quick = {"provider": "ring", "p50_ms": "20"}, {"provider": "ulysses", "p50_ms": "10"}
    rows = [played | slow | {"note": "exposed 15 ms; x"}, played | quick | {"note": "exposed 2.5 ms; x"}]
    assert summary.scaling_table(rows) == [
        ["GPUs, network", "32k"],
        ["8 GPUs, InfiniBand", "ulysses: 10 ms, 75% work, 2 GiB"],
    ]
    long = played | {"q_len": "131072", "provider": "ring", "p50_ms": "100", "note": "exposed 5 ms; x"}
    assert summary.breakeven_table([*rows, long])[1:] == [
        ["8 GPUs, InfiniBand", "ulysses from 32k; ring from 128k", "from 128k"]
    ]
    check = {"case": "2 processes on gloo", "provider": "ring", "q_len": "64"}
    predicted = {"mode": "step, predicted", "p50_ms": "12", "note": f"{summary.RATIO} 1.19, 0.90 to 1.30"}
    rows += [check | {"mode": "step", "p50_ms": "10"}, check | predicted]
    assert summary.checks_table(rows)[1:] == [["2 processes on gloo", "ring", "10 ms", "12 ms", "1.19, 0.90 to 1.30"]]
