"""The CPU library as a file: where it is looked for, what is refused, how its structs are packed, what it checks."""

import ctypes
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.backends import cpu
from fastattn.backends.cpu import library as cpu_library
from fastattn.backends.cpu import packing, program
from fastattn.spec import Operands, Options

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = ROOT / "csrc" / "cpu" / "interface.h"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

needs_library = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")


def test_it_is_compiled_where_it_can_be():
    """Everything below would be skipped without a word if it were not."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    assert cpu_library.problem() is None


# --- Found and refused -----------------------------------------------------------------------------------------------


@needs_library
def test_sources_that_changed_are_refused(tmp_path, monkeypatch):
    shutil.copytree(INTERFACE.parent, tmp_path / "cpu")
    monkeypatch.setattr(cpu_library, "_SOURCES", tmp_path / "cpu")
    copy = shutil.copy(cpu_library._LIBRARY, tmp_path / "same.so")
    cpu_library.load(Path(copy))
    with (tmp_path / "cpu" / "interface.h").open("a") as file:
        file.write("// changed\n")
    copy = shutil.copy(cpu_library._LIBRARY, tmp_path / "stale.so")
    with pytest.raises(ValueError, match=r"stale.so: expected sources \w{12}, built from \w{12}; build it again: make"):
        cpu_library.load(Path(copy))


@needs_library
def test_another_abi_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "ABI", cpu_library.ABI + 1)
    copy = shutil.copy(cpu_library._LIBRARY, tmp_path / "old.so")
    with pytest.raises(ValueError, match=r"old.so: expected ABI \d+, got \d+; build it again"):
        cpu_library.load(Path(copy))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_something_else_is_refused(tmp_path):
    (tmp_path / "other.cpp").write_text('extern "C" int other() { return 1; }\n')
    subprocess.run([COMPILER, "-shared", "-fPIC", "other.cpp", "-o", "other.so"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"other.so: expected the functions of csrc/cpu/interface.h"):
        cpu_library.load(tmp_path / "other.so")
    (tmp_path / "text.so").write_text("not a library\n")
    with pytest.raises(OSError, match=r"text.so"):
        cpu_library.load(tmp_path / "text.so")


@needs_library
def test_without_it_other_backends_serve_and_say_so(tmp_path):
    """Also from a folder that has one, which is not the package's."""
    shutil.copytree(
        ROOT / "fastattn", tmp_path / "fastattn", symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "fastattn" / "kernels").unlink()
    shutil.copytree(ROOT / "kernels", tmp_path / "fastattn" / "kernels")
    shutil.copy(cpu_library._LIBRARY, tmp_path)
    code = """
import torch, fastattn
q = torch.randn(1, 2, 8, 16)
why = fastattn.explain(q, q, q, softcap=3.0)
assert why.backend == "reference" and fastattn.explain(q, q, q).backend == "torch", why
print(why.reasons["cpu"])
"""
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "PATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not compiled: make ext-cpu, or install again where a C++ compiler is found" in result.stdout


# --- Structs ---------------------------------------------------------------------------------------------------------

STRUCTS = {
    "FastattnAttention": packing.ATTENTION,
    "FastattnOperands": packing.OPERANDS,
    "FastattnGradients": packing.GRADIENTS,
    "FastattnDecode": packing.DECODE,
    "FastattnAppend": packing.APPEND,
    "FastattnScoreTerms": packing.SCORE_TERMS,
    "FastattnQuantised": packing.QUANTISED,
    "FastattnDropout": packing.DROPOUT,
    "FastattnRmsNorm": packing.RMS_NORM,
    "FastattnGate": packing.GATE,
    "FastattnLinear": program.LINEAR,
    "FastattnNorm": program.NORM,
    "FastattnRotate": packing.ROTATE,
    "FastattnCall": program.CALL,
}


def layout(name):
    """(field, "q" for an integer or pointer or "d" for a double) of every eight bytes of a struct."""
    text = re.sub(r"//.*", "", INTERFACE.read_text())
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL).group(1)
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, _, names = declaration.removeprefix("const ").partition(" ")
        for declared in names.split(","):
            field, _, count = declared.strip(" *]").partition("[")
            if kind in ("FastattnView", "FastattnTeam"):
                fields += [(f"{field}.{inner}", of) for inner, of in layout(kind)]
            else:
                fields += [(field, "d" if kind == "double" and "*" not in declared else "q")] * int(count or 1)
    return fields


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_packed_as_declared(name):
    packed = STRUCTS[name].format.removeprefix("@")
    assert "".join(kind * int(count or 1) for count, kind in re.findall(r"(\d*)([qd])", packed)) == "".join(
        kind for _, kind in layout(name)
    )


# --- Checks: nothing is touched before all sizes are good ------------------------------------------------------------


NOWHERE = 64  # an address: whoever touches it dies
GOOD = {
    "FastattnAttention": {
        "threads": 1, "data": NOWHERE, "stride": 1, "lse": NOWHERE, "statistics": NOWHERE, "batch": 1, "q_heads": 4,
        "kv_heads": 2, "q_len": 8, "kv_len": 8, "head_dim": 16, "v_dim": 16, "scale": 1.0,
    },
    "FastattnDecode": {
        "threads": 1, "data": NOWHERE, "stride": 1, "lse": NOWHERE, "lens": NOWHERE, "batch": 1, "q_heads": 4,
        "kv_heads": 2, "q_len": 1, "head_dim": 16, "v_dim": 16, "pages": 1, "capacity": 8, "scale": 1.0,
    },
    "FastattnAppend": {
        "threads": 1, "data": NOWHERE, "stride": 1, "lens": NOWHERE, "element_size": 4, "batch": 1, "kv_heads": 2,
        "new_len": 1, "head_dim": 16, "v_dim": 16, "pages": 1, "capacity": 8,
    },
    "FastattnLinear": {
        "threads": 1, "x": NOWHERE, "weight": NOWHERE, "columns": 4, "y": NOWHERE, "rows": 2, "width": 8,
    },
    "FastattnNorm": {"x": NOWHERE, "y": NOWHERE, "rows": 2, "heads": 3, "width": 8, "eps": 1e-5},
    "FastattnRotate": {
        "threads": 1, "x": NOWHERE, "y": NOWHERE, "cos": NOWHERE, "sin": NOWHERE, "position": NOWHERE, "positions": 4,
        "rows": 2, "heads": 3, "head_dim": 8, "rotated": 6,
    },
    "FastattnDropout": {"threads": 1, "x": NOWHERE, "y": NOWHERE, "rows": 2, "width": 8, "p": 0.5},
    "FastattnRmsNorm": {
        "threads": 1, "x": NOWHERE, "weight": NOWHERE, "y": NOWHERE, "rows": 2, "width": 8, "eps": 1e-5,
    },
    "FastattnGate": {"threads": 1, "gate": NOWHERE, "up": NOWHERE, "y": NOWHERE, "rows": 2, "width": 8},
}  # fmt: skip


def packed(name, **changes):
    """A struct in which all is good but for what is changed."""
    unused = set(changes)
    numbers = []
    for field, _ in layout(name):
        number = GOOD[name].get(field.rpartition(".")[2], 0)
        if field in changes:
            number = changes[field]
            unused.discard(field)
        numbers.append(number)
    assert not unused
    return STRUCTS[name].pack(*numbers)


TOO_LARGE = (-1, 1 << 31, 1 << 62, -(1 << 63))
BAD = {
    "FastattnAttention": [
        *((n, x) for n in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_dim") for x in TOO_LARGE),
        *((name, x) for name in ("left", "right", "q_offset") for x in (1 << 31, -(1 << 31), 1 << 62)),
        *((name, 0) for name in ("q_heads", "kv_heads", "head_dim", "v_dim", "team.threads", "lse", "statistics")),
        *((f"{name}.data", 0) for name in ("q", "k", "v", "out")),
        ("q_heads", 3), ("team.threads", 1 << 40), ("dtype", 4), ("dtype", -1), ("softcap", -1.0),
        ("softcap", float("nan")), ("dropout_p", 1.5), ("dropout_p", float("nan")), ("dropout_p", 0.5),
    ],
    "FastattnDecode": [
        *((n, x) for n in ("batch", "q_heads", "kv_heads", "q_len", "head_dim", "v_dim", "pages") for x in TOO_LARGE),
        *((name, x) for name in ("page_size", "capacity", "added") for x in TOO_LARGE),
        *((name, 1 << 31) for name in ("left", "right")),
        *((name, 0) for name in ("q_heads", "kv_heads", "head_dim", "v_dim", "team.threads", "lse", "lens")),
        *((f"{name}.data", 0) for name in ("q", "k_cache", "v_cache", "out")),
        ("q_heads", 3), ("pages", 2), ("page_size", 16), ("dtype", 4), ("slopes_stride", 3), ("softcap", -2.0),
    ],
    "FastattnAppend": [
        *((n, x) for n in ("batch", "kv_heads", "new_len", "head_dim", "v_dim", "pages") for x in TOO_LARGE),
        *((name, x) for name in ("page_size", "capacity") for x in TOO_LARGE),
        *((name, 0) for name in ("kv_heads", "head_dim", "v_dim", "team.threads", "lens", "element_size")),
        *((f"{name}.data", 0) for name in ("k", "v", "k_cache", "v_cache")),
        ("pages", 2), ("page_size", 16), ("element_size", 3),
    ],
    "FastattnLinear": [
        *((n, x) for n in ("rows", "width", "columns") for x in TOO_LARGE),
        *((name, 0) for name in ("width", "team.threads", "x", "weight", "y")),
        ("dtype", 3), ("dtype", -1), ("gated", 1), ("gated", 2), ("add", -1),
    ],
    "FastattnNorm": [
        *((n, x) for n in ("rows", "heads", "width") for x in TOO_LARGE),
        *((name, 0) for name in ("width", "x", "y")), ("dtype", 3),
    ],
    "FastattnRotate": [
        *((n, x) for n in ("rows", "heads", "head_dim", "positions", "rotated") for x in TOO_LARGE),
        *((name, 0) for name in ("head_dim", "positions", "team.threads", "x", "y", "cos", "sin")),
        ("dtype", 3), ("head_dim", 5), ("rotated", 7), ("rotated", 10),
    ],
    "FastattnDropout": [
        *((n, x) for n in ("rows", "width") for x in TOO_LARGE),
        *((name, 0) for name in ("width", "team.threads", "x", "y")),
        ("dtype", 3), ("p", 1.0), ("p", -0.1), ("p", float("nan")),
    ],
    "FastattnRmsNorm": [
        *((n, x) for n in ("rows", "width") for x in TOO_LARGE),
        *((name, 0) for name in ("width", "team.threads", "x", "weight", "y")), ("dtype", 3), ("dweight", NOWHERE),
    ],
    "FastattnGate": [
        *((n, x) for n in ("rows", "width") for x in TOO_LARGE),
        *((name, 0) for name in ("width", "team.threads", "gate", "up", "y")), ("dtype", 3), ("dup", NOWHERE),
    ],
}  # fmt: skip
OF_ROWS = {
    "FastattnLinear": "linear", "FastattnNorm": "norm", "FastattnRotate": "rotate", "FastattnDropout": "dropout",
    "FastattnRmsNorm": "rms_norm", "FastattnGate": "gate",
}  # fmt: skip


def refused(status):
    assert status == cpu_library._BAD_ARGUMENT
    with pytest.raises(ValueError, match=r"fastattn: .*expected"):
        cpu_library.check(status)


@needs_library
@pytest.mark.parametrize(("field", "value"), BAD["FastattnAttention"], ids=str)
def test_bad_sizes_are_refused(field, value):
    attention = packed("FastattnAttention", **{field: value})
    gradients = packing.GRADIENTS.pack(*[NOWHERE] * len(layout("FastattnGradients")))
    refused(cpu_library.load().fastattn_cpu_forward(attention, None))
    refused(cpu_library.load().fastattn_cpu_backward(attention, None, gradients))


@needs_library
@pytest.mark.parametrize(("field", "value"), BAD["FastattnDecode"], ids=str)
def test_bad_sizes_of_a_cache_are_refused(field, value):
    refused(cpu_library.load().fastattn_cpu_decode(packed("FastattnDecode", **{field: value})))


@needs_library
@pytest.mark.parametrize(("field", "value"), BAD["FastattnAppend"], ids=str)
def test_bad_sizes_of_new_rows_are_refused(field, value):
    refused(cpu_library.load().fastattn_cpu_append(packed("FastattnAppend", **{field: value})))


@needs_library
@pytest.mark.parametrize(("name", "field", "value"), [(name, *case) for name in OF_ROWS for case in BAD[name]], ids=str)
def test_bad_sizes_of_rows_are_refused(name, field, value):
    call = packed(name, **{field: value})
    refused(getattr(cpu_library.load(), f"fastattn_cpu_{OF_ROWS[name]}")(call))
    struct = ctypes.create_string_buffer(call, len(call))
    kind = {"FastattnLinear": 2, "FastattnNorm": 3, "FastattnRotate": 4}.get(name)
    if kind is None:
        return
    refused(cpu_library.load().fastattn_cpu_run(program.CALL.pack(kind, ctypes.addressof(struct)), 1))


@needs_library
def test_a_run_ends_at_the_first_call_that_is_refused():
    x, struct = torch.ones(2, 3, 8), ctypes.create_string_buffer(packed("FastattnNorm", x=0))
    good = program.NORM.pack(x.data_ptr(), 24, 0, x.data_ptr(), 24, 0, 2, 3, 8, 3.0)
    good = ctypes.create_string_buffer(good, len(good))
    calls = [(3, ctypes.addressof(good)), (3, ctypes.addressof(struct)), (3, ctypes.addressof(good))]
    refused(cpu_library.load().fastattn_cpu_run(b"".join(program.CALL.pack(*call) for call in calls), 3))
    assert torch.equal(x, torch.full_like(x, 0.5))
    refused(cpu_library.load().fastattn_cpu_run(program.CALL.pack(5, ctypes.addressof(good)), 1))
    refused(cpu_library.load().fastattn_cpu_run(program.CALL.pack(2, 0), 1))
    refused(cpu_library.load().fastattn_cpu_run(None, 1))


@needs_library
@pytest.mark.parametrize("name", ["FastattnAttention", "FastattnDecode", "FastattnAppend", *OF_ROWS])
def test_whatever_stands_beside_a_bad_size_is_not_touched(name):
    """Anything in all other fields and operands, whose addresses nobody may read."""
    draw, library = random.Random(0), cpu_library.load()
    layout_of = {struct: layout(struct) for struct in STRUCTS}
    integers = (0, 1, 2, 3, 8, 16, 17, NOWHERE, 1 << 30, 1 << 31, 1 << 62, -1, -(1 << 63), (1 << 63) - 1)
    doubles = (0.0, 1.0, 0.5, -1.0, 1e300, float("inf"), float("nan"))
    sizes = [field for field, value in BAD[name] if value == -1 and field != "dtype"]

    def anything(of, **changes):
        drawn = ((field, draw.choice(doubles if kind == "d" else integers)) for field, kind in layout_of[of])
        return STRUCTS[of].pack(*(changes.get(field, value) for field, value in drawn))

    for _ in range(1000):
        call = anything(name, **{draw.choice(sizes): draw.choice(TOO_LARGE)})
        if name == "FastattnAttention":
            operands = anything("FastattnOperands")
            refused(library.fastattn_cpu_forward(call, operands))
            gradients = anything("FastattnGradients")
            refused(library.fastattn_cpu_backward(call, operands, gradients))
        else:
            of = {"FastattnDecode": "decode", "FastattnAppend": "append"} | OF_ROWS
            refused(getattr(library, f"fastattn_cpu_{of[name]}")(call))


@needs_library
def test_null_structs_are_refused():
    library = cpu_library.load()
    refused(library.fastattn_cpu_forward(None, None))
    refused(library.fastattn_cpu_backward(None, None, None))
    refused(library.fastattn_cpu_decode(None))
    for name in ("append", *OF_ROWS.values()):
        refused(getattr(library, f"fastattn_cpu_{name}")(None))


@needs_library
def test_lengths_of_packed_sequences_are_checked():
    q = torch.zeros(1, 2, 8, 16)
    out, lse, statistics = torch.empty_like(q), torch.empty(1, 2, 8), torch.empty(2, 1, 2, 8)
    for bounds in ([0, 9], [5, 3], [-1, 8]):
        bounds = torch.tensor(bounds, dtype=torch.int32)
        operands = Operands(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        with pytest.raises(ValueError, match="cu_seqlens_q: expected"):
            cpu.forward(out, lse, statistics, q, q, q, operands, Options(q_offset=None))


def test_doctor_shows_it(capsys):
    from fastattn.__main__ import main

    assert main(["doctor"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU library"))
    assert "make ext-cpu" in row if cpu_library.problem() else "libfastattn_cpu.so" in row


def test_explain_shows_it():
    q = torch.zeros(1, 2, 8, 16)
    line = next(line for line in str(fastattn.explain(q, q, q)).splitlines() if line.strip().startswith("cpu"))
    assert ("not compiled: make ext-cpu" in line) == (cpu_library.problem() is not None)


@needs_library
def test_calls_release_the_gil():
    assert not isinstance(cpu_library.load(), ctypes.PyDLL)


def test_every_field_has_eight_bytes():
    for one in STRUCTS.values():
        assert one.size == 8 * len(one.unpack(bytes(one.size)))
    assert struct.calcsize("@P") == 8
