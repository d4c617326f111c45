"""Writes docs/status.md: what has passed on which GPU at which commit, and what has never run on one.

python -m benchmarks.status --write      or --check, which fails where the page is not what the data says
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import parity, results
from .provenance import ROOT, digest
from .summary import markdown

PAGE = ROOT / "docs" / "status.md"
HEADER = """# Status on GPUs

<!-- Generated from benchmarks/results by `python -m benchmarks.status --write`. Do not edit. -->

What the Triton kernels have been run on. A feature has passed where output, log-sum-exp and every gradient kept to the
parity rule of `fastattn/testing.py` in every dtype and head dim listed. Without a GPU the same kernels run in Triton's
interpreter and are compiled ahead of time for four architectures; that is part of the test suite and not of this page.
The CUDA C++ kernel of `csrc/`, which nothing chooses unasked, is the last line of each table of checks.
"""
OTHER_CHECKS = {
    "tests": "the tests that take a device",
    "determinism": "repeats are equal bit for bit",
    "race": "the same while another stream is busy",
    "memcheck": "compute-sanitizer memcheck",
    "racecheck": "compute-sanitizer racecheck",
}


def verdict(rows: Sequence[results.Row], expected: int, current: str) -> str:
    """One entry of the table: passed, failed or never run, with counts, commit and age."""
    if not rows:
        return "never run"
    bad = [row for row in rows if row["outcome"] in ("failed", "error", "not reached")]
    good = sum(row["outcome"] == "passed" for row in rows)
    if bad:
        first = bad[0]
        text = f"**{first['outcome']}** {len(bad)}/{len(rows)}, first {first['dtype']} {first['head_dim']}".rstrip()
    elif not good:
        return "not run"
    else:
        text = f"passed {good}/{expected}" if expected else "passed"
    commits = sorted({row["commit"] + ("+" if row["dirty"] == "yes" else "") for row in rows})
    text += f" at {', '.join(commits)}"
    return text if all(row["digest"] == current for row in rows) else f"{text}, older kernels"


def page(folder: Path = results.HERE, current: str | None = None) -> str:
    """The text of docs/status.md."""
    current = current or digest()
    gpus = [rows for path in results.devices(folder) if (rows := results.read(path / "parity.csv"))]
    parts = [HEADER]
    if not gpus:
        parts += ["**Nothing has run on any GPU yet.** No kernel of this package has been executed on one.\n"]
        return "\n".join([*parts, section("Any GPU", [], current)])
    parts += ["A `+` after a commit: with changes that were not committed.\n"]
    for rows in gpus:
        last = max(rows, key=lambda row: row["date"])
        software = f"Driver {last['driver']}, torch {last['torch']}, triton {last['triton']}."
        parts += [section(last["gpu"], rows, current, f"{software} Last run {last['date'][:10]}.\n\n")]
    return "\n".join(parts)


def section(title: str, rows: Sequence[results.Row], current: str, intro: str = "") -> str:
    """What one GPU has seen: features by kernels, then the other checks."""
    lines = [["feature", "dtypes and head dims", *parity.KERNELS]]
    for feature in parity.FEATURES:
        cases = [case for case in parity.matrix() if case.feature == feature]
        entries = []
        for kernel in parity.KERNELS:
            wanted = ("parity", kernel, feature)
            own = [row for row in rows if (row["check"], row["kernel"], row["feature"]) == wanted]
            entries.append(verdict(own, len(cases), current) if kernel in parity.outcomes(feature, None) else "-")
        lines.append([feature, describe(cases), *entries])
    checks = [["check", "", "outcome"]]
    for check, text in OTHER_CHECKS.items():
        checks.append([check, text, verdict([row for row in rows if row["check"] == check], 0, current)])
    # A file of tests that were all skipped, for want of the library, is stored as passed.
    own = [row for row in rows if (row["check"], row["feature"]) == ("tests", "test_cuda.py")]
    own = [row for row in own if row["outcome"] != "passed" or "passed" in row["note"]]
    checks.append(["CUDA C++", "forward parity of the library that `make ext` compiles", verdict(own, 0, current)])
    return f"## {title}\n\n{intro}{markdown(lines)}\n\n{markdown(checks)}\n"


def describe(cases: Sequence[parity.ParityCase]) -> str:
    by_dtype: dict[str, list[str]] = {}
    for case in cases:
        dim = parity.FEATURES[case.feature].shape.head_dim or case.head_dim
        by_dtype.setdefault(case.dtype, []).append(str(dim))
    return "; ".join(f"{dtype} {', '.join(dims)}" for dtype, dims in by_dtype.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text = page()
    if args.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is not what the data says: python -m benchmarks.status --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
