"""Compares two commits on this machine in turns: did a change make anything faster or slower?

    python -m benchmarks.tools.compare HEAD~1 HEAD --suites forward --match D=128
    python -m benchmarks.tools.compare main .                 . is the working tree as it is

Each commit is checked out into a throwaway worktree, and both are measured by the benchmark code of this checkout,
round by round in processes of their own. The figure of a cell is its least median over the rounds.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import results
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.summary import aligned, geometric_mean

BENCHMARKS = Path(__file__).resolve().parents[1]
PARTS = ("fastattn", "kernels", "csrc")


@contextlib.contextmanager
def checkout(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A folder with the commit's sources and this checkout's benchmarks."""
    with tempfile.TemporaryDirectory(prefix="fastattn-compare-") as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        if commit == ".":
            tree.mkdir()
            for part in PARTS:
                if (root / part).is_dir():
                    shutil.copytree(root / part, tree / part, symlinks=True)
        else:
            subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(BENCHMARKS, tree / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
            yield tree
        finally:
            if commit != ".":
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run(tree: Path, output: Path, arguments: Sequence[str]) -> list[results.Row]:
    """Run the suites in a checkout and read the rows."""
    words = [sys.executable, "-m", "benchmarks", *arguments, "--output", str(output), "--providers", "fastattn"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{tree}: {' '.join(words)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return [row | {"suite": path.stem} for path in sorted(output.glob("*/*.csv")) for row in results.read(path)]


def key_of(row: results.Row) -> tuple[str, ...]:
    return (row["suite"], *(row[name] for name in results.KEY))


def least_medians(rounds: Sequence[list[results.Row]]) -> dict[tuple[str, ...], float]:
    least: dict[tuple[str, ...], float] = {}
    for rows in rounds:
        for row in rows:
            if row["p50_ms"] and row["provider"] == "fastattn":
                key = key_of(row)
                least[key] = min(least.get(key, float("inf")), float(row["p50_ms"]))
    return least


def label_of(key: tuple[str, ...]) -> str:
    suite, *rest = key
    named = dict(zip(results.KEY, rest, strict=True))
    parts = [suite, named["case"], named["mode"], named["dtype"], f"D={named['head_dim']}", f"L={named['q_len']}"]
    return " ".join([*parts, "causal"] if named["causal"] == "yes" else parts)


def table(a: str, b: str, rounds: Sequence[tuple[list[results.Row], list[results.Row]]]) -> list[list[str]]:
    """One line per cell, and the geometric mean of the speed of ``b`` relative to ``a``."""
    first, second = (least_medians([pair[side] for pair in rounds]) for side in (0, 1))
    lines, ratios = [["cell", f"{a} ms", f"{b} ms", f"{b} faster by"]], []
    for key in first:
        if key in second:
            ratios.append(first[key] / second[key])
            lines.append([label_of(key), f"{first[key]:.4g}", f"{second[key]:.4g}", f"{ratios[-1]:.3f}x"])
    if ratios:
        lines.append([f"geometric mean of {len(ratios)}", "", "", f"{geometric_mean(ratios):.3f}x"])
    return lines


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--suites", nargs="+", default=["all"])
    parser.add_argument("--match", default="", help="only cells with this in their label")
    parser.add_argument("--minutes", type=float, help="for each run of each commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors, made-up figures")
    args = parser.parse_args(argv)
    arguments = [*args.suites, "--match", args.match]
    arguments += ["--minutes", str(args.minutes)] if args.minutes else []
    arguments += ["--dry-run"] if args.dry_run else []
    rounds = []
    with checkout(args.a, root) as a, checkout(args.b, root) as b, tempfile.TemporaryDirectory() as scratch:
        for index in range(args.rounds):
            order = ((0, a), (1, b)) if index % 2 == 0 else ((1, b), (0, a))
            pair: list[list[results.Row]] = [[], []]
            for side, tree in order:
                pair[side] = run(tree, Path(scratch) / f"{index}-{side}", arguments)
            rounds.append((pair[0], pair[1]))
            print(f"round {index + 1} of {args.rounds}", file=sys.stderr, flush=True)
    print(aligned(table(args.a, args.b, rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
