"""`python -m fastattn`: exit codes, and that its text says what the library says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.__main__ import main, module_version
from fastattn.spec import target

ROOT = Path(__file__).resolve().parents[2]


def test_doctor_reports_versions_devices_and_backends(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w[\w ]*?)  +(.*)$", text, re.MULTILINE))
    assert rows["torch"].startswith(torch.__version__)
    assert rows["fastattn"].startswith(fastattn.__version__)
    assert {"python", "triton", "numpy", "CUDA library", "flash registry", "GPU"} <= rows.keys()
    q = torch.empty(1, 8, 128, 64)
    assert str(fastattn.explain(q, q, q)) in text
    assert ("on cuda" in text) == torch.cuda.is_available()


def test_doctor_without_optional_packages(capsys, monkeypatch):
    for name in ("triton", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("torch.nn.attention.list_flash_attention_impls", raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^triton +not installed", text, re.MULTILINE)
    assert re.search(r"^flash registry +not in this torch", text, re.MULTILINE)


def test_a_module_that_does_not_import_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("import a_module_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    assert module_version("broken_module") == "does not import: No module named 'a_module_that_is_missing'"


def test_module_runs_and_has_help():
    result = subprocess.run([sys.executable, "-m", "fastattn", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("doctor", "explain", "bench"))


def test_explain_prints_what_the_function_returns(capsys):
    arguments = "explain --q 2,8,128,64 --k 2,4,256,64 --v 2,4,256,32 --dtype fp32 --causal --dropout 0.1"
    assert main([*arguments.split(), "--mask", "2,1,1,256", "--bias", "1,8,128,256", "--grad"]) == 0
    q, k, v = (torch.empty(*s, requires_grad=True) for s in ((2, 8, 128, 64), (2, 4, 256, 64), (2, 4, 256, 32)))
    mask = torch.empty(2, 1, 1, 256, dtype=torch.bool)
    bias = torch.empty(1, 8, 128, 256, requires_grad=True)
    expected = fastattn.explain(q, k, v, causal=True, dropout_p=0.1, mask=mask, bias=bias)
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_defaults_to_self_attention_in_bfloat16(capsys):
    assert main(["explain", "--q", "2,8,128,64"]) == 0
    q = torch.empty(2, 8, 128, 64, dtype=torch.bfloat16)
    assert capsys.readouterr().out == f"{fastattn.explain(q, q, q)}\n"


def test_explain_passes_every_term_on(capsys):
    arguments = "--dtype fp32 --q-offset 3 --window 16, --softcap 30 --alibi --sinks"
    assert main(["explain", "--q", "2,8,128,64", *arguments.split()]) == 0
    q, slopes, sinks = torch.empty(2, 8, 128, 64), torch.empty(8), torch.empty(8)
    expected = fastattn.explain(q, q, q, q_offset=3, window=(16, None), softcap=30.0, alibi_slopes=slopes, sinks=sinks)
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--q 2,8,128,64 --k 2,8,128,32", "k.shape[-1]: expected q.shape[-1] == 64, got 32"),
        ("--q 2,8,128,64 --dropout 2", "dropout_p: expected a probability in [0, 1], got 2.0"),
        ("--q 999999,999999,99999,64", "error: Storage size calculation overflowed"),
    ],
)
def test_explain_refuses_what_the_function_refuses(arguments, message, capsys):
    assert main(["explain", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: --q"),
        ("--q 2,8,128", "expected four sizes such as 2,8,1024,64, got '2,8,128'"),
        ("--q 2,8,-1,64", "expected four sizes"),
        ("--q 2,8,128,64 --dtype int8", "expected float16, bfloat16, float32 or float64, got 'int8'"),
        ("--q 2,8,128,64 --dtype nonsense", "got 'nonsense'"),
        ("--q 2,8,128,64 --device gpu", "expected a device of this machine (cpu"),
        ("--q 2,8,128,64 --device cuda:h1000", "or a kind of GPU such as cuda:h100, got 'cuda:h1000'"),
        ("--q 2,8,128,64 --window 5", "expected two sizes such as 128,0"),
        ("--q 2,8,128,64 --unknown 5", "unrecognized arguments"),
    ],
)
def test_explain_refuses_malformed_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", *arguments.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1  # without the usage


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
def test_names_of_a_dtype(name, capsys):
    assert main(["explain", "--q", "2,8,128,64", "--dtype", name]) == 0
    assert "bfloat16 on cpu" in capsys.readouterr().out


def explained(arguments, capsys):
    """Backend -> what the table says of it; and the table's lines."""
    assert main(["explain", *arguments.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(re.findall(r"^  (\w+) +(.*)$", "\n".join(lines), re.MULTILINE)), lines


@pytest.mark.parametrize(
    ("kind", "chosen", "cuda"),
    [
        ("cuda:h100", "triton", "not built"),
        ("cuda:H100", "triton", "not built"),
        ("h100", "triton", "not built"),
        ("cuda:a100", "triton", "this GPU has 8.0"),
        ("cuda:b200", "triton", "this GPU has 10.0"),
        ("cuda:t4", "torch", "this GPU has 7.5"),
        ("cuda:mi300x", "triton", "runs on Hopper GPUs"),
    ],
)
def test_a_gpu_that_is_not_here(kind, chosen, cuda, capsys, monkeypatch):
    monkeypatch.setattr("fastattn.backends.triton._TRITON_MISSING", False)
    monkeypatch.setattr("fastattn.backends.cuda.problem", lambda: "not built")
    backends, lines = explained(f"--q 1,8,128,64 --device {kind} --causal", capsys)
    assert [name for name, verdict in backends.items() if verdict.startswith("<- chosen")] == [chosen]
    assert cuda in backends["cuda"]
    assert lines[0].startswith("On an ") and "on cuda:0" in lines[1]


def test_a_gpu_that_is_not_here_needs_no_memory_and_leaves_nothing_behind(capsys):
    arguments = "--q 64,64,131072,128 --bias 1,64,131072,131072 --grad --alibi --sinks --lse --device cuda:h100"
    backends, _ = explained(arguments, capsys)
    assert backends["triton"] == "<- chosen" and "gradient for the bias" in backends["torch"]
    assert target._assumed is None
    assert explained("--q 1,8,128,64", capsys)[1][0].endswith("on cpu")


def test_explain_packed_sequences(capsys):
    backends, lines = explained("--q 1,8,4096,64 --varlen 5 --causal --alibi", capsys)
    assert "5 packed sequences" in lines[0] and "alibi_slopes (1, 8)" in lines[0]
    assert backends["torch"] == "it has no packed sequences"
    backends, _ = explained("--q 1,8,4096,64 --varlen 5 --device cuda:h100", capsys)
    assert backends["triton"] == "<- chosen"


def test_explain_a_cache(capsys):
    arguments = "--q 2,8,1,64 --k 2,2,1,64 --cache 2,512,2,64"
    backends, lines = explained(arguments, capsys)
    assert "1 appended, lengths per batch entry" in lines[0]
    assert backends["torch"] == "it needs one length for all batch entries, known on the host"
    backends, lines = explained(f"{arguments} --cache-len 100", capsys)
    assert "length 101" in lines[0]
    assert backends["torch"] in ("<- chosen", "could serve it, not preferred here")  # with "cpu" compiled
    backends, lines = explained(f"{arguments} --mask 2,1,1,512 --bias 1,8,1,512", capsys)
    assert "mask (2, 1, 1, 512), bias (1, 8, 1, 512)" in lines[0]
    backends, lines = explained("--q 2,8,1,64 --cache 64,16,2,64 --pages 4 --device cuda:a100", capsys)
    assert "block_table (2, 4)" in lines[1] and backends["triton"] == "<- chosen"
    assert "num_splits by the multiprocessors" in lines[1]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("pages", ["--cache 2,512,2,64", "--cache 64,16,2,64 --pages 32"])
def test_explain_a_quantised_cache_with_rotary_positions_and_a_mask(pages, dtype, capsys):
    arguments = f"--q 2,8,4,64 --k 2,2,4,64 {pages} --cache-dtype {dtype} --rotary --mask 1,1,4,4 --mask-start -3"
    backends, lines = explained(arguments, capsys)
    assert f"{dtype} cache with k_scale" in lines[0]
    for part in ("mask (1, 1, 4, 4)", "mask_start -3", "rotary_cos (512, 32)", "scale 0.125"):
        assert f", {part}, " in f"{lines[0]}, "
    assert "it has no quantised caches; it has no mask_start" in backends["torch"]


def test_explain_needs_no_memory(capsys):
    backends, lines = explained("--q 1,4,99999999999,32 --causal", capsys)
    assert lines[0].startswith("q (1, 4, 99999999999, 32)")
    assert sum(verdict.startswith("<- chosen") for verdict in backends.values()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--varlen 3 --mask 1,1,1,128", "--varlen has no --mask"),
        ("--varlen 3 --k 2,8,128,64", "--k: expected B == 1 with --varlen, got 2"),
        ("--cache 1,512,8,64 --dropout 0.1", "--cache has no --dropout"),
        ("--cache-len 3", "a call without --cache has no --cache-len"),
        ("--mask-start 0", "a call without --cache has no --mask-start"),
        ("--cache 1,512,8,64 --q-offset 0", "--cache has no --q-offset"),
        ("--cache 1,512,8,64 --mask-start 0", "mask_start: expected None without mask and bias, got one"),
        ("--softcap 3 --device cuda:h100 --backend torch", "backend 'torch' cannot serve this call: it has no softcap"),
    ],
)
def test_explain_refuses_what_does_not_go_together(arguments, message, capsys):
    assert main(["explain", "--q", "1,8,128,64", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bench_lists_the_benchmarks_of_a_checkout(capsys):
    assert main(["bench"]) == 0
    listed = set(re.findall(r"python -m benchmarks (\w+)", capsys.readouterr().out))
    assert listed == {path.stem for path in (ROOT / "benchmarks" / "suites").glob("[!_]*.py")}


def test_bench_outside_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fastattn.__main__.PACKAGE", tmp_path / "site-packages" / "fastattn")
    assert main(["bench"]) == 0
    assert "come with the source repository" in capsys.readouterr().out


def test_no_command_is_an_error():
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
