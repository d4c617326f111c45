"""The CUDA C++ kernel without a GPU: its index maths, its steps on a model of the hardware (emulator.cpp), what the
compiler makes of it, and the way to it. The tests marked `gpu` run it, in a process that a deadlock cannot outlive.
"""

import contextlib
import ctypes
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
from fastattn import backends, ops, reference
from fastattn.backends import cuda
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DTYPE_NAMES, HALF, make_qkv, relayout

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
DTYPES = (HALF, BFLOAT)
GPU_SECONDS = 90  # for all cases, starting PyTorch and CUDA included


def compile_cpp(source, target, *flags):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags, f"-I{SOURCES}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def emulator_path(tmp_path_factory):
    digest = f'-DFASTATTN_DIGEST="{cuda.source_digest(SOURCES)}"'
    target = tmp_path_factory.mktemp("emulator") / "emulator.so"
    source = ROOT / "tests" / "support" / "emulator.cpp"
    return compile_cpp(source, target, "-O2", "-Wall", "-Wextra", "-Werror", digest)


@pytest.fixture(scope="module")
def layout(emulator_path):
    """`csrc/cuda/layout.cuh` as Python functions."""
    library = ctypes.CDLL(str(emulator_path))
    for name in ("layout_row_descriptor", "layout_value_descriptor"):
        getattr(library, name).restype = ctypes.c_uint64
    for name in ("layout_visible_keys", "layout_key_tiles"):
        count = 5 if name == "layout_key_tiles" else 4
        getattr(library, name).argtypes = [*(ctypes.c_int,) * (count - 2), ctypes.c_bool, ctypes.c_int64]
    library.layout_first_row.argtypes = [ctypes.c_int64, ctypes.c_int]
    return library


@pytest.fixture
def emulator(emulator_path, monkeypatch):
    """The backend "cuda" on CPU tensors."""
    monkeypatch.setattr(cuda, "_LIBRARY", emulator_path)
    monkeypatch.setattr(cuda, "_current", lambda device: contextlib.nullcontext(0))
    library = cuda.load(emulator_path)
    library.emulator_late_copies(False)
    return library


# Index maths, exhaustively, against formulas from the PTX ISA


def test_a_tile_is_swizzled_panels(layout):
    """Every 8 elements have a place of their own, in the order of the 128-byte swizzle."""
    places = [layout.layout_tile_offset(row, chunk) for row in range(128) for chunk in range(16)]
    assert sorted(places) == list(range(0, 128 * 256, 16))
    for (row, chunk), place in zip(itertools.product(range(128), range(16)), places, strict=True):
        assert place == chunk // 8 * 128 * 128 + row * 128 + ((chunk ^ row) & 7) * 16


def fields(descriptor):
    """(start, leading offset, stride offset) in bytes; the rest must say: 128-byte swizzle, base offset 0."""
    assert descriptor >> 62 == 1 and descriptor >> 46 & 0xFFFF == 0
    return tuple(16 * (descriptor >> bit & 0x3FFF) for bit in (0, 16, 32))


def swizzled(address):
    return address ^ (address >> 7 & 7) << 4


@pytest.mark.parametrize("tile", [0, 3072, 99 * 1024])
def test_products_read_what_loads_wrote(layout, tile):
    """The hardware's address of each element under a descriptor is where `tile_offset` put it."""

    def written(row, column):
        return tile + layout.layout_tile_offset(row, column // 8) + column % 8 * 2

    for k in range(8):
        for first in (0, 64):
            start, _, stride = fields(layout.layout_row_descriptor(tile, first, k))
            for row, column in itertools.product(range(64), range(16)):
                address = start + row // 8 * stride + row % 8 * 128 + column * 2
                assert swizzled(address) == written(first + row, 16 * k + column)
        start, leading, stride = fields(layout.layout_value_descriptor(tile, k))
        for dim, key in itertools.product(range(128), range(16)):
            address = start + dim // 64 * leading + dim % 64 * 2 + key // 8 * stride + key % 8 * 128
            assert swizzled(address) == written(16 * k + key, dim)


def test_fragments(layout):
    """Accumulators tile 64 x 128 once; their elements are those of operand A, register by register."""
    seen = set()
    for t, i in itertools.product(range(128), range(64)):
        place = layout.layout_fragment_row(t, i), layout.layout_fragment_column(t, i)
        warp, lane = divmod(t, 32)
        assert place == (16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2)
        seen.add(place)
        k, j, half = i // 8, i % 8 // 2, i % 2
        operand = layout.layout_operand_row(t, j), layout.layout_operand_column(t, j)
        assert operand == (16 * warp + lane // 4 + (0, 8, 0, 8)[j], 2 * (lane % 4) + (0, 0, 8, 8)[j])
        assert place == (operand[0], 16 * k + operand[1] + half)
    assert seen == set(itertools.product(range(64), range(128)))


@pytest.mark.parametrize("q_len", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("kv_len", [0, 1, 128, 129, 300])
def test_tile_bounds(layout, q_len, kv_len):
    """Each block has rows of its own; it visits the tiles that hold a key which one of its rows sees, and no other."""
    blocks = -(-q_len // 128)
    assert sorted(layout.layout_first_row(block, q_len) for block in range(blocks)) == list(range(0, q_len, 128))
    for causal, q_offset in itertools.product((False, True), (-400, -129, -1, 0, kv_len - q_len, 130, 400)):
        for first in range(0, q_len, 128):
            rows = range(first, min(first + 128, q_len))
            seen = [sum(j <= i + q_offset or not causal for j in range(kv_len)) for i in rows]
            assert [layout.layout_visible_keys(i, kv_len, causal, q_offset) for i in rows] == seen
            count = layout.layout_key_tiles(first, q_len, kv_len, causal, q_offset)
            assert count == -(-max(seen) // 128)
    far = 1 << 30
    assert layout.layout_visible_keys(far, far, True, far) == far
    assert layout.layout_visible_keys(0, far, True, -far) == 0


# The kernel's steps on the model


def specification(spec, dtype):
    q, k, v = (t.detach().to(dtype) for t in (spec.q, spec.k, spec.v))
    return reference.attention(
        q, k, v, None, None, None, None, None, None, None, None, [],
        left=None, right=spec.right, q_offset=spec.q_offset, scale=spec.scale, softcap=None, dropout_p=0.0,
    )  # fmt: skip


def check_forward(q, k, v, **options):
    """Hold out and lse of the backend "cuda" to the rule; below the choice of a backend, so on any device."""
    spec = make_spec(q, k, v, return_lse=True, **options)
    out, lse = ops.attention(spec, "cuda")
    expected_out, expected_lse = specification(spec, torch.float64)
    assert_parity(out, expected_out, specification(spec, q.dtype)[0], "out")
    assert_parity(lse, expected_lse, specification(spec, torch.float32)[1], "lse")


# Name -> lengths, other arguments of make_qkv, arguments of the function. Tails, several tiles, rows that see nothing.
CASES = {
    "one tile": ((128, 128), {}, {}),
    "one query": ((1, 300), {}, {"causal": True}),
    "tails": ((130, 259), {}, {}),
    "more queries than keys": ((259, 130), {}, {}),
    "causal": ((300, 300), {}, {"causal": True}),
    "causal, Lq < Lk": ((77, 390), {}, {"causal": True}),
    "causal, first rows see nothing": ((300, 130), {}, {"causal": True}),
    "causal, top left": ((200, 300), {}, {"causal": True, "q_offset": 0}),
    "nothing visible": ((5, 7), {}, {"causal": True, "q_offset": -9}),
    "no keys": ((5, 0), {}, {}),
    "grouped heads": ((66, 140), {"heads": (6, 2), "batch": 2}, {"causal": True}),
    "scale": ((40, 200), {}, {"scale": 1.5}),
}


@pytest.mark.parametrize("late_copies", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_emulated(emulator, name, dtype, dim, late_copies):
    emulator.emulator_late_copies(late_copies)
    lengths, shapes, options = CASES[name]
    check_forward(*make_qkv("cpu", lengths, dims=(dim, dim), dtype=dtype, **shapes), **options)


@pytest.mark.parametrize("layout_name", ["heads_last", "packed"])
def test_emulated_strides(emulator, layout_name):
    """What lies between the elements is NaN: nothing of it is read into a result."""
    q, k, v = make_qkv("cpu", (130, 200), dims=(64, 64), heads=(4, 4), batch=2)
    check_forward(*(relayout(t, layout_name) for t in (q, k, v)), causal=True)


def test_emulated_expanded(emulator):
    q, k, v = make_qkv("cpu", (9, 200), dims=(64, 64), heads=(2, 1))
    check_forward(q, *(t.expand(-1, 2, -1, -1) for t in (k, v)))


def test_emulated_extremes(emulator):
    """Weights of one key only, and scores whose powers overflow without the running maximum."""
    q, k, v = make_qkv("cpu", (64, 300), dims=(64, 64))
    check_forward(20 * q, 20 * k, v)
    q[0, 0, 3] = torch.nan
    out, _ = ops.attention(make_spec(q, k, v), "cuda")
    assert out[0, 0, 3].isnan().all() and out[0, 0, :3].isfinite().all() and out[0, 1].isfinite().all()


# The binding


def forward_arguments(**changes):
    """A call that the library accepts: no query, so that nothing runs."""
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 0, "kv_len": 5, "head_dim": 64, "dtype": 0}
    return cuda.Forward(**{**sizes, "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 2}, "dtype, head_dim: expected 0 or 1, and 64 or 128, got 2, 64"),
        ({"head_dim": 80}, "got 0, 80"),
        ({"batch": -1}, "batch, q_len, kv_len: expected 0 to 2^30, got -1, 0, 5"),
        ({"kv_len": (1 << 30) + 1}, "got 1, 0, 1073741825"),
        ({"q_heads": 3, "kv_heads": 2}, "q_heads: expected a multiple of kv_heads == 2, got 3"),
        ({"kv_heads": 0}, "kv_heads == 0"),
        ({"scale": -0.5}, "scale: expected more than 0, got -0.5"),
        ({"scale": float("nan")}, "scale: expected more than 0"),
        ({"q_offset": 1 << 31}, "q_offset: expected at most 2^30 in size, got 2147483648"),
        ({"q_len": 1 << 30, "batch": 1 << 20}, "at most 2^31 - 1 blocks"),
        ({"q_len": 1, "q": 8}, "q, k, v: expected rows at multiples of 16 bytes"),
        ({"q_len": 1, "k_stride": (0, 0, 4)}, "rows at multiples of 16 bytes"),
        ({"q_len": 1, "out_stride": (0, 0, 1)}, "of out at multiples of 4"),
    ],
    ids=str,
)
def test_the_library_refuses(emulator, changes, text):
    assert emulator.fastattn_attention_forward(ctypes.byref(forward_arguments())) == 0
    assert emulator.fastattn_attention_forward(ctypes.byref(forward_arguments(**changes))) == 1
    assert text in emulator.fastattn_last_error().decode()


def test_the_library_refuses_null(emulator):
    assert emulator.fastattn_attention_forward(None) == 1
    assert emulator.fastattn_last_error() == b"arguments: expected a pointer, got null"


def test_what_the_library_supports(emulator):
    supported = {(t, d) for t in range(-1, 4) for d in range(300) if emulator.fastattn_supported(t, d)}
    assert supported == set(itertools.product(cuda._DTYPES.values(), cuda.HEAD_DIMS))


def test_errors_of_the_library_are_raised(emulator, monkeypatch):
    q, k, v = make_qkv("cpu", (4, 4), dims=(64, 64))
    with pytest.raises(ValueError, match="fastattn: scale: expected more than 0, got 0"):
        ops.attention(make_spec(q, k, v, scale=0.0), "cuda")
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    with pytest.raises(ValueError, match="q: expected to start at a multiple of 16 bytes, got address 0x"):
        ops.attention(make_spec(shifted, k, v), "cuda")
    create = cuda.Forward
    monkeypatch.setattr(cuda, "Forward", lambda **arguments: create(**{**arguments, "device": -1}))
    with pytest.raises(RuntimeError, match="fastattn: CUDA: invalid device ordinal"):
        ops.attention(make_spec(q, k, v), "cuda")


INTERFACE = {
    "fastattn_abi": "int fastattn_abi() { return %d; }",
    "fastattn_source_digest": 'const char* fastattn_source_digest() { return "%s"; }',
    "fastattn_last_error": 'const char* fastattn_last_error() { return ""; }',
    "fastattn_supported": "int fastattn_supported(int, int) { return 0; }",
    "fastattn_attention_forward": "int fastattn_attention_forward(const void*) { return 0; }",
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"abi": 99}, r"expected ABI 1, got 99; build it again: make ext"),
        ({"digest": "000000000000"}, r"expected sources \w{12}, built from 000000000000; build it again"),
        *(({"without": name}, f"expected the functions of csrc/cuda/interface.cuh: .*{name}") for name in INTERFACE),
    ],
    ids=str,
)
def test_libraries_that_do_not_fit(tmp_path, monkeypatch, changes, text):
    abi, digest = changes.get("abi", cuda.ABI), changes.get("digest", cuda.source_digest(SOURCES))
    functions = [body for name, body in INTERFACE.items() if name != changes.get("without")]
    source = tmp_path / "library.cpp"
    source.write_text('extern "C" {\n' + "\n".join(functions).replace("%d", str(abi)).replace("%s", digest) + "\n}\n")
    monkeypatch.setattr(cuda, "_LIBRARY", compile_cpp(source, tmp_path / "library.so"))
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
    "Ampere": ({"capability": (8, 0)}, "runs on Hopper GPUs (compute capability 9.0), this GPU has 8.0"),
    "Blackwell": ({"capability": (10, 0)}, "this GPU has 10.0"),
    "dtype": ({"dtype": torch.float32}, "float16 and bfloat16, got float32"),
    "head dim": ({"dims": (80, 80)}, "head dims 64 and 128, the same for v, got D = 80, Dv = 80"),
    "head dim of v": ({"dims": (64, 128)}, "got D = 64, Dv = 128"),
    "mask": ({"mask": on_gpu(1, 1, 8, 8, dtype=torch.bool)}, "it has no mask"),
    "bias": ({"bias": on_gpu(1, 1, 8, 8)}, "it has no bias"),
    "alibi_slopes": ({"alibi_slopes": on_gpu(1, 2)}, "it has no alibi_slopes"),
    "sinks": ({"sinks": on_gpu(2)}, "it has no sinks"),
    "softcap": ({"softcap": 2.0}, "it has no softcap"),
    "dropout": ({"dropout_p": 0.1}, "it has no dropout"),
    "window": ({"window": (3, 2)}, "it has no window"),
    "offsets": ({"causal": True, "q_offset": on_gpu(1, dtype=torch.int64)}, "it has no q_offset per batch entry"),
    "scale": ({"scale": -1.0}, "expects scale > 0, got -1"),
    "gradient": ({"requires_grad": True}, "it has no gradient"),
    "columns first": ({"strides": (1024, 512, 1, 8)}, "q: expected adjacent elements and rows at multiples of 8"),
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
    packed = {"cu_seqlens_q": torch.tensor([0, 8]), "cu_seqlens_k": torch.tensor([0, 8])}
    assert backends.reasons_against("cuda", spec._replace(**packed)) == ["it has no packed sequences"]


@needs_cuda_names
def test_never_the_default(monkeypatch, built):
    assert not cuda.PROVEN  # until benchmarks/results has the rows
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch))
    assert explanation.backend == "triton"
    assert "could serve it if asked for: no GPU run of this kernel is on record" in str(explanation)
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch), "cuda")
    assert "<- chosen: no GPU run of this kernel is on record" in str(explanation)


@needs_cuda_names
def test_the_default_where_proven(emulator, monkeypatch):
    """By the digest of the sources: an edit takes a kernel off the list."""
    digest = cuda.source_digest(SOURCES)
    monkeypatch.setattr(cuda, "PROVEN", {("float16", 64, True): digest, ("float16", 128, True): "another"})
    explanation = backends.explain(gpu_spec((9, 0), monkeypatch, causal=True))
    assert explanation.backend == "cuda" and "on record" not in str(explanation)
    for options in ({"causal": False}, {"dtype": BFLOAT}, {"dims": (128, 128)}, {"softcap": 1.0}):
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
def compiled(tmp_path_factory):
    """(the assembler's report, path of the machine code)"""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path_factory.mktemp("cubin") / "forward.cubin"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90a", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
    command += [str(SOURCES / "attention_forward.cu"), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, cubin


def test_compiled_without_spills_and_in_parallel(compiled):
    """ptxas says so where it makes products wait for one another ("serialized")."""
    report, _ = compiled
    assert "warning" not in report.lower() and "serialized" not in report
    kernels = re.findall(r"Compiling entry function '\S*attention_forward\w*(Half|BFloat)ELi(\d+)", report)
    assert sorted(kernels) == [("BFloat", "128"), ("BFloat", "64"), ("Half", "128"), ("Half", "64")]
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * 4
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 4 and max(registers) <= 255  # two warp groups share 65536


def test_machine_code(compiled):
    """D / 16 + 8 products per round, started twice and awaited twice; nothing in local memory."""
    knobs = pytest.importorskip("triton.knobs", reason="nvdisasm comes with Triton, which is not installed")
    command = [knobs.nvidia.nvdisasm.path, "--print-code", str(compiled[1])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    sections = re.split(r"\.section\s+\.text\.", listing)[1:]
    assert len(sections) == 4
    for section in sections:
        dim = int(re.match(r"\S*ELi(\d+)E", section)[1])
        counts = {name: len(re.findall(name, section)) for name in (r"HGMMA\.64x", r"\.tnspB", "WARPGROUP.ARRIVE")}
        assert list(counts.values()) == [dim // 16 + 8, 8, 2]
        assert len(re.findall("WARPGROUP.DEPBAR", section)) == 2 and len(re.findall("LDGSTS", section)) > 0
        assert not re.search(r"\b(LDL|STL)\b", section)


# On a GPU


def gpu_outcomes():
    """Run every case on the GPU; print one JSON line each as soon as it is known."""
    for (name, (lengths, shapes, options)), dtype, dim in itertools.product(CASES.items(), DTYPES, cuda.HEAD_DIMS):
        error = ""
        try:
            torch.manual_seed(0)
            check_forward(*make_qkv("cuda", lengths, dims=(dim, dim), dtype=dtype, **shapes), **options)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps([f"{name}, {DTYPE_NAMES[dtype]}, {dim}", error]), flush=True)


@pytest.mark.gpu
def test_on_a_gpu():
    """Of a kernel that hangs, the cases before it are known, and a deadlock costs no more than the limit."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if problem := cuda.problem():
        pytest.skip(problem)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True) as process:
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
    gpu_outcomes()
