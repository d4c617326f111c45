"""What is shipped: files of the sdist and the wheel, installs outside the checkout, the native libraries."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from fastattn.backends import cuda
from fastattn.backends.cpu import library as cpu_library

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD_INPUTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
SITE_PACKAGES = sysconfig.get_path("purelib")

IMPORT_EVERYTHING = """
    import importlib, pkgutil, sys
    import fastattn, fastattn.kernels
    names = [module.name for module in pkgutil.walk_packages(fastattn.__path__, "fastattn.")]
    names += [module.name for module in pkgutil.iter_modules(fastattn.kernels.__path__, "fastattn.kernels.")]
    names.remove("fastattn.__main__")
    of_a_library = {"fastattn.integrations.timm", "fastattn.integrations.torchvision"}  # which is not here
    for name in {*names} - of_a_library:
        importlib.import_module(name)
    assert "kernels" not in sys.modules
    print(fastattn.__file__, *names, sep="\\n")
"""


def run(*command, cwd, env=None, check=True):
    """Run outside the checkout's influence: no PYTHONPATH, no switch left over from the caller. Nothing is compiled."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTATTN_BUILD_CUDA", "CXX")}
    clean["FASTATTN_BUILD_CPU"] = "0"
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True
    )
    if check and result.returncode:
        raise AssertionError(f"{command} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def copy_sources(target):
    """The inputs of a build, the symlink kept as one: building writes beside its sources."""
    target.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in BUILD_INPUTS:
        shutil.copy(ROOT / name, target)
    for folder in ("fastattn", "kernels", "csrc"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=skip)
    return target


def build(kind, source, out, env=None, check=True):
    """Call setuptools' build hook as pip does, without a build environment: nothing is downloaded."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir(exist_ok=True)
    result = run(sys.executable, "-c", code, cwd=source, env=env, check=check)
    return next(out.iterdir()) if check else result


def make_venv(folder):
    """An empty environment that sees what is installed beside pytest, though not editable installs there."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent)
    Path(site.stdout.strip(), "outer.pth").write_text(SITE_PACKAGES + "\n")
    return python


def pip_install(python, *args, cwd):
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--ignore-installed",
        "--no-deps", "--no-index", "--no-build-isolation", *args, cwd=cwd,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("source") / "fastattn")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(source, wheel, tmp_path_factory):
    """The python of an environment with the package, for each way to install it; tests write nothing there."""

    @functools.cache
    def install(kind):
        folder = tmp_path_factory.mktemp(f"installed-{kind}")
        args = {
            "wheel": [wheel],
            "editable": ["--editable", source],
            "editable-strict": ["--editable", source, "--config-settings", "editable_mode=strict"],
        }[kind]
        python = make_venv(folder / "venv")
        pip_install(python, *args, cwd=folder)
        return python

    return install


def python_files(folder, prefix):
    return {f"{prefix}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}


def expected_modules():
    own = {p for p in python_files(ROOT / "fastattn", "fastattn") if not p.startswith("fastattn/kernels/")}
    return own | python_files(ROOT / "kernels", "fastattn/kernels")


def test_symlink_is_in_the_checkout():
    assert (ROOT / "fastattn" / "kernels").is_symlink()
    assert os.readlink(ROOT / "fastattn" / "kernels") == "../kernels"


def test_every_package_on_disk_is_listed():
    on_disk = {str(Path(name).parent).replace("/", ".") for name in expected_modules()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == expected_modules() | {"fastattn/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_metadata(wheel):
    import fastattn

    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert f"\nVersion: {fastattn.__version__}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    top_level = archive.read(name.replace("METADATA", "top_level.txt")).decode()
    assert top_level.split() == ["fastattn"]


def test_one_release_number():
    import fastattn

    assert f"\nversion: {fastattn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert fastattn.__version__ in (ROOT / "CHANGELOG.md").read_text().partition("### Added")[0]


def test_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        called = re.findall(r"run: make ([a-z][a-z -]*)$", text, re.M)
        called += re.findall(r"target: \[([a-z ,-]*)\]", text)
        targets = [target for line in called for target in re.split(r"[ ,]+", line)]
        assert {"lint", "types", "docs", "test", "dist"} <= set(targets)
        for target in targets:
            assert re.search(rf"^{target}:", makefile, re.M), f"{path.name}: make {target}"


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    top = {name.split("/")[0] for name in names if name}
    extra = {"fastattn.egg-info", "PKG-INFO", "setup.cfg"}
    csrc = {"csrc"} if (ROOT / "csrc").is_dir() else set()
    assert top == {*BUILD_INPUTS, "fastattn", "kernels"} | extra | csrc
    assert not any(name.startswith("fastattn/kernels") for name in names)

    rebuilt = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("kind", ["wheel", "editable", "editable-strict"])
def test_installed_package_imports_everything(kind, installed, source, tmp_path):
    python = installed(kind)
    output = run(python, "-c", textwrap.dedent(IMPORT_EVERYTHING), cwd=tmp_path).stdout.splitlines()
    if kind != "editable":
        assert Path(output[0]).is_relative_to(python.parents[1] if kind == "wheel" else source / "build")
    else:
        assert Path(output[0]).is_relative_to(source)
    files = expected_modules()
    modules = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in files}
    assert {"fastattn", *output[1:]} == modules - {"fastattn.__main__"}


USES_TYPES = """
import fastattn

reveal_type(fastattn.attention)
reveal_type(fastattn.nn.CausalLMConfig(vocab_size=3).num_heads)
fastattn.attention(1, 2)  # v is missing
"""
CHECKERS = {"pyright": ["--pythonpath"], "mypy": ["--python-executable"]}


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_type_checkers_see_the_package(checker, kind, installed, tmp_path):
    """As installed by the README's own line, and from a wheel."""
    pytest.importorskip(checker, reason=f"{checker} is not installed: make env")
    python = shutil.copytree(installed(kind).parents[1], tmp_path / "venv", symlinks=True) / "bin" / "python"
    for outer in (tmp_path / "venv").rglob("outer.pth"):
        outer.unlink()  # the types of PyTorch take minutes to read, and are not what is asked
    program = tmp_path / "user" / "program.py"
    program.parent.mkdir()
    program.write_text(USES_TYPES)
    result = run(sys.executable, "-m", checker, *CHECKERS[checker], python, program, cwd=program.parent, check=False)
    assert "causal: bool" in result.stdout  # the signature, not Any or Unknown
    assert re.search(r'"int"|builtins\.int', result.stdout)
    assert re.search(r"program\.py:6\S* .*error: No overload", result.stdout)
    assert "import" not in result.stdout.lower().replace("important", "")  # nothing could not be found


def test_an_editable_install_puts_nothing_else_on_the_path(installed, source, tmp_path):
    """Not the checkout, whose other folders would be packages too; and new files are seen at once."""
    python = installed("editable")
    (added,) = [line for path in python.parents[1].rglob("__editable__*.pth") for line in path.read_text().split()]
    assert [path.name for path in Path(added).iterdir()] == ["fastattn"]
    (source / "fastattn" / "new_module.py").write_text("value = 42")
    code = "import fastattn.new_module as new; print(new.value)"
    try:
        assert run(python, "-c", code, cwd=tmp_path).stdout.strip() == "42"
    finally:
        (source / "fastattn" / "new_module.py").unlink()


def test_an_editable_install_without_the_symlink(tmp_path):
    """As on a system without links to folders: file by file."""
    source = copy_sources(tmp_path / "source")
    (source / "fastattn" / "kernels").unlink()
    python = make_venv(tmp_path / "venv")
    pip_install(python, "--editable", source, cwd=tmp_path)
    code = "import fastattn.kernels.config as module; print(module.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).stdout.strip()).samefile(source / "kernels" / "config.py")


def test_wheel_works_without_the_symlink(tmp_path):
    source = copy_sources(tmp_path / "source")
    (source / "fastattn" / "kernels").unlink()
    names = set(zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")).namelist())
    assert expected_modules() <= names


def test_the_folder_kernels_does_not_hide_the_package(tmp_path):
    """A Python started in the root finds PyPI's `kernels` where that is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '7.0'")
    code = "import sys; sys.path.append(sys.argv[1]); import kernels; print(kernels.__version__)"
    assert run(sys.executable, "-c", code, tmp_path, cwd=ROOT).stdout == "7.0\n"


def test_the_folder_kernels_does_not_pass_for_the_package():
    """transformers, which looks for it, finds none where none is installed."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")
    if "site-packages" in str(getattr(importlib.util.find_spec("kernels"), "origin", "")):
        pytest.skip("the package kernels is installed")
    code = "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout == "False\n"


class TestCpuLibrary:
    """Compiled where there is a compiler, and never in the way where there is none. Most tests compile a stub."""

    @pytest.fixture
    def with_stub(self, tmp_path):
        source = copy_sources(tmp_path / "source")
        for path in (source / "csrc" / "cpu").iterdir():
            if path.suffix == ".cpp":  # some are compiled once per instruction set
                path.write_text(f"namespace FASTATTN_VARIANT {{ int {path.stem}() {{ return 1; }} }}\n")
            else:
                path.unlink()
        (source / "csrc" / "cpu" / "library.cpp").write_text('extern "C" int fastattn_stub() { return 42; }\n')
        return source

    def build(self, source, tmp_path, value="", kind="wheel", check=True, **env):
        return build(kind, source, tmp_path / kind, {"FASTATTN_BUILD_CPU": value, **env}, check)

    @staticmethod
    def libraries(wheel):
        return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

    @pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
    @pytest.mark.parametrize("value", ["", "1"])
    def test_a_wheel_for_every_python(self, value, with_stub, tmp_path):
        wheel = self.build(with_stub, tmp_path, value)
        assert self.libraries(wheel) == ["fastattn/libfastattn_cpu.so"]
        assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
        metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(metadata).decode()

    def test_off_never_compiles(self, with_stub, tmp_path):
        wheel = self.build(with_stub, tmp_path, "0", CXX="/bin/false")
        assert not self.libraries(wheel) and wheel.name.endswith("-py3-none-any.whl")

    @pytest.mark.parametrize("kind", ["wheel", "editable"])
    def test_a_compiler_that_fails_is_no_error(self, kind, with_stub, tmp_path):
        result = self.build(with_stub, tmp_path, kind=kind, CXX="/bin/false", check=False)
        assert result.returncode == 0, result.stderr
        assert "installed without its CPU kernels, PyTorch's serve instead: /bin/false failed" in result.stderr
        assert not self.libraries(next((tmp_path / kind).iterdir()))

    def test_no_compiler_is_no_error(self, with_stub, tmp_path):
        (tmp_path / "bin").mkdir()
        result = self.build(with_stub, tmp_path, PATH=str(tmp_path / "bin"), check=False)
        assert result.returncode == 0, result.stderr
        assert "serve instead: expected a C++ compiler (CXX, c++, g++ or clang++), found none" in result.stderr

    def test_asked_for_it_is_an_error(self, with_stub, tmp_path):
        (tmp_path / "bin").mkdir()
        result = self.build(with_stub, tmp_path, "1", PATH=str(tmp_path / "bin"), check=False)
        assert result.returncode and "FASTATTN_BUILD_CPU=1: expected a C++ compiler" in result.stderr
        assert self.build(with_stub, tmp_path, "1", CXX="/bin/false", check=False).returncode

    def test_other_values_fail(self, with_stub, tmp_path):
        result = self.build(with_stub, tmp_path, "yes", check=False)
        assert result.returncode and "FASTATTN_BUILD_CPU: expected 0 or 1, got 'yes'" in result.stderr

    @staticmethod
    def assert_needs_the_c_library_alone(library):
        if sys.platform == "linux":
            assert b"libstdc++" not in library and b"libgcc_s" not in library and b"libgomp" not in library

    @pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")
    def test_the_one_in_use_is_small(self):
        library = (ROOT / "fastattn" / "libfastattn_cpu.so").read_bytes()
        assert len(library) < 4e6
        self.assert_needs_the_c_library_alone(library)

    @pytest.mark.slow
    @pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
    def test_the_real_one_from_an_sdist(self, source, tmp_path):
        """Nothing but the C library beside it, and it runs. Not optimised, which takes most of the time."""
        sdist = build("sdist", source, tmp_path / "sdist")
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
        wheel = self.build(unpacked, tmp_path, "1", FASTATTN_CPU_FLAGS="-O0")
        library = zipfile.ZipFile(wheel).read("fastattn/libfastattn_cpu.so")
        self.assert_needs_the_c_library_alone(library)
        if sys.platform == "linux":
            assert "manylinux_" in wheel.name or b"GLIBC_" not in library
        python = make_venv(tmp_path / "venv")
        pip_install(python, wheel, cwd=tmp_path)
        code = """
            import torch, fastattn
            from fastattn.backends.cpu import library as cpu_library
            from fastattn.testing import check_kvcache
            assert cpu_library.problem() is None, cpu_library.problem()
            q, cache = torch.randn(1, 2, 1, 16), torch.randn(1, 8, 2, 16)
            check_kvcache(q, cache, cache, cache_lens=8, backend="cpu")
            print(fastattn.__file__)
        """
        assert str(tmp_path / "venv") in run(python, "-c", textwrap.dedent(code), cwd=tmp_path).stdout


class TestCudaSwitch:
    """A stub source and, but for one test, a stub compiler: what is tested is the switch."""

    @pytest.fixture
    def with_cuda(self, tmp_path):
        source = copy_sources(tmp_path / "source")
        shutil.rmtree(source / "csrc", ignore_errors=True)
        (source / "csrc" / "cuda").mkdir(parents=True)
        (source / "csrc" / "cuda" / "stub.cu").write_text('extern "C" int fastattn_stub() { return 42; }\n')
        return source

    @staticmethod
    def path_with(folder, nvcc):
        """A PATH on which nvcc is the given script, or missing."""
        folder.mkdir()
        if nvcc:
            (folder / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
            (folder / "nvcc").chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin"}

    def build(self, source, tmp_path, value, env=None, check=True):
        env = {"FASTATTN_BUILD_CUDA": value, **(env or {})}
        return build("wheel", source, tmp_path / "wheel", env, check)

    @pytest.mark.parametrize("value", ["", "0"])
    def test_off_never_compiles(self, value, with_cuda, tmp_path):
        env = self.path_with(tmp_path / "bin", "exit 1")
        wheel = self.build(with_cuda, tmp_path, value, env)
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

    def test_on_ships_the_library(self, with_cuda, tmp_path):
        env = self.path_with(tmp_path / "bin", 'for last; do :; done; echo "$@" > "$last"')
        archive = zipfile.ZipFile(self.build(with_cuda, tmp_path, "1", env))
        command = archive.read("fastattn/libfastattn_cuda.so").decode()
        assert "csrc/cuda/stub.cu" in command and "sm_90a" in command
        assert f'-DFASTATTN_DIGEST="{cuda.source_digest(with_cuda / "csrc" / "cuda")}"' in command

    def test_on_without_a_compiler_fails(self, with_cuda, tmp_path):
        if shutil.which("nvcc", path="/usr/bin:/bin"):
            pytest.skip("nvcc stands in /usr/bin, where other tools are needed from")
        result = self.build(with_cuda, tmp_path, "1", self.path_with(tmp_path / "bin", None), check=False)
        assert result.returncode and "expected nvcc on PATH, found none" in result.stderr

    def test_on_with_a_compiler_that_fails(self, with_cuda, tmp_path):
        env = self.path_with(tmp_path / "bin", "exit 3")
        assert self.build(with_cuda, tmp_path, "1", env, check=False).returncode

    def test_on_without_sources_fails(self, with_cuda, tmp_path):
        (with_cuda / "csrc" / "cuda" / "stub.cu").unlink()
        result = self.build(with_cuda, tmp_path, "1", check=False)
        assert result.returncode and "expected CUDA sources csrc/cuda/*.cu, found none" in result.stderr

    def test_other_values_fail(self, with_cuda, tmp_path):
        result = self.build(with_cuda, tmp_path, "yes", check=False)
        assert result.returncode and "expected 0 or 1, got 'yes'" in result.stderr

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
    def test_real_library_is_built_in_place_and_loads(self, with_cuda, tmp_path):
        env = {"FASTATTN_BUILD_CUDA": "1"}
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=with_cuda, env=env)
        code = "import ctypes; print(ctypes.CDLL('fastattn/libfastattn_cuda.so').fastattn_stub())"
        assert run(sys.executable, "-c", code, cwd=with_cuda).stdout.strip() == "42"
