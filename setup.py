"""Builds the native libraries; everything else about the package is in pyproject.toml.

``csrc/cpu`` becomes ``fastattn/libfastattn_cpu`` wherever a C++ compiler is found: ``CXX``, ``c++``, ``g++`` or
``clang++``. Without one, or where it fails, the package is installed without the library and works without it.
``FASTATTN_BUILD_CPU=0`` does not try, ``=1`` makes a failure an error.

``FASTATTN_BUILD_CUDA=1 pip install .`` compiles ``csrc/cuda/*.cu`` into ``fastattn/libfastattn_cuda.so`` with nvcc;
unset, empty or 0, nothing is compiled.

Both have a C interface without PyTorch or Python headers, so they depend on no version of either.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

NVCC_FLAGS = ["-O3", "-std=c++17", "--shared", "-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a"]

CPU_LIBRARY = "fastattn.libfastattn_cpu"
WITHOUT = "fastattn is installed without its CPU kernels, PyTorch's serve instead"
CPU_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread"]
# Compiled once for each instruction set, into a namespace of its own; without the C++ library, whose inline functions
# the linker would merge across instruction sets.
ENGINE_SOURCES = ("forward.cpp", "backward.cpp", "decode.cpp", "linear.cpp", "rows.cpp", "layers.cpp")
ENGINE_FLAGS = ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VARIANTS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
# Products of bfloat16 pairs alone: what else a call may be is handed to the engine beside it.
BESIDE = ("avx512_bf16", [*AVX512, "-mavx512bf16", "-DFASTATTN_BESIDE=avx512"])
BESIDE_SOURCES = ("forward.cpp", "backward.cpp", "decode.cpp")
TEST_VARIANT = ("wide", [*AVX2, "-DFASTATTN_VECTOR_BYTES=64", "-DFASTATTN_EMULATE_DOTS"])  # avx512_bf16's logic on AVX2


def switch(name: str) -> bool | None:
    """An environment variable, None if unset. Any other value is an error: a guess could hide a missing library."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def cuda_library() -> Extension:
    """Describe the library, or stop: who asks for it must not get an install without it."""
    sources = sorted(glob("csrc/cuda/*.cu"))
    if not sources:
        raise SystemExit("FASTATTN_BUILD_CUDA=1: expected CUDA sources csrc/cuda/*.cu, found none")
    if shutil.which("nvcc") is None:
        raise SystemExit("FASTATTN_BUILD_CUDA=1: expected nvcc on PATH, found none")
    return Extension("fastattn.libfastattn_cuda", sources, depends=sorted(glob("csrc/cuda/*.cuh")))


def cpp_compiler() -> list[str] | None:
    """The command of a C++ compiler with gcc's options, or None."""
    candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    for candidate in filter(None, candidates):
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def cpu_library() -> list[Extension]:
    """Describe the library, if it can be compiled here."""
    wanted = switch("FASTATTN_BUILD_CPU")
    sources = sorted(glob("csrc/cpu/*.cpp"))
    problem = None
    if not sources:
        problem = "expected C++ sources csrc/cpu/*.cpp, found none"
    elif cpp_compiler() is None:
        problem = "expected a C++ compiler (CXX, c++, g++ or clang++), found none"
    if wanted and problem:
        raise SystemExit(f"FASTATTN_BUILD_CPU=1: {problem}")
    if problem and wanted is None:
        print(f"{WITHOUT}: {problem}", file=sys.stderr)
    if wanted is False or problem:
        return []
    return [Extension(CPU_LIBRARY, sources, depends=sorted(glob("csrc/cpu/*.h")), optional=not wanted)]


def cpu_objects(test_variants: bool) -> list[tuple[str, str, list[str]]]:
    """(object, source, flags) of every compilation, the longest first."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants: list[tuple[str, list[str], tuple[str, ...]]]
    variants = [(name, flags, ENGINE_SOURCES) for name, flags in VARIANTS.items() if x86 or not flags]
    if x86:
        variants.append((*BESIDE, BESIDE_SOURCES))
    if test_variants:
        variants.append((*TEST_VARIANT, ENGINE_SOURCES))
    engines = [
        (f"{Path(source).stem}_{name}.o", f"csrc/cpu/{source}", [*ENGINE_FLAGS, *flags, f"-DFASTATTN_VARIANT={name}"])
        for source in sorted(ENGINE_SOURCES, reverse=True)
        for name, flags, sources in reversed(variants)
        if source in sources
    ]
    others = {Path(source) for source in glob("csrc/cpu/*.cpp")} - {Path("csrc/cpu", name) for name in ENGINE_SOURCES}
    return [*engines, *((f"{path.stem}.o", str(path), []) for path in sorted(others))]


class BuildNative(build_ext):
    """The CUDA library in one nvcc call, the CPU library in parallel ones."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no ABI tag: not a Python module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CPU_LIBRARY:
            try:
                self.build_cpu(target)
            except CompileError as error:
                if not ext.optional:
                    raise
                print(f"{WITHOUT}: {error}", file=sys.stderr)
                self.extensions = [other for other in self.extensions if other is not ext]  # nothing to copy or list
        else:
            digest = runpy.run_path("fastattn/backends/cuda.py")["source_digest"](Path("csrc/cuda"))
            define = f'-DFASTATTN_DIGEST="{digest}"'
            subprocess.run(["nvcc", *NVCC_FLAGS, define, *ext.sources, "-o", str(target)], check=True)

    def build_cpu(self, target: Path) -> None:
        compiler = cpp_compiler()
        assert compiler is not None
        extra = shlex.split(os.environ.get("FASTATTN_CPU_FLAGS", ""))  # sanitizers, test variants
        digest = runpy.run_path("fastattn/backends/cpu/library.py")["source_digest"](Path("csrc/cpu"))
        folder = Path(self.build_temp) / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        objects = cpu_objects("-DFASTATTN_TEST_VARIANTS" in extra)
        shared = [*compiler, *CPU_FLAGS, f'-DFASTATTN_DIGEST="{digest}"']
        commands = [
            [*shared, *flags, *extra, "-c", source, "-o", str(folder / name)] for name, source, flags in objects
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.run_compiler, commands))
        link = [*compiler, "-shared", "-pthread", *extra, *(str(folder / name) for name, _, _ in objects)]
        if sys.platform == "linux":  # nothing beside libc: the library fits every distribution as old as this one
            link += ["-static-libgcc", "-Wl,--exclude-libs,ALL"]
        # Beside the target first: whoever has the old one mapped keeps it, and nobody sees half a file.
        part = target.with_suffix(".part")
        self.run_compiler([*link, "-o", str(part)])
        part.replace(target)

    def run_compiler(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            print(shlex.join(command), result.stderr, sep="\n", file=sys.stderr)
            raise CompileError(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)


class WheelForAnyPython(bdist_wheel):
    """Tagged for the platform and the C library that the native code needs, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        if self.root_is_pure:
            return tag
        platform_tag = tag[2]
        assert self.bdist_dir is not None
        needs = [
            tuple(map(int, version))
            for path in glob(os.path.join(self.bdist_dir, "fastattn", "*.so"))
            for version in re.findall(rb"GLIBC_(\d+)\.(\d+)", Path(path).read_bytes())
        ]
        if needs and platform_tag.startswith("linux_"):
            platform_tag = "manylinux_{}_{}_{}".format(*max(needs), platform_tag.removeprefix("linux_"))
        return "py3", "none", platform_tag


class EditableByPath(editable_wheel):
    """An editable install that type checkers see: a folder on the path, with nothing in it but a link to the package.

    By itself setuptools installs an import hook here, since the device code has a folder of its own; type checkers
    follow paths only. The checkout itself must not be on the path: its other folders would be packages too. Where a
    system has no symbolic links, setuptools links file by file instead: a new file needs a new install there.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        folder = Path(".editable")
        folder.mkdir(exist_ok=True)
        link = folder / "fastattn"
        try:
            if not link.is_symlink():
                link.symlink_to(Path("..", "fastattn"), target_is_directory=True)
        except OSError:
            pass
        if (link / "kernels").is_dir():
            self.package_dir = {"": str(folder)}
        else:
            self.mode = "strict"  # the hook does not know packages without an __init__.py


setup(
    ext_modules=[*cpu_library(), *([cuda_library()] if switch("FASTATTN_BUILD_CUDA") else [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForAnyPython, "editable_wheel": EditableByPath},
)
