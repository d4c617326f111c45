"""The CUDA C++ kernel: the way to it, what the compiler makes of it, and, marked `gpu`, its results, in a process that
a deadlock cannot outlive. What it does without a GPU is in test_cuda_model.py.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import backends
from fastattn.backends import cuda
from fastattn.spec import make_spec
from tests.support.attention_cases import BFLOAT, DTYPE_NAMES, HALF, make_qkv
from tests.support.cuda_calls import CASES, DTYPES, KEYS, check_backward, check_forward, make_inputs
from tests.support.cuda_model import SOURCES, compile_cpp

ROOT = Path(__file__).resolve().parents[2]
GPU_SECONDS = 120  # for all cases of a pass, starting PyTorch and CUDA included

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is installed"
)

# The library that is found


INTERFACE = {
    "fastattn_abi": "int fastattn_abi() { return %d; }",
    "fastattn_source_digest": 'const char* fastattn_source_digest() { return "%s"; }',
    "fastattn_last_error": 'const char* fastattn_last_error() { return ""; }',
    "fastattn_supported": "int fastattn_supported(int, int) { return 0; }",
    "fastattn_attention_forward": "int fastattn_attention_forward(const void*) { return 0; }",
    "fastattn_backward_rows": "long long fastattn_backward_rows(const void*) { return 0; }",
    "fastattn_attention_backward": "int fastattn_attention_backward(const void*) { return 0; }",
}


def stub(folder, abi=cuda.ABI, digest=None, without=""):
    """A library with the functions of the interface, and nothing behind them."""
    source = folder / "library.cpp"
    functions = "\n".join(body for name, body in INTERFACE.items() if name != without)
    functions = functions.replace("%d", str(abi)).replace("%s", digest or cuda.source_digest(SOURCES))
    source.write_text('extern "C" {\n' + functions + "\n}\n")
    return compile_cpp(source, folder / "library.so")


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"abi": 99}, f"expected ABI {cuda.ABI}, got 99; build it again: make ext"),
        ({"digest": "000000000000"}, r"expected sources \w{12}, built from 000000000000; build it again"),
        *(({"without": name}, f"expected the functions of csrc/cuda/interface.cuh: .*{name}") for name in INTERFACE),
    ],
    ids=str,
)
def test_libraries_that_do_not_fit(tmp_path, monkeypatch, changes, text):
    monkeypatch.setattr(cuda, "_LIBRARY", stub(tmp_path, **changes))
    assert cuda.problem() is None if text is None else re.search(text, cuda.problem())


def test_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "libfastattn_cuda.so")
    assert cuda.problem() == "not built: make ext, or install with FASTATTN_BUILD_CUDA=1"
    (tmp_path / "libfastattn_cuda.so").write_text("not a library")
    assert "libfastattn_cuda.so" in (cuda.problem() or "")


# The choice


def on_gpu(*shape, dtype=torch.float32):
    return lambda: torch.empty(shape, dtype=dtype, device="cuda")


def gpu_spec(capability, monkeypatch, dtype=HALF, dims=(64, 64), strides=None, requires_grad=False, **options):
    """A call on a GPU that need not be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 8, dim, dtype=dtype, device="cuda") for dim in (dims[0], *dims))
        if strides is not None:
            q = q.as_strided(q.shape, strides)
        options = {name: x() if callable(x) else x for name, x in options.items()}
        return make_spec(q.requires_grad_(requires_grad), k, v, **options)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(cuda, "problem", lambda: None)


needs_cuda_names = pytest.mark.skipif(torch.version.hip is not None, reason="compute capabilities are CUDA's")


REASONS = {  # options of gpu_spec, and the one reason against them
    "served": ({}, None),
    "served, causal": ({"dtype": BFLOAT, "dims": (128, 128), "causal": True, "q_offset": 3}, None),
    "served, all": ({"sinks": on_gpu(2), "softcap": 2.0, "window": (3, 2)}, None),
    "served, packed": (
        {
            name: on_gpu(size, dtype=torch.int32)
            for name, size in (("cu_seqlens_q", 3), ("cu_seqlens_k", 3), ("seqused_k", 2))
        },
        None,
    ),
    "Ampere": ({"capability": (8, 0)}, "runs on Hopper GPUs (compute capability 9.0), this GPU has 8.0"),
    "Blackwell": ({"capability": (10, 0)}, "this GPU has 10.0"),
    "dtype": ({"dtype": torch.float32}, "float16 and bfloat16, got float32"),
    "head dim": ({"dims": (80, 80)}, "head dims 64, 128 and 256, the same for v, got D = 80, Dv = 80"),
    "head dim of v": ({"dims": (64, 128)}, "got D = 64, Dv = 128"),
    "mask": ({"mask": on_gpu(1, 1, 8, 8, dtype=torch.bool)}, "it has no mask"),
    "bias": ({"bias": on_gpu(1, 1, 8, 8)}, "it has no bias"),
    "alibi_slopes": ({"alibi_slopes": on_gpu(1, 2)}, "it has no alibi_slopes"),
    "dropout": ({"dropout_p": 0.1}, "it has no dropout"),
    "served, offsets": ({"causal": True, "q_offset": on_gpu(1, dtype=torch.int32)}, None),
    "scale": ({"scale": -1.0}, "expects scale > 0, got -1"),
    "served, gradients": ({"requires_grad": True, "sinks": on_gpu(2)}, None),
    "columns first": (
        {"strides": (1024, 512, 1, 8)},
        "q: expected adjacent elements and distinct rows at multiples of 8",
    ),
    "one row": ({"strides": (512, 512, 0, 1)}, "got strides (512, 512, 0, 1)"),
    "odd rows": ({"strides": (1024, 512, 60, 1)}, "got strides (1024, 512, 60, 1)"),
}


@needs_cuda_names
@pytest.mark.parametrize(("options", "text"), REASONS.values(), ids=REASONS.keys())
def test_reasons(monkeypatch, built, options, text):
    spec = gpu_spec(**{"capability": (9, 0), **options}, monkeypatch=monkeypatch)
    reasons = backends.reasons_against("cuda", spec)
    assert reasons == [] if text is None else len(reasons) == 1 and text in reasons[0]


@needs_cuda_names
def test_reasons_against_other_masks(monkeypatch, built):
    spec = gpu_spec((9, 0), monkeypatch)
    block_mask = fastattn.BlockMask.from_mask(torch.ones(8, 8, dtype=torch.bool))
    assert backends.reasons_against("cuda", spec._replace(block_mask=block_mask)) == ["it has no block masks"]


@needs_cuda_names
def test_never_the_default(monkeypatch, built):
    assert not cuda.PROVEN  # until benchmarks/results has the rows
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch))
    assert explanation.backend == "triton"
    assert "could serve it if asked for: no GPU run of this kernel is on record" in str(explanation)
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch), "cuda")
    assert "<- chosen: no GPU run of this kernel is on record" in str(explanation)


@needs_cuda_names
@needs_compiler
def test_the_default_where_proven(tmp_path, monkeypatch):
    """By the digest of the sources: an edit takes a kernel off the list."""
    digest = cuda.source_digest(SOURCES)
    monkeypatch.setattr(cuda, "_LIBRARY", stub(tmp_path))
    monkeypatch.setattr(cuda, "PROVEN", {("float16", 64, True): digest, ("float16", 128, True): "another"})
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch, causal=True))
    assert explanation.backend == "cuda" and "on record" not in str(explanation)
    others = ({"softcap": 1.0}, {"window": (3, None)}, {"sinks": on_gpu(2)}, {"requires_grad": True})
    for options in ({"causal": False}, {"dtype": BFLOAT}, {"dims": (128, 128)}, *others):
        spec = gpu_spec((9, 0), monkeypatch, **{"causal": True, **options})
        assert backends.choose(spec) == "triton"


@needs_cuda_names
def test_not_built_is_a_reason_on_such_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "missing.so")
    assert backends.reasons_against("cuda", gpu_spec((9, 0), monkeypatch)) == [cuda.problem()]
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call: not built: make ext"):
        backends.choose(gpu_spec((9, 0), monkeypatch), "cuda")


@needs_cuda_names
def test_torch_func_is_refused(monkeypatch, built):
    spec, seen = gpu_spec((9, 0), monkeypatch), []

    def look(x):
        seen.append(backends.reasons_against("cuda", spec))
        return x

    torch.vmap(look)(torch.zeros(2))
    assert seen == [["it has no torch.func transforms"]]


def test_refused_on_cpu():
    q, k, v = make_qkv("cpu", (7, 9), dims=(64, 64))
    with pytest.raises(ValueError, match=r"runs on Hopper GPUs .* the tensors are on 'cpu'$"):
        fastattn.attention(q, k, v, backend="cuda")


# What the compiler makes of it


@pytest.fixture(scope="module")
def compiled():
    """(the assembler's report, the machine code)"""
    pytest.importorskip("triton", reason="nvdisasm comes with Triton, which is not installed")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    from benchmarks.tools import cuda_report

    return cuda_report.compile_source()


PASSES = {64: ("dkdv", "dq"), 128: ("dk", "dq", "dv"), 256: ("dk", "dq", "dv")}
KERNELS = [
    (name, dim, capped, what)
    for name in ("BFloat", "Half")
    for dim in cuda.HEAD_DIMS
    for capped in (False, True)
    for what in (*PASSES[dim], "forward")
]
SPILLED = {(256, True, "dq"): 32}
"""head dim, softcap, pass -> bytes; the others spill nothing"""


def test_compiled_without_spills_and_in_parallel(compiled):
    """ptxas says so where it makes products wait for one another (C7510, C7512), or ignores setmaxnreg (C7508)."""
    from benchmarks.tools import cuda_report

    assert not re.search(r"warning|serialized|\(C\d+\)", compiled[0], re.IGNORECASE)
    kernels = cuda_report.kernels(*compiled)
    assert sorted((kernel.dtype, kernel.dim, kernel.capped, kernel.what) for kernel in kernels) == KERNELS
    for kernel in kernels:
        four_groups = kernel.dim == 64 and kernel.what == "forward"
        assert kernel.registers == (128 if four_groups else 168)  # 512 or 384 threads share 65536
        spilled = SPILLED.get((kernel.dim, kernel.capped, kernel.what), 0)  # stores and loads
        assert kernel.spilled <= 2 * spilled and (kernel.spilled > 0) == (spilled > 0)
        row = cuda_report.row(kernel)
        passing = 32 if kernel.dim == 256 else 64
        assert row["tile"] == str(KEYS[kernel.dim] if kernel.what == "forward" else passing)
        assert row["serialised"] == "no" and row["rows"] == ("192" if four_groups else "128")
        assert 1.0 >= float(row["apart"]) > float(row["in step"]) > 0.2


def test_stored_predictions_are_those_of_the_machine_code(compiled):
    """They are printed beside what the first run on a GPU measures: after a change of csrc/cuda they are made anew."""
    from benchmarks.harness import results
    from benchmarks.tools import cuda_report

    def shares(rows):
        return {(r["mode"], r["dtype"], r["head_dim"]): (r["of_matmul"], r["note"]) for r in rows}

    stored = results.read(cuda_report.STORED)
    expected = cuda_report.stored(cuda_report.kernels(*compiled))
    assert len(expected) == 2 * len(DTYPES) * len(cuda.HEAD_DIMS)
    assert shares(stored) == shares(expected), "python -m benchmarks.tools.cuda_report --store"


def test_machine_code_of_the_forward_kernel(compiled):
    """D / 16 and keys / 16 products, in the loop and beside it, started four times and awaited four times: never one
    for another. Registers move once for each role; tiles come and go by TMA; nothing is in local memory.
    """
    from benchmarks.tools import cuda_report

    sections = cuda_report.sections(compiled[1])
    assert sorted(sections) == KERNELS
    for (_, dim, _, what), section in sections.items():
        if what != "forward":
            continue

        def count(name, section=section):
            return len(re.findall(name, section))

        assert count(r"HGMMA\.64x") == 2 * (dim // 16 + KEYS[dim] // 16)
        assert count(r"\.tnspB") == 2 * (KEYS[dim] // 16)
        assert count("WARPGROUP.ARRIVE") == count("WARPGROUP.DEPBAR") == 4
        assert count("USETMAXREG") == 2 and count("UTMASTG") == dim // 64
        # Keys at two places, values at one, queries for each consumer.
        assert count("UTMALDG") == (3 + (3 if dim == 64 else 2)) * dim // 64
        assert not re.search(r"\b(LDL|STL|LDGSTS)\b", section)


def test_machine_code_of_the_backward_passes(compiled):
    """The products of a tile stand in the code twice, beside the loop and in it, and never wait for one another."""
    from benchmarks.tools import cuda_report

    for (_, dim, capped, what), section in cuda_report.sections(compiled[1]).items():
        if what == "forward":
            continue

        def count(name, section=section):
            return len(re.findall(name, section))

        passing = 32 if dim == 256 else 64
        scores, sums = 1 if what == "dv" else 2, 2 if what == "dkdv" else 1
        assert count(r"HGMMA\.64x") == 2 * (scores * dim // 16 + sums * passing // 16)
        assert count(r"\.tnspB") == 2 * sums * passing // 16
        assert count("USETMAXREG") == 2 and count("UTMASTG") == sums * (64 // passing) * dim // 64
        assert (count(r"\b(LDL|STL)\b") > 0) == ((dim, capped, what) in SPILLED)


# On a GPU


CHECKS = {"forward": check_forward, "backward": check_backward}


def gpu_outcomes(which):
    """Run every case of one of CHECKS on the GPU; print one JSON line each as soon as it is known."""
    for (name, (lengths, shapes, options)), dtype, dim in itertools.product(CASES.items(), DTYPES, cuda.HEAD_DIMS):
        error = ""
        try:
            torch.manual_seed(0)
            qkv, bounds = make_inputs("cuda", lengths, dim=dim, dtype=dtype, **shapes)
            CHECKS[which](*qkv, **bounds, **options)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps([f"{name}, {DTYPE_NAMES[dtype]}, {dim}", error]), flush=True)


@pytest.mark.gpu
@pytest.mark.parametrize("which", CHECKS)
def test_on_a_gpu(which, record_property):
    """Of a kernel that hangs, the cases before it are known, and a deadlock costs no more than the limit."""
    record_property("cuda_pass", which)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if problem := cuda.problem():
        pytest.skip(problem)
    environment, command = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, __file__, which]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=GPU_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    outcomes = [json.loads(line) for line in output.splitlines()]
    assert [outcome for outcome in outcomes if outcome[1]] == []
    cases = len(CASES) * len(DTYPES) * len(cuda.HEAD_DIMS)
    assert len(outcomes) == cases, f"no result after {outcomes[-1:]} within {GPU_SECONDS} s"


if __name__ == "__main__":
    gpu_outcomes(sys.argv[1])
