"""Writes the files that the `kernels` library of Hugging Face loads: ``python -m benchmarks.tools.hub build/hub``.

``build.toml``, and ``build/torch-BACKEND``: Python and Triton alone, no native library, hence for every version of
PyTorch and Python. A process may hold several versions, and an installed fastattn beside them: imports are relative,
and operators are registered under a name derived from the sources.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.provenance import ROOT

BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1
"""The version of the kernel's interface on the Hub: raised when callers have to change."""

# The parts of the package that attention needs, besides kernels/.
INTEGRATION = ("__init__", "hub", "huggingface", "huggingface_eager", "huggingface_mask", "huggingface_paged")
PARTS = (
    "backends", "block_mask.py", "functional", "kernels", "ops", "spec",
    *(f"integrations/{name}.py" for name in INTEGRATION),
)  # fmt: skip
PUBLIC = {
    "block_mask": ("BlockMask",),
    "functional": ("attention", "attention_varlen", "attention_with_kvcache", "merge"),
    "integrations.hub": ("flash_attn_forward", "supports_flash_attn"),
}
BUILD = f"""[general]
name = "fastattn"
version = {VERSION}
edition = 5
license = "BSD-3-Clause"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def sources(root: Path) -> dict[str, str]:
    """Text of every module, by its path in the kernel."""
    package = root / "fastattn"
    files: list[Path] = []
    for part in PARTS:
        path = package / part
        files += [path] if path.suffix else [*path.rglob("*.py")]
    return {path.relative_to(package).as_posix(): path.read_text() for path in sorted(files)}


def relocated(text: str, path: str, namespace: str) -> str:
    """A module with relative imports, whose operators are in ``namespace``.

    Raises:
        ValueError: an import of the package by its name is left, in a form that is not known here.
    """
    above = "." * len(Path(path).parts)
    text = re.sub(r"^(\s*)from fastattn\.([\w.]+) import", rf"\1from {above}\2 import", text, flags=re.M)
    text = re.sub(r"^(\s*)from fastattn import", rf"\1from {above} import", text, flags=re.M)
    for form in (r"torch\.ops\.(fastattn)\b", r"Library\(\"(fastattn)\"", r"\"(fastattn)::"):
        text = re.sub(form, lambda match: match[0].replace("fastattn", namespace), text)
    if left := re.search(r"^\s*(import|from) fastattn\b.*", text, re.M):
        raise ValueError(f"{path}: expected 'from fastattn... import ...', got {left[0].strip()!r}")
    return text


def entry() -> str:
    """The kernel's own module: its public names and nothing else."""
    imports = [f"from .{module} import {', '.join(names)}" for module, names in PUBLIC.items()]
    names = sorted(name for names in PUBLIC.values() for name in names)
    doc = '"""fastattn: one fused attention operator for PyTorch, as a kernel of the Hub."""'
    return "\n".join([doc, "", *imports, "", f"__all__ = {json.dumps(names)}", ""])


def write(target: Path, root: Path = ROOT) -> None:
    """Write the layout into an empty ``target``, from the checkout ``root``."""
    texts = sources(root)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    target.mkdir(parents=True)
    (target / "build.toml").write_text(BUILD)
    shutil.copy(root / "LICENSE", target)
    for backend in BACKENDS:
        variant, namespace = target / "build" / f"torch-{backend}", f"_fastattn_{backend}_{digest}"
        for path, text in texts.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(relocated(text, path, namespace))
        (variant / "__init__.py").write_text(entry())
        metadata = {
            "id": namespace, "name": "fastattn", "version": VERSION, "license": "BSD-3-Clause", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.hub", description=__doc__)
    parser.add_argument("target", type=Path, help="folder to write, anew")
    target = parser.parse_args(argv).target
    if (target / "build.toml").is_file():  # of an earlier call
        shutil.rmtree(target)
    write(target)
    print(f"{target}: {', '.join(path.name for path in sorted((target / 'build').iterdir()))}")


if __name__ == "__main__":
    main()
