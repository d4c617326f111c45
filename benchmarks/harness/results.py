"""Results as data: one CSV file per suite in a folder per device. A new row replaces the one with the same key."""

import csv
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from . import provenance

HERE = Path(__file__).resolve().parents[1] / "results"
KEY = (
    "case", "mode", "provider", "dtype", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "causal",
)  # fmt: skip
VALUES = (
    "p20_ms", "p50_ms", "p80_ms", "min_ms", "repeats", "tflops", "of_matmul", "tokens_per_s", "peak_mib", "mbytes",
    "of_copy", "note",
)  # fmt: skip
FIELDS = (*KEY, *VALUES, *provenance.FIELDS)

CHECK_KEY = ("check", "kernel", "feature", "dtype", "head_dim")
CHECK_FIELDS = (*CHECK_KEY, "outcome", "seconds", "note", *provenance.FIELDS)

TUNE_KEY = (
    "kernel", "dtype", "head_dim", "causal", "block_m", "block_n", "num_warps", "num_stages", "split_programs",
    "pipelined",
)  # fmt: skip
TUNE_FIELDS = (*TUNE_KEY, "stage", "p20_ms", "p50_ms", "p80_ms", "tflops", "note", *provenance.FIELDS)

CANDIDATES_KEY = ("kernel", "head_dim", "block_m", "block_n", "num_warps", "num_stages", "pipelined")
CANDIDATES_FIELDS = (
    *CANDIDATES_KEY, "registers", "spills", "local", "instructions", "shared", "serialised", "share", "error", "triton",
    "digest",
)  # fmt: skip

COMPILED_KEY = ("kernel", "feature", "head_dim")
COMPILED_FIELDS = (
    *COMPILED_KEY, "dtype", "config", "error", "registers", "spills", "local", "local_edge", "shared", "wgmma",
    "serialised", "smallest_n", "mma_sync", "prefetch", "size", "instructions", "share", "smaller", "code",
)  # fmt: skip
SOURCES_KEY = ("arch", "triton")
SOURCES_FIELDS = (*SOURCES_KEY, "commit", "dirty", "digest", "inputs")

LAYOUTS = {
    "parity": (CHECK_KEY, CHECK_FIELDS), "tune": (TUNE_KEY, TUNE_FIELDS),
    "candidates": (CANDIDATES_KEY, CANDIDATES_FIELDS),
    "compiled": (COMPILED_KEY, COMPILED_FIELDS), "sources": (SOURCES_KEY, SOURCES_FIELDS),
}  # fmt: skip
"""Files that are not benchmark suites: key columns and all columns."""

NO_DEVICES = ("dry-run", "predictions", "resources")
"""Folders that are not those of devices."""

Row = dict[str, str]


def output_folder(argument: str | None) -> Path:
    """The folder for results: the argument, else $OUT, else the repository's own."""
    chosen = argument or os.environ.get("OUT")
    return Path(chosen) if chosen else HERE


def text(value: object) -> str:
    """A value as text in a file: six significant digits, yes and no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def archive(folder: Path) -> Path:
    """Pack ``folder``, a device's files, into one file next to it, for machines that return only few files."""
    target = folder.with_name(folder.name + ".tar")
    unfinished = target.with_suffix(".tar.part")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(unfinished, "w") as tar:
        for path in sorted(folder.glob("*.csv")):
            tar.add(path, f"{folder.name}/{path.name}")
    unfinished.replace(target)
    return target


def layout(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Key columns and all columns of a file, by its name."""
    return LAYOUTS.get(path.stem.partition("-")[0], (KEY, FIELDS))


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Add rows, replacing those of the same key in place. The file is never half written."""
    key, fields = layout(path)
    table = {tuple(row[name] for name in key): row for row in read(path)}
    for row in rows:
        if unknown := row.keys() - set(fields):
            raise ValueError(f"{path.name}: no column {', '.join(sorted(unknown))}")
        row = {name: row.get(name, "") for name in fields}
        table[tuple(row[name] for name in key)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(scratch, path)


def read(path: Path) -> list[Row]:
    """All rows of one file, with every column; none where there is no file."""
    _, fields = layout(path)
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: row.get(name) or "" for name in fields} for row in csv.DictReader(file)]


def devices(folder: Path = HERE) -> list[Path]:
    """The folders of real devices: GPUs before CPUs."""
    found = [
        path for path in folder.glob("*") if path.is_dir() and path.name not in NO_DEVICES and any(path.glob("*.csv"))
    ]
    return sorted(found, key=lambda path: (path.name.startswith("cpu"), path.name))
