"""What a GPU session runs, without a GPU: the parity matrix, the checks in dry runs, the page that is made of them."""

import functools
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks.harness import checks as checking
from benchmarks.harness import large, parity, provenance, repeats, results
from benchmarks.harness.device import CudaDevice, Device, DryRun
from benchmarks.harness.parity_features import FEATURES, KERNELS, CacheFeature
from benchmarks.tools import gpu_check, status

ROOT = Path(__file__).resolve().parents[2]


# The matrix


def test_every_feature_is_in_the_matrix_and_the_gate():
    for cases in (parity.matrix(), parity.gate(CudaDevice())):
        assert {case.feature for case in cases} == set(FEATURES)
    dims = {(case.dtype, case.head_dim) for case in parity.gate(CudaDevice()) if case.feature == "causal"}
    assert dims == set(itertools.product(("bf16", "fp16"), (64, 128, 256)))


def test_gate_passes_here_and_finds_a_wrong_backend(monkeypatch):
    case = parity.ParityCase("everything at once", "fp32", 64)
    assert not list(parity.failures(DryRun(), [case]))
    right = fastattn.attention
    monkeypatch.setattr("fastattn.testing.calls.attention", lambda *a, **o: tuple(1.01 * t for t in right(*a, **o)))
    ((failed, error),) = parity.failures(DryRun(), [case])
    assert failed == case and parity.describe(error).startswith("AssertionError: out: ")


CACHES = [name for name, feature in FEATURES.items() if isinstance(feature, CacheFeature)]


@pytest.mark.parametrize("feature", CACHES)
def test_decode_kernels_pass_in_the_interpreter(feature):
    parity.ParityCase(feature, "bf16", 64).run(DryRun(), "triton")


@pytest.mark.parametrize("feature", ["cache", "cache, pages of 16"])
def test_a_call_of_the_kernels_repeats_bit_for_bit(feature):
    case = FEATURES[feature]
    call = case.call(DryRun(), torch.float32, 16, repeats.repeat_shapes(DryRun(), case)[0], "triton")
    assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def test_every_kernel_is_repeated_and_sanitised():
    assert {kernel for name in repeats.REPEATED for kernel in FEATURES[name].kernels} == set(KERNELS)


def test_how_much_is_compiled_is_known_before():
    def compiled(feature, dtype="bf16", head_dim=64):
        return parity.ParityCase(feature, dtype, head_dim).specialisations()

    assert compiled("causal") == compiled("causal, Lq < Lk") == compiled("GQA 4/2") != compiled("plain")
    assert not compiled("causal") & (compiled("causal", "fp16") | compiled("causal", head_dim=128))
    assert {kernel for kernel, *_ in compiled("cache, sinks")} == {"decode", "append"}
    assert parity.to_compile([parity.ParityCase("causal", "bf16", 64)] * 2) == 4
    assert "297 cases of parity compile" in gpu_check.forecast(12)


def test_outcomes_name_the_kernel_that_failed():
    assert set(parity.outcomes("plain", None).items()) == {
        (name, "passed") for name in ("forward", "delta", "dkdv", "dq")
    }  # fmt: skip
    wrong = parity.outcomes("bias gradient", "AssertionError: dk: largest error 1")
    assert wrong["forward"] == wrong["dq"] == "passed"
    assert wrong["dkdv"] == "failed" and wrong["dbias"] == "not reached"
    assert set(parity.outcomes("plain", "OutOfResources: shared memory").values()) == {"error"}
    wrong = parity.outcomes("cache", "AssertionError: v_cache: not the new rows")
    assert wrong == {"decode": "not reached", "combine": "not reached", "append": "failed"}
    assert parity.outcomes("cache, one split", "AssertionError: out: 1") == {"decode": "failed", "append": "passed"}


# Status


def check_row(kernel, outcome="passed", **columns):
    base = {
        "check": "parity", "kernel": kernel, "feature": "plain", "dtype": "bf16", "head_dim": "64", "outcome": outcome,
        "gpu": "NVIDIA H100", "commit": "abc", "dirty": "no", "digest": "new", "date": "2026-12-01T00:00:00Z",
    }  # fmt: skip
    return base | columns


def test_status_of_nothing(tmp_path):
    text = status.page(tmp_path)
    assert "**Nothing has run on any GPU yet.**" in text and "passed" not in text.replace("has passed where", "")


def test_status_of_some_runs(tmp_path):
    rows = [
        check_row("forward"), check_row("dkdv", "failed", note="dk: largest error"),
        check_row("dq", digest="old", dirty="yes"), check_row("", check="memcheck", feature="", dtype="", head_dim=""),
    ]  # fmt: skip
    results.upsert(tmp_path / "gpu" / "parity.csv", rows)
    text = status.page(tmp_path, current="new")
    line = next(line for line in text.splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in line.split("|")[3:]]
    assert cells[0] == "passed 1/7 at abc" and cells[1] == "never run" and cells[4] == "-"
    assert cells[2] == "**failed** 1/1, first bf16 64 at abc" and cells[3] == "passed 1/7 at abc+, older kernels"
    assert "| memcheck | compute-sanitizer memcheck | passed at abc |" in text and "## NVIDIA H100" in text


@pytest.mark.parametrize(
    ("outcome", "expected"), [("not run", "not run"), ("passed", "passed at abc"), ("failed", "**failed**")]
)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_status_of_the_cuda_kernels(tmp_path, which, outcome, expected):
    """Each pass has a line of its own; skipped is not passed."""
    row = check_row(which, outcome, check=status.CUDA, feature="", dtype="", head_dim="")
    results.upsert(tmp_path / "gpu" / "parity.csv", [row])
    lines = [line.split("|") for line in status.page(tmp_path, current="new").splitlines() if "| CUDA C++ " in line]
    assert [line[1].strip() for line in lines] == ["CUDA C++ forward", "CUDA C++ backward"]
    for _, name, _, verdict, _ in lines:
        assert verdict.strip().startswith(expected if name.strip().endswith(which) else "never run")


def test_status_lists_each_kernel(tmp_path):
    rows = [
        check_row("forward"), check_row("decode", "error", feature="cache"),
        check_row("forward, delta, dkdv, dq", check="race", feature="packed sequences"),
        check_row("decode, combine, append", check="large", feature="cache"),
    ]  # fmt: skip
    results.upsert(tmp_path / "gpu" / "parity.csv", rows)
    text = status.page(tmp_path, current="new")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(table) if line[0] == "kernel")
    lines = {line[0]: dict(zip(table[start], line, strict=True)) for line in table[start + 2 : start + 12]}
    assert set(lines) == {*KERNELS, "packed sequences", "block mask"}
    assert lines["forward"]["parity"] == lines["forward"]["race"] == "passed at abc"
    assert lines["packed sequences"]["race"] == "passed at abc" and lines["packed sequences"]["parity"] == "never run"
    assert lines["decode"]["parity"].startswith("**error** 1/1") and lines["append"]["large"] == "passed at abc"


# The checks


def test_gpu_check_dry_run(tmp_path, capsys, monkeypatch):
    few = [parity.ParityCase(feature, "bf16", 64) for feature in ("plain", "everything at once", "cache")]
    monkeypatch.setattr(parity, "matrix", lambda: few)
    arguments = ["--dry-run", "--output", str(tmp_path), "--steps", "sanitizer", "parity", "large", "repeats"]
    assert gpu_check.main(arguments) == 0
    rows = results.read(tmp_path / "dry-run" / "parity.csv")
    outcomes = Counter((r["check"], r["outcome"]) for r in rows)
    assert outcomes["parity", "passed"] == 4 + 5 + 3 and outcomes["large", "passed"] == len(large.LARGE)
    assert outcomes["race", "passed"] == outcomes["determinism", "passed"] == len(repeats.REPEATED)
    assert outcomes["memcheck", "not run"] == len(repeats.REPEATED)
    out = capsys.readouterr().out
    assert "3 cases of parity compile 11 kernels" in out and "parity             3       0      0        0" in out
    assert [r["check"] for r in rows][:: len(rows) - 1] == ["parity", "synccheck"]  # in the order of importance


def test_large_tensors_need_memory(tmp_path, monkeypatch):
    checks = make_checks(tmp_path)
    monkeypatch.setattr(DryRun, "free_memory", lambda self: 2.0 * 7 * (1 << 13))
    large.check_large(checks)
    assert checks.tally == {("large", "passed"): 2, ("large", "not run"): 2}
    assert checks.not_run == [f"large: {name}: needs 0 GiB of free memory" for name in ("dense", "packed sequences")]
    assert max(2.0 * tensors * 2**31 for _, tensors, _ in large.LARGE.values()) < 40e9


def test_large_tensors_that_are_wrong(tmp_path, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda q, *a, **o: right(q, *a, **o) * (1.0 + q.shape[0]))
    checks = make_checks(tmp_path)
    large.check_large(checks)
    assert checks.problems == ["large: dense: differs from what the last part gives alone"]


def test_a_lost_device_ends_all_but_the_sanitizer(tmp_path, monkeypatch):
    def lose(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(parity, "matrix", lambda: [parity.ParityCase("plain", "bf16", 64)] * 3)
    monkeypatch.setattr("fastattn.testing.calls.attention", lose)
    checks = make_checks(tmp_path)
    for check in (parity_of_all, large.check_large, repeats.check_repeats, gpu_check.check_tests):
        check(checks)
    assert checks.lost and checks.tally["parity", "failed"] == 1 and checks.tally["parity", "not run"] == 2
    assert checks.tally["large", "not run"] == len(large.LARGE) and checks.tally["tests", "not run"] == 1
    repeats.check_sanitizer(checks)
    assert checks.tally["memcheck", "not run"] == len(repeats.REPEATED)
    assert "memcheck: cache: dry run" in checks.not_run
    assert checking.report(checks).splitlines()[-1].startswith("not run: parity: plain, bf16, head dim 64; ")


def test_gpu_check_reports_what_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "matrix", lambda: [parity.ParityCase("plain", "bf16", 64)])
    right, calls = fastattn.attention, itertools.count()

    @functools.wraps(right)
    def never_same(*arguments, **options):
        return tuple(t * (1.0 + next(calls)) for t in right(*arguments, **options))

    monkeypatch.setattr(fastattn, "attention", never_same)
    monkeypatch.setattr("fastattn.testing.calls.attention", lambda *a, **o: tuple(1.01 * t for t in right(*a, **o)))
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path), "--steps", "parity", "repeats"]) == 1
    rows = {(r["check"], r["kernel"], r["feature"]): r for r in results.read(tmp_path / "dry-run" / "parity.csv")}
    assert rows["parity", "forward", "plain"]["outcome"] == "failed"
    assert rows["parity", "dq", "plain"]["outcome"] == "not reached"
    different = rows["determinism", "forward, delta, dkdv, dq", "causal"]
    assert different["note"] == "1x239: 2 of 2 repeats differ"
    assert rows["determinism", "decode, combine, append", "cache"]["outcome"] == "passed"
    assert "determinism: causal, head dim 16: 1x239: 2 of 2 repeats differ" in capsys.readouterr().out


def parity_of_all(checks):
    checking.check_parity(checks, parity.matrix())


def make_checks(tmp_path, step=1.0, seconds=100.0):
    stamp = provenance.provenance(DryRun())
    return checking.Checks(DryRun(step), tmp_path, seconds, stamp)


def test_gpu_check_out_of_time(tmp_path):
    checks = make_checks(tmp_path, seconds=0.0)
    parity_of_all(checks)
    large.check_large(checks)
    repeats.check_repeats(checks)
    gpu_check.check_tests(checks)
    assert {outcome for _, outcome in checks.tally} == {"not run"}
    assert "not run: parity: plain, bf16, head dim 64; " in checking.report(checks)


def test_device_tests_are_selected_and_recorded(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef device(): return 'cpu'\n"
        "def test_host(): pass\n"
        "def test_on_device(device): pass\n"
        "def test_wrong(device): assert False\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('which', ['forward', 'backward', 'other'])\n"
        "def test_cuda(which, record_property):\n"
        "    record_property('cuda_pass', which)\n"
        "    if which == 'other': pytest.skip('needs a GPU')\n"
        "    assert which == 'forward', 'dq: largest error 1'\n"
    )
    script = (
        "import sys, pytest\nfrom pathlib import Path\n"
        "from benchmarks.harness import device\n"
        "from benchmarks.harness import checks as checking\n"
        "from benchmarks.tools import gpu_check\n"
        "checks = checking.Checks(device.DryRun(), Path('out'), 1e9, {})\n"
        "recorder = gpu_check.Recorder(checks)\n"
        "pytest.main(['test_some.py', '-q', '-p', 'benchmarks.harness.only_device', '-p', 'no:cacheprovider'],"
        " plugins=[recorder])\nrecorder.store()\nprint(dict(checks.tally))\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "{('tests', 'passed'): 2, ('tests', 'failed'): 2}" in result.stdout, result.stdout + result.stderr
    rows = results.read(tmp_path / "out" / "dry-run" / "parity.csv")
    (recorded,) = (row for row in rows if row["check"] == "tests")
    assert (recorded["outcome"], recorded["feature"]) == ("failed", "test_some.py")
    assert recorded["note"] == "2 failed, 2 passed, 1 skipped: test_wrong; test_cuda[backward]"
    passes = {row["kernel"]: (row["outcome"], row["note"]) for row in rows if row["check"] == status.CUDA}
    assert passes["forward"] == ("passed", "") and passes["other"] == ("not run", "Skipped: needs a GPU")
    assert passes["backward"][0] == "failed" and "dq: largest error 1" in passes["backward"][1]


def test_repeats_go_on_after_a_feature_that_fails(tmp_path, monkeypatch):
    """The second feature does not compile: those after it are repeated all the same."""
    bad = repeats.REPEATED[1]

    def count_different(device, feature, *arguments, **options):
        if feature == bad:
            raise RuntimeError("cannot convert None to tensor")
        return 0

    monkeypatch.setattr(repeats, "count_different", count_different)
    checks = make_checks(tmp_path, seconds=1e9)
    repeats.check_repeats(checks)
    rows = results.read(tmp_path / "dry-run" / "parity.csv")
    outcomes = {(row["check"], row["feature"]): row["outcome"] for row in rows}
    expected = {feature: "error" if feature == bad else "passed" for feature in repeats.REPEATED}
    assert outcomes == {(check, feature): expected[feature] for check in repeats.REPEATS for feature in expected}
    assert len(checks.problems) == len(repeats.REPEATS) and not checks.lost


def test_the_sanitizer_goes_on_after_a_feature_that_fails(tmp_path, monkeypatch):
    """Each feature has a process of its own: one has errors, one dies, the others pass."""
    wrong, dying = repeats.REPEATED[1], repeats.REPEATED[3]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in\n*"--sanitized {wrong}") echo "ERROR SUMMARY: 2 errors"; exit 99;;\n'
        f'*"--sanitized {dying}") echo "Killed"; exit 137;;\nesac\necho "ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(repeats.shutil, "which", lambda name: str(tool))
    checks = checking.Checks(Device(), tmp_path, float("inf"), provenance.provenance(DryRun()))
    repeats.check_sanitizer(checks)
    others = len(repeats.REPEATED) - 2
    for name in repeats.SANITIZERS:
        assert [checks.tally[name, outcome] for outcome in ("passed", "failed", "not run")] == [others, 1, 1]
    assert f"memcheck: {wrong}: ERROR SUMMARY: 2 errors" in checks.problems
    assert f"memcheck: {dying}: Killed" in checks.not_run


@pytest.mark.parametrize(
    "code, text, outcome",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (99, "========= ERROR SUMMARY: 2 errors", "failed"),
        (1, "Device not supported", "not run"),
    ],
)
def test_sanitizer_outcomes(code, text, outcome, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    tool.chmod(0o755)
    assert repeats.run_sanitizer(str(tool), "memcheck", "cache", 10.0) == (outcome, text)


def test_sanitizer_that_does_not_finish(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o755)
    assert repeats.run_sanitizer(str(tool), "memcheck", "cache", 0.2)[0] == "not run"
