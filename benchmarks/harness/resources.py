"""The resources that every kernel needs, compiled ahead of time: `results/resources/compiled-*.csv`, one file for each
target and Triton version. `sources.csv` beside them says from which sources each was made.

`python -m benchmarks.tools.resources` writes them, tests/kernels/test_resources.py holds them to the limits.
"""

import hashlib
from pathlib import Path

from . import provenance, results

HERE = results.HERE / "resources"
RENEW = "make resources"
TRITONS = ("3.6.0", "3.7.1", "3.9.0")
"""The Tritons of the oldest supported PyTorch and of `constraints.txt`, and the newest one."""
ARCH = "sm_90"
OTHERS = ("sm_80", "sm_100", "gfx942")
TABLES = (*((ARCH, version) for version in TRITONS), *((arch, TRITONS[1]) for arch in OTHERS))
"""(target, Triton version) of each table: all cases for Hopper, a few for the others, whose tiles are untuned."""
DECIDE = ("calls", "compile_report", "resources", "sass", "static_model", "tile_search")
"""Modules of `benchmarks.tools` that decide what the rows are."""


def path(arch: str, version: str, folder: Path = HERE) -> Path:
    """The file of one target and Triton version."""
    return folder / f"compiled-{arch}-{version}.csv"


def key(row: results.Row) -> tuple[str, ...]:
    """The values that distinguish one row of a file from another."""
    return tuple(row[name] for name in results.COMPILED_KEY)


def stamp(arch: str, version: str, folder: Path = HERE) -> results.Row:
    """The sources that a file was made from; empty values if there is no file."""
    rows = results.read(folder / "sources.csv")
    found = (row for row in rows if (row["arch"], row["triton"]) == (arch, version))
    return next(found, dict.fromkeys(results.SOURCES_FIELDS, ""))


def write(arch: str, version: str, rows: list[results.Row], folder: Path = HERE) -> None:
    """Replace a whole file by these rows, and record their sources."""
    path(arch, version, folder).unlink(missing_ok=True)
    results.upsert(path(arch, version, folder), rows)
    commit, dirty = provenance.revision()
    made = {"arch": arch, "triton": version, "commit": commit, "dirty": dirty, "digest": provenance.code_digest()}
    results.upsert(folder / "sources.csv", [made | {"inputs": inputs()}])


def inputs(root: Path = provenance.ROOT) -> str:
    """A digest of all code that decides what the rows are: the kernels, what launches, compiles and reads them."""
    tools = (root / "benchmarks" / "tools" / f"{name}.py" for name in DECIDE)
    digests = map(
        provenance.digest_of, ((root / "kernels").glob("*.py"), (root / "fastattn" / "spec").glob("*.py"), tools)
    )
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def sample(rows: list[results.Row], seed: str) -> list[results.Row]:
    """One row of each kernel, another with each ``seed``. Of three drawn rows it is the one that
    compiles fastest, by the length of its code, and with its smaller tiles if they are compiled too.
    """
    drawn: dict[str, list[results.Row]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {key(row)}".encode()).digest()):
        drawn.setdefault(row["kernel"], []).append(row)
    return [
        min(of_kernel[:3], key=lambda row: int(row["size"]) * (3 if row["smaller"] else 1))
        for of_kernel in drawn.values()
    ]
