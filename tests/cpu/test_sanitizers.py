"""The C++ sources in a program of their own, `parity.cpp`: under sanitizers, and on an emulated ARM processor."""

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "csrc" / "cpu"
SOURCES, PROGRAM = sorted(FOLDER.glob("*.cpp")), ROOT / "tests" / "cpu" / "parity.cpp"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
MEMORY = ROOT / ".cache" / "sanitizers"
ARM_COMPILER, ARM = "aarch64-linux-gnu-g++", next(filter(shutil.which, ("qemu-aarch64-static", "qemu-aarch64")), None)


def build(folder: Path, compiler: str, flags: tuple[str, ...], of_sources: tuple[str, ...] = ()) -> Path:
    """The program with one engine, for the instruction set that ``flags`` name. ``of_sources`` are the engine's alone.

    Compiled once and kept, by everything that goes into it.
    """
    every = (*flags, *of_sources)
    version = subprocess.run([compiler, "-v", *every], capture_output=True, text=True).stderr
    texts = [path.read_bytes() for path in (*SOURCES, PROGRAM, *sorted(FOLDER.glob("*.h")), Path(__file__))]
    native = subprocess.run([compiler, "-Q", "--help=target", *every], capture_output=True).stdout
    digest = hashlib.sha256(b"\0".join([*texts, native, repr((version, every)).encode()])).hexdigest()
    kept = MEMORY / digest[:24]
    if not kept.exists():
        program = compile_program(folder, compiler, flags, of_sources)
        MEMORY.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(program, part)
        part.replace(kept)
    return kept


def compile_program(folder: Path, compiler: str, flags: tuple[str, ...], of_sources: tuple[str, ...]) -> Path:
    shared = [compiler, "-std=c++17", "-pthread", "-g0", f"-I{FOLDER}", *flags]
    engine = ["ONE_ENGINE", "VARIANT=baseline", "EMULATE_DOTS", "KEPT=65536"]
    engine = [*of_sources, *(f"-DFASTATTN_{name}" for name in engine)]
    # The plain loops come last: of a function of the standard library that both have, the engine's is linked.
    parts = [*((path, engine) for path in SOURCES), (PROGRAM, ["-O1"])]
    objects = [folder / f"{source.stem}.o" for source, _ in parts]
    commands = [[*shared, *own, "-c", str(s), "-o", str(o)] for (s, own), o in zip(parts, objects, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert result.returncode == 0, result.stderr
    program = folder / "parity"
    subprocess.run([*shared, *of_sources, *map(str, objects), "-o", str(program)], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    assert COMPILER is not None
    program = tmp_path / "none"
    program.write_text("int main() {}\n")
    probe = [COMPILER, "-x", "c++", str(program), f"-fsanitize={sanitizers}", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"this compiler has no -fsanitize={sanitizers}")
    # Nothing optimised, nothing optimised away: a quarter of the compiler's time.
    checks = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O0")
    program = build(tmp_path, COMPILER, ("-march=native",), checks)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None or ARM is None, reason="no aarch64 compiler or no qemu-user")
def test_arm(tmp_path):
    assert ARM is not None
    program = build(tmp_path, ARM_COMPILER, ("-static",), ("-O2",))
    result = subprocess.run([ARM, str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
