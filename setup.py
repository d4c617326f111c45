"""Builds the optional CUDA library; everything else about the package is in pyproject.toml.

``FASTATTN_BUILD_CUDA=1 pip install .`` compiles ``csrc/cuda/*.cu`` into ``fastattn/libfastattn_cuda.so``, a C
interface without PyTorch headers, so the library depends on neither the Python nor the PyTorch version.
With the variable unset, empty or 0 nothing is compiled.
"""

import os
import runpy
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

NVCC_FLAGS = ["-O3", "-std=c++17", "--shared", "-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a"]


def cuda_wanted() -> bool:
    """Read the switch. Any other value is an error: a guess could hide a missing library."""
    value = os.environ.get("FASTATTN_BUILD_CUDA", "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTATTN_BUILD_CUDA: expected 0 or 1, got {value!r}")
    return value == "1"


def cuda_library() -> Extension:
    """Describe the library, or stop: who asks for it must not get an install without it."""
    sources = sorted(glob("csrc/cuda/*.cu"))
    if not sources:
        raise SystemExit("FASTATTN_BUILD_CUDA=1: expected CUDA sources csrc/cuda/*.cu, found none")
    if shutil.which("nvcc") is None:
        raise SystemExit("FASTATTN_BUILD_CUDA=1: expected nvcc on PATH, found none")
    return Extension("fastattn.libfastattn_cuda", sources, depends=sorted(glob("csrc/cuda/*.cuh")))


class BuildWithNvcc(build_ext):
    """Compile and link in one nvcc call."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no ABI tag: not a Python module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = runpy.run_path("fastattn/backends/cuda.py")["source_digest"](Path("csrc/cuda"))
        define = f'-DFASTATTN_DIGEST="{digest}"'
        subprocess.run(["nvcc", *NVCC_FLAGS, define, *ext.sources, "-o", str(target)], check=True)


class EditableByPath(editable_wheel):
    """An editable install that type checkers see: a folder on the path, with nothing in it but a link to the package.

    By itself setuptools installs an import hook here, since the device code has a folder of its own; type checkers
    follow paths only. The checkout itself must not be on the path: transformers would import its ``kernels``. Where a
    system has no symbolic links, the hook remains.
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
            return
        if (link / "kernels" / "__init__.py").is_file():
            self.package_dir = {"": str(folder)}


setup(
    ext_modules=[cuda_library()] if cuda_wanted() else [],
    cmdclass={"build_ext": BuildWithNvcc, "editable_wheel": EditableByPath},
)
