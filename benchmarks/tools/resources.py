"""Compiles every kernel with every feature and head dim, on each Triton version, and stores what it needs of a GPU.

Tests read the stored table (`results/resources`), compile a sample of it again, and fail where it was made from other
kernels. Renew it after a change to `kernels/`, with the two more Tritons that `make test` installs:

    make resources                                        # all of it
    python -m benchmarks.tools.resources --triton 3.9.0   # what one version made
"""

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import triton

from benchmarks.harness import resources, results
from benchmarks.harness.provenance import ROOT
from fastattn.kernels import config, launch

from . import compile_report, static_model
from .calls import FEATURES
from .compile_report import Case, Result

HEAD_DIMS = {"3.6.0": (64, 128), "3.9.0": (64, 128)}
"""What the table of each Triton version covers. What is missing is compiled by tests/kernels/test_compile_report.py."""
ARCH = "sm_90"
"""Compiled with every feature and every Triton version; the other targets, whose tiles are untuned, for SOME of the
features and with the Triton of `constraints.txt`.
"""
SOME = ("plain", "paged", "chunk", "everything")


def share(result: Result) -> float:
    """What the static model predicts of a kernel: 0 where it does not compile or fit, or the model does not know it."""
    if result.error or result.loop is None or result.kernel not in static_model.PRODUCTS:
        return 0.0
    block_m, block_n, warps = result.tile()
    predicted = static_model.predict(
        result.loop, result.kernel, block_m, block_n, result.dim, warps, result.registers, result.shared
    )
    return round(predicted.share, 3)


def smaller_share(result: Result, memory: Path | None) -> float:
    """The best that is predicted with half of the tile."""
    block_m, block_n, warps = result.tile()
    stages, pipelined = re.findall(r" s(\d+)( pipelined)?$", result.config)[0]
    rest = f"{warps},{stages},2,1" if pipelined else f"{warps},{stages}"
    shares = [0.0]
    for m, n in ((block_m // 2, block_n), (block_m, block_n // 2)):
        if min(m, n) >= 16:
            case = Case(result.arch, result.kernel, result.dim, result.feature, f"{m},{n},{rest}")
            shares.append(share(compile_report.compile_case(case, memory)))
    return max(shares)


def row_of(case: Case, memory: Path | None = None) -> results.Row:
    """Compile a case and write down what it needs. Where registers spill in the inner loop, ``smaller`` is what a
    smaller tile would reach instead of ``share``.
    """
    result = compile_report.compile_case(case, memory)
    reached = share(result)
    values = {name: getattr(result, name) for name in results.COMPILED_FIELDS if hasattr(result, name)}
    values |= {"head_dim": case.dim, "dtype": "fp32" if "32" in str(FEATURES[case.feature].dtype) else "bf16"}
    values |= {"share": reached or None, "smaller": smaller_share(result, memory) if reached and result.local else None}
    return {name: results.text(value) for name, value in values.items()}


def python_path(version: str) -> str | None:
    """What goes before Python's path to import this Triton; None where it is not installed."""
    if version == triton.__version__:
        return ""
    folder = os.environ.get("FASTATTN_TRITON_" + "_".join(version.split(".")[:2]), "")
    return folder if folder and Path(folder).is_dir() else None


def with_triton(version: str, *arguments: str) -> int:
    """Run this tool with another Triton version in front."""
    folder = python_path(version)
    if folder is None:
        sys.exit(f"expected Triton {version} in its folder: `make resources` installs it")
    paths = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.tools.resources", "--here", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}).returncode


def targets(version: str) -> list[str]:
    """For which the kernels are compiled with a Triton version."""
    return list(compile_report.TARGETS) if version == resources.TRITONS[1] else [ARCH]


def cases(arch: str, version: str) -> list[Case]:
    """Every row of a table."""
    features = list(FEATURES if arch == ARCH else SOME)
    return compile_report.all_cases([arch], list(config.KERNELS), list(HEAD_DIMS[version]), features)


def some(arch: str, version: str, names: list[str]) -> list[Case]:
    """Of ``cases`` those named ``kernel,feature,head dim``."""
    return [case for case in cases(arch, version) if f"{case.kernel},{case.feature},{case.dim}" in names]


def main() -> None:
    """Command line: without options, renew the whole table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="+", choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--arch", nargs="+", choices=compile_report.TARGETS, default=list(compile_report.TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=resources.HERE, help="folder of the table")
    parser.add_argument("--here", action="store_true", help="with the Triton that is first on Python's path")
    parser.add_argument("--memory", type=Path, help="what was compiled once is taken from this folder, and kept there")
    parser.add_argument("--only", nargs="+", metavar="KERNEL,FEATURE,DIM", help="a table of these rows alone")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    if args.here:
        version = triton.__version__
        for arch in (arch for arch in args.arch if arch in targets(version)):
            chosen = some(arch, version, args.only) if args.only else cases(arch, version)
            label = f"Triton {version}, {arch}: "
            row = functools.partial(row_of, memory=args.memory)
            rows = compile_report.in_processes(row, chosen, args.jobs, label)
            resources.write(arch, version, rows, args.output)
        return
    words = ["--arch", *args.arch, "--jobs", str(args.jobs), "--output", str(args.output.resolve())]
    words += ["--memory", str(args.memory.resolve())] if args.memory else []
    words += ["--only", *args.only] if args.only else []
    sys.exit(max(with_triton(version, *words) for version in args.triton))


if __name__ == "__main__":
    main()
