"""The search for tiles by the static model, on compilations that are made up."""

import dataclasses

import pytest

from benchmarks.harness import results
from benchmarks.tools import calibration, compile_report, sass, tile_search
from fastattn.kernels import config

EXPONENTIAL = sass.Instruction("MUFU.EX2", "R3, R4")


def made_up(case, memory=None):
    """A tile of 128 x 128 takes half of the exponentials for each score, and four warps have no room for one."""
    m, n, warps, stages, *rest = map(int, (case.override or "128,64,8,3").split(","))
    name = f"{m}x{n} w{warps} s{stages}" + " pipelined" * (rest[1:] == [1])
    result = compile_report.Result(**dataclasses.asdict(case), config=name, registers=128, shared=16384 * stages)
    result.loop = [EXPONENTIAL] * (m * n // 32 // warps * (1 if m * n == 128 * 128 else 2))
    result.error = "shared memory: too much" if warps == 4 and n == 128 else ""
    return result


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(compile_report, "compile_case", made_up)
    return tile_search.search("dq", 64, "causal", 1)


def test_the_best_come_first_with_other_stages_of_theirs(found):
    shares = [f.share for f in found]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0 == shares[-1]
    best = found[0].candidate
    assert (best.block_m, best.block_n, best.num_warps) == (128, 128, 8)
    space = [c for c in config.search_space("dq", 64) if tile_search.worthwhile("dq", c)]
    assert {tile_search.shape(f.candidate) for f in found} == {tile_search.shape(c) for c in space}
    assert len(found) == len({f.candidate for f in found}) and {f.candidate for f in found} <= {*space}
    of_best = {f.candidate.num_stages for f in found if tile_search.shape(f.candidate) == tile_search.shape(best)}
    assert of_best == {2, 3, 4} & {c.num_stages for c in space if tile_search.shape(c) == tile_search.shape(best)}


def test_what_does_not_fit_is_reported_and_never_best(found):
    failed = [f for f in found if f.result.error]
    assert failed and all(f.prediction is None and f.share == 0 for f in failed)
    shipped = made_up(compile_report.Case("sm_90", "dq", 64, "causal"))
    report = tile_search.report("dq", 64, "causal", found, shipped, 2)
    lines = report.splitlines()
    assert len(lines) == 6 and "128x128 w8" in lines[2]
    assert lines[4].endswith("shipped") and "128x64 w8 s3" in lines[4]
    present = tile_search.predicted(shipped)
    assert present and lines[5].strip().startswith(f"best {found[0].share / present.share - 1:+.0%}")
    assert "too much" in tile_search.report("dq", 64, "causal", failed, shipped, 1)


@pytest.mark.parametrize(("kernel", "tile"), [("forward", (64, 128)), ("dkdv", (128, 64))])
def test_tiles_that_starve_wgmma_are_left_out(kernel, tile):
    m, n = tile  # 64 rows of a program's own feed one warp group
    assert tile_search.worthwhile(kernel, config.LaunchConfig(m, n, 4, 3))
    assert not tile_search.worthwhile(kernel, config.LaunchConfig(m, n, 8, 3))
    short = config.LaunchConfig(*((m, 16) if kernel == "forward" else (16, n)), 4, 3)
    assert not tile_search.worthwhile(kernel, short)


def test_the_error_of_the_model_is_stated_from_the_stored_calibration(tmp_path, monkeypatch):
    def compiled(head_dim, tile):
        case = compile_report.Case("sm_90", "forward", head_dim, "plain", tile)
        return made_up(case)

    monkeypatch.setattr(calibration, "compiled", compiled)
    monkeypatch.setattr(calibration, "PATH", tmp_path / "calibration.csv")
    assert "unknown" in calibration.error()
    rows = calibration.calibrate()
    results.upsert(calibration.PATH, rows)
    for row, (head_dim, (low, high)) in zip(rows, calibration.PUBLISHED.items(), strict=True):
        assert row["head_dim"] == str(head_dim)
        rate = calibration.teraflops(float(row["of_matmul"]))
        assert f"{rate / low - 1:+.0%} to {rate / high - 1:+.0%}" in row["note"]
        assert f"D {head_dim} {row['tflops']} TFLOP/s, published {low} to {high}" in calibration.error()
    assert calibration.teraflops(1.0) == pytest.approx(865, abs=1)
