"""Writes docs/status.md: which checks passed on which GPU at which commit, and which have never run on one.

python -m benchmarks.tools.status --write      or --check, which fails if the page disagrees with the data
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import parity, results
from benchmarks.harness.parity_features import FEATURES, CacheFeature, Feature
from benchmarks.harness.parity_features import KERNELS as EVERY_KERNEL
from benchmarks.harness.provenance import ROOT, digest
from benchmarks.harness.summary import markdown

PAGE = ROOT / "docs" / "status.md"
HEADER = """# Status on GPUs

<!-- Generated from benchmarks/results by `python -m benchmarks.tools.status --write`. Do not edit. -->

What the Triton kernels have been run on. A feature has passed where output, log-sum-exp and every gradient, or what was
written into the cache, kept to the parity rule of `fastattn/testing` in every dtype and head dim listed. Without a
GPU the same kernels run in Triton's interpreter and are compiled ahead of time for four architectures; that is part of
the test suite and not of this page. The CUDA C++ kernels of `csrc/`, which nothing chooses unasked, are the last lines
of each table of checks.
"""
CUDA = "CUDA C++"
"""The check of the kernels that `make ext` compiles, for each pass; recorded with the tests."""
OTHER_CHECKS = {
    "large": "tensors of more than 2^31 elements",
    "determinism": "50 repeats are equal bit for bit",
    "race": "250 repeats while another stream is busy",
    "memcheck": "compute-sanitizer memcheck",
    "racecheck": "compute-sanitizer racecheck",
    "synccheck": "compute-sanitizer synccheck",
    "tests": "the tests that take a device",
}
KERNELS: dict[str, tuple[str, Callable[[results.Row], bool]]] = {
    **{name: (text, lambda row, name=name: name in row["kernel"].split(", ")) for name, text in {
        "forward": "output and log-sum-exp", "delta": "row sums for the backward", "dkdv": "gradients of k and v",
        "dq": "gradient of q", "dbias": "gradient of the bias", "decode": "one step over a KV cache",
        "combine": "merges the parts of a step", "append": "writes into a KV cache",
    }.items()},
    **{name: (text, lambda row, name=name: row["feature"] in (name, "")) for name, text in {
        "packed sequences": "`attention_varlen`, in the kernels above",
        "block mask": "`BlockMask`, in the kernels above",
    }.items()},
}  # fmt: skip
"""Line of the table of kernels -> its description and its rows; rows without a feature belong to all lines."""


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
    """The results of one GPU: kernels by checks, features by kernels, then each check as a whole."""
    kinds = ("parity", *(check for check in OTHER_CHECKS if check != "tests"))
    overview = [["kernel", "", *kinds]]
    for name, (text, about) in KERNELS.items():
        own = [row for row in rows if about(row)]
        verdicts = [verdict([row for row in own if row["check"] == kind], 0, current) for kind in kinds]
        overview.append([name, text, *verdicts])
    tables = [markdown(overview)]
    for kind in (Feature, CacheFeature):
        features = {name: feature for name, feature in FEATURES.items() if isinstance(feature, kind)}
        kernels = [name for name in EVERY_KERNEL if any(name in feature.kernels for feature in features.values())]
        lines = [["feature", "dtypes and head dims", *kernels]]
        for name, feature in features.items():
            cases = [case for case in parity.matrix() if case.feature == name]
            entries = []
            for kernel in kernels:
                wanted = ("parity", kernel, name)
                own = [row for row in rows if (row["check"], row["kernel"], row["feature"]) == wanted]
                entries.append(verdict(own, len(cases), current) if kernel in feature.kernels else "-")
            lines.append([name, describe(cases), *entries])
        tables.append(markdown(lines))
    checks = [["check", "", "outcome"]]
    for check, text in OTHER_CHECKS.items():
        checks.append([check, text, verdict([row for row in rows if row["check"] == check], 0, current)])
    for which in ("forward", "backward"):
        own = [row for row in rows if (row["check"], row["kernel"]) == (CUDA, which)]
        checks.append([f"{CUDA} {which}", "parity of the library that `make ext` compiles", verdict(own, 0, current)])
    return f"## {title}\n\n{intro}" + "\n\n".join([*tables, markdown(checks)]) + "\n"


def describe(cases: Sequence[parity.ParityCase]) -> str:
    by_dtype: dict[str, list[str]] = {}
    for case in cases:
        dim = FEATURES[case.feature].head_dim or case.head_dim
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
        print(f"{PAGE.relative_to(ROOT)} is not what the data says: python -m benchmarks.tools.status --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
