"""The conditions of a measurement: stored in every row, so that an old number can be recognised."""

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import io
import os
import platform
import subprocess
import tokenize
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from fastattn.backends.cpu import library

from .device import Device, processor

MISSING = "expected the CPU kernels, without which PyTorch's would be measured in their place: "
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kernels", "csrc")
COMMIT_VARIABLE = "FASTATTN_COMMIT"
FIELDS = (
    "gpu", "driver", "torch", "triton", "cuda", "python", "cpu", "threads", "commit", "dirty", "digest", "date",
)  # fmt: skip


def provenance(device: Device) -> dict[str, str]:
    """One value per name in FIELDS, "unknown" where it cannot be found out."""
    commit, dirty = revision()
    values = (
        device.name, driver() if device.torch_device == "cuda" else "none", torch.__version__, version("triton"),
        torch.version.cuda or "none", platform.python_version(), processor(), str(torch.get_num_threads()),
        commit, dirty, digest(), datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def digest(root: Path = ROOT) -> str:
    """A digest of the names and contents of every kernel's sources."""
    hasher = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                hasher.update(path.relative_to(root).as_posix().encode() + b"\0")
                hasher.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return hasher.hexdigest()[:12]


def code_digest(root: Path = ROOT, without: Collection[str] = ()) -> str:
    """A digest of the Triton kernels' code: comments, docstrings, empty lines and files ``without`` do not count."""
    return digest_of(path for path in (root / "kernels").glob("*.py") if path.name not in without)


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of the code of some Python files, whose names differ."""
    hasher = hashlib.sha256()
    for path in sorted(paths):
        hasher.update(path.name.encode() + b"\0" + code(path.read_text(encoding="utf-8")).encode() + b"\0")
    return hasher.hexdigest()[:12]


@functools.cache
def code(source: str) -> str:
    """A Python file without comments, strings that stand alone, and empty lines; the same on every Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            if "\n".join(lines[first:last]).strip() == ast.get_source_segment(source, node):  # nothing else beside it
                lines[first:last] = [""] * (last - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def revision(root: Path = ROOT) -> tuple[str, str]:
    """(commit, dirty). Without a .git folder from the variable FASTATTN_COMMIT, as ``git describe --always --dirty``
    writes it. Results and what is generated from them do not make a tree dirty.
    """
    if (root / ".git").exists():
        commit = git(root, "rev-parse", "--short=12", "HEAD")
        changes = git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")
        if commit:
            return commit, "yes" if changes else "no"
    given = os.environ.get(COMMIT_VARIABLE, "")
    if given:
        return given.removesuffix("-dirty"), "yes" if given.endswith("-dirty") else "no"
    return "unknown", "unknown"


def git(root: Path, *arguments: str) -> str:
    """Output of a git command, empty where it fails or there is no git."""
    return command("git", "-C", str(root), *arguments)


@functools.cache
def driver() -> str:
    return command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"


def conditions() -> str:
    """Clock, power and temperature of the GPU at this moment, which show throttling."""
    query = "clocks.sm,power.draw,temperature.gpu"
    values = command("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").partition("\n")[0]
    return " ".join(values.replace(",", "").split()) + " C" if values else "conditions unknown"


def command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def without_kernels(suites: Collection[str]) -> str | None:
    """Why figures of these suites on a CPU would be those of PyTorch's kernels, in one line with the cure; or None."""
    problem = library.problem()
    if problem is None or set(suites) <= {"launch"}:  # which measures Triton's launches on the host
        return None
    return MISSING + problem
