"""Compiles every kernel with every feature and head dim, on each Triton version, and stores the resources it needs.

Tests read the stored table (`results/resources`), compile a sample of it again, and fail if it was made from other
kernels. Renew it after a change to `kernels/`, with the two more Tritons that `make test` installs. A row stays if the
kernel's intermediate code has not changed:

    make resources                                        # what has changed
    python -m benchmarks.tools.resources --triton 3.9.0   # the same for one version
    python -m benchmarks.tools.resources --stale          # lists what would be compiled
"""

import argparse
import functools
import hashlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import triton

from benchmarks.harness import provenance, resources, results
from benchmarks.harness.provenance import ROOT
from fastattn.kernels import config, launch

from . import compile_report, sass, static_model, tile_search
from .calls import FEATURES
from .compile_report import Case, Result

HEAD_DIMS = (64, 128, 256)
IN_PIECES = {192: ("plain", "narrow_values")}
"""Head dims in two pieces, with fewer features: the time of the tests is short."""


def share(result: Result) -> float:
    """The share that the static model predicts: 0 if a kernel does not compile or fit, or is unknown to the model."""
    predicted = tile_search.predicted(result)
    return round(predicted.share, 3) if predicted else 0.0


def smaller_share(result: Result, memory: Path | None) -> float:
    """The best predicted share with half of the tile."""
    block_m, block_n, warps = result.tile()
    stages, pipelined = re.findall(r" s(\d+)( pipelined)?$", result.config)[0]
    rest = f"{warps},{stages},2,1" if pipelined else f"{warps},{stages}"
    shares = [0.0]
    for m, n in ((block_m // 2, block_n), (block_m, block_n // 2)):
        if min(m, n) >= 16:
            case = Case(result.arch, result.kernel, result.dim, result.feature, f"{m},{n},{rest}")
            shares.append(share(compile_report.compile_case(case, memory)))
    return max(shares)


@functools.cache
def reader() -> str:
    """A digest of the code that reads a compiled kernel."""
    parts = [inspect.getsource(part) for part in (sass, static_model, compile_report.read_nvidia)]
    return hashlib.sha256("\n".join(map(provenance.code, parts)).encode()).hexdigest()


def code_of(case: Case) -> str:
    """A digest of what determines a case's row: its intermediate code, the compiler, the code that reads the result."""
    return hashlib.sha256(f"{compile_report.fingerprint_of(case)} {reader()}".encode()).hexdigest()[:12]


def row_of(case: Case, memory: Path | None = None, stored: results.Row | None = None) -> results.Row:
    """Compile a case and record what it needs, unless ``stored`` is of the same code. If registers spill in the inner
    loop, ``smaller`` is the share that a smaller tile would reach.
    """
    code = code_of(case)
    if stored is not None and stored["code"] == code:
        return stored
    result = compile_report.compile_case(case, memory)
    reached = share(result)
    values = {name: getattr(result, name) for name in results.COMPILED_FIELDS if hasattr(result, name)}
    values |= {"head_dim": case.dim, "dtype": "fp32" if "32" in str(FEATURES[case.feature].dtype) else "bf16"}
    values |= {"share": reached or None, "smaller": smaller_share(result, memory) if reached and result.local else None}
    values |= {"code": code}
    return {name: results.text(value) for name, value in values.items()}


def python_path(version: str) -> str | None:
    """The entry before Python's path to import this Triton; None if it is not installed."""
    if version == triton.__version__:
        return ""
    folder = os.environ.get("FASTATTN_TRITON_" + "_".join(version.split(".")[:2]), "")
    return folder if folder and Path(folder).is_dir() else None


def with_triton(version: str, *arguments: str) -> int:
    """Run this tool with another Triton version first on the path."""
    folder = python_path(version)
    if folder is None:
        sys.exit(f"expected Triton {version} in its folder: `make resources` installs it")
    paths = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.tools.resources", "--here", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}).returncode


def cases(arch: str = resources.ARCH) -> list[Case]:
    """Every row of a table: of other targets than Hopper everything at once, and usual steps over a cache."""
    if arch == resources.ARCH:
        everywhere = tuple(name for name in FEATURES if not FEATURES[name].narrow_values)
        chosen = {**dict.fromkeys(HEAD_DIMS, everywhere), **IN_PIECES}
        found = [
            case
            for dim, names in chosen.items()
            for case in compile_report.all_cases([arch], list(config.KERNELS), [dim], list(names))
        ]
        return sorted(found, key=lambda case: (config.KERNELS.index(case.kernel), case.dim))
    everything = compile_report.all_cases([arch], list(config.KERNELS), [64], ["everything"])
    steps = compile_report.all_cases([arch], ["decode", "combine", "append"], [64, 128], ["plain", "paged", "chunk"])
    return everything + steps


def archs(version: str) -> list[str]:
    """The targets of which there is a table by this Triton."""
    return [arch for arch, of_version in resources.TABLES if of_version == version]


def some(names: list[str]) -> list[Case]:
    """Of all cases those named ``target,kernel,feature,head dim``."""
    every = itertools.chain.from_iterable(map(cases, dict.fromkeys(arch for arch, _ in resources.TABLES)))
    return [case for case in every if ",".join(named(case)) in names]


def key_of(case: Case) -> tuple[str, ...]:
    """The key of its row, see `resources.key`."""
    return case.kernel, case.feature, str(case.dim)


def named(case: Case) -> tuple[str, ...]:
    """The target, and the key of its row there."""
    return case.arch, *key_of(case)


def stale(version: str, chosen: list[Case], folder: Path = resources.HERE) -> list[Case]:
    """The cases whose row is missing or of other code."""
    known = stored(version, chosen, folder)
    return [case for case in chosen if known.get(named(case), {}).get("code") != code_of(case)]


def stored(version: str, chosen: list[Case], folder: Path) -> dict[tuple[str, ...], results.Row]:
    """The rows of the tables that the cases are in, by what they are `named`."""
    targets = {case.arch for case in chosen}
    tables = {arch: results.read(resources.path(arch, version, folder)) for arch in targets}
    return {(arch, *resources.key(row)): row for arch, rows in tables.items() for row in rows}


def renew(chosen: list[Case], folder: Path, jobs: int, memory: Path | None, afresh: bool) -> None:
    """Write the tables of the Triton that is imported."""
    version = triton.__version__
    known = {} if afresh else stored(version, chosen, folder)
    with_stored = [(case, memory, known.get(named(case))) for case in chosen]
    label = f"Triton {version}: "
    rows = compile_report.in_processes(_row_of, with_stored, jobs, label)
    changed = sum(row != known.get(named(case)) for case, row in zip(chosen, rows, strict=True))
    print(f"{label}{changed} of {len(rows)} rows are new or changed", file=sys.stderr)
    for arch in dict.fromkeys(case.arch for case in chosen):
        own = [row for case, row in zip(chosen, rows, strict=True) if case.arch == arch]
        resources.write(arch, version, own, folder)


def _row_of(arguments: tuple[Case, Path | None, results.Row | None]) -> results.Row:
    return row_of(*arguments)


def main() -> None:
    """Command line: without options, renew the whole table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="+", choices=resources.TRITONS, default=list(resources.TRITONS))
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=resources.HERE, help="folder of the table")
    parser.add_argument("--here", action="store_true", help="with the Triton that is first on Python's path")
    parser.add_argument("--memory", type=Path, help="what was compiled once is taken from this folder, and kept there")
    parser.add_argument("--stale", action="store_true", help="compile nothing, list what is out of date")
    parser.add_argument("--afresh", action="store_true", help="compile what the table has already, too")
    parser.add_argument("--only", nargs="+", metavar="TARGET,KERNEL,FEATURE,DIM", help="tables of these alone")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    if args.here:
        every = itertools.chain.from_iterable(map(cases, archs(triton.__version__)))
        chosen = some(args.only) if args.only else list(every)
        if args.stale:
            for case in stale(triton.__version__, chosen, args.output):
                print(triton.__version__, *named(case))
        else:
            renew(chosen, args.output, args.jobs, args.memory, args.afresh)
        return
    words = ["--jobs", str(args.jobs), "--output", str(args.output.resolve())]
    words += [option for option in ("--afresh", "--stale") if getattr(args, option.strip("-"))]
    words += ["--memory", str(args.memory.resolve())] if args.memory else []
    words += ["--only", *args.only] if args.only else []
    sys.exit(max(with_triton(version, *words) for version in args.triton))


if __name__ == "__main__":
    main()
