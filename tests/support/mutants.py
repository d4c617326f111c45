"""What a list of tests notices: small mistakes are made in a module, one at a time, in a copy of the repository.

    python -m tests.support.mutants fastattn/spec/cache.py --count 20 -- tests/operator/test_spec.py -n 2

prints each mistake with the tests that fail of it, and at the end the mistakes that none of them notices and the tests
that noticed something alone. A mistake is another comparison, operation, constant or sign.
"""

import argparse
import ast
import collections
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHERS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}  # fmt: skip
SILENT = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
"""Whose insides are messages, or change nothing but a message."""


def changed(node: ast.AST) -> ast.AST | None:
    """The expression with a mistake in it."""
    other: ast.AST = copy.deepcopy(node)
    if isinstance(other, ast.Compare):
        other.ops = [OTHERS[type(other.ops[0])](), *other.ops[1:]]  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(other, ast.BinOp | ast.BoolOp) and type(other.op) in OTHERS:
        other.op = OTHERS[type(other.op)]()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not | ast.USub):
        return other.operand
    elif isinstance(other, ast.Constant) and isinstance(other.value, bool):
        other.value = not other.value
    elif isinstance(other, ast.Constant) and isinstance(other.value, int | float):
        other.value += 1
    else:
        return None
    return other


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """All that may be changed below ``node``: no messages, annotations or decorators."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, SILENT):
                yield child
                yield from expressions(child)


def mutants(source: str) -> list[tuple[str, str]]:
    """(place and change, the module with it) of each mistake."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, text = [], source.encode()
    for node in expressions(ast.parse(source)):
        if isinstance(node, ast.expr) and (other := changed(node)) is not None and node.end_lineno is not None:
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + (node.end_col_offset or 0)
            new = f"({ast.unparse(other)})"
            what = f"{node.lineno}: {ast.unparse(node)} -> {new[1:-1]}"
            found.append((what, (text[:first] + new.encode() + text[last:]).decode()))
    return found


def failures(tree: Path, tests: list[str], timeout: float) -> set[str]:
    """Which tests fail there, in a fresh process; a name for all of them where it does not end."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "2000", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"(no end)"}
    failed = {*re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", result.stdout, re.M)}
    return failed or ({f"(exit {result.returncode})"} if result.returncode else set())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="a path from the root")
    parser.add_argument("--count", type=int, default=10, help="mistakes, drawn by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", default="1-100000", help="where to make them: 20-60")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds, of one run of the tests")
    parser.add_argument("tests", nargs="+", help="and other arguments of pytest, after --")
    options = parser.parse_args()
    first, last = map(int, options.lines.split("-"))
    source = (ROOT / options.module).read_text()
    chosen = [x for x in mutants(source) if first <= int(x[0].partition(":")[0]) <= last]
    chosen = random.Random(options.seed).sample(chosen, min(options.count, len(chosen)))
    noticed_alone: collections.Counter[str] = collections.Counter()
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".git", ".venv", ".cache", "build", "dist", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
        if failed := failures(tree, options.tests, options.timeout):
            raise SystemExit(f"these fail without a mistake: {sorted(failed)}")
        for what, text in sorted(chosen, key=lambda x: int(x[0].partition(":")[0])):
            (tree / options.module).write_text(text)
            failed = failures(tree, options.tests, options.timeout)
            print(f"{options.module}:{what}\n    {len(failed)} fail", *sorted(failed), sep="\n        ", flush=True)
            if not failed:
                survivors.append(what)
            noticed_alone.update({name.partition("[")[0] for name in failed} if len(failed) == 1 else ())
    print(f"{len(chosen)} mistakes, {len(chosen) - len(survivors)} noticed; not noticed:", *survivors, sep="\n    ")
    print("noticed something alone:", *(f"{name} {n}" for name, n in noticed_alone.items()), sep="\n    ")


if __name__ == "__main__":
    main()
