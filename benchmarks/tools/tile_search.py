"""Which launch configs would be fastest? `config.search_space`, compiled ahead of time and ranked by the static model.

Shapes (tile, warps, pipelined or not) that starve wgmma are left out. First each of the others is compiled with three
stages, so that a copy has a whole iteration to arrive, or with as many as fit. Then the best few are compiled with one
stage less and one more.

    python -m benchmarks.tools.tile_search --kernel dq --dims 128 --features mask_aligned
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import triton

from benchmarks.harness import provenance, results, tuning
from fastattn.kernels import config, launch
from fastattn.kernels.config import LaunchConfig

from . import calibration, calls, compile_report, static_model
from .compile_report import Case, Result

STAGES = 3
REFINED = 2
"""Shapes that are compiled with other numbers of stages, too."""
WARP_ROWS = 16
"""That each warp needs of a program's own: wgmma multiplies 64 for the four of a warp group."""
LEAST_WALKED = 32
"""Rows of a tile that is walked over. With 16, wgmma waits for its other operand: 20 cycles for 8 of products."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate, what the compiler made of it, and what the model predicts: None for a kernel that it lacks."""

    candidate: LaunchConfig
    result: Result
    prediction: static_model.Prediction | None

    @property
    def share(self) -> float:
        """0 where nothing is predicted, or where the kernel does not compile or fit."""
        return self.prediction.share if self.prediction else 0.0


def predicted(result: Result) -> static_model.Prediction | None:
    """The model for a compiled kernel; None where that failed, or for a kernel that the model lacks."""
    if result.error or result.loop is None or result.kernel not in static_model.PRODUCTS:
        return None
    return static_model.predict(
        result.loop, result.kernel, *result.tile()[:2], result.dim, result.tile()[2], result.registers, result.shared,
        calls.value_dim(result.dim, calls.FEATURES[result.feature]),
    )  # fmt: skip


def shape(candidate: LaunchConfig) -> tuple[int, int, int, bool]:
    return candidate.block_m, candidate.block_n, candidate.num_warps, candidate.pipelined


def worthwhile(kernel: config.Kernel, candidate: LaunchConfig) -> bool:
    """Whether its products can keep the tensor cores busy."""
    own, walked = candidate.block_m, candidate.block_n
    if kernel in ("dkdv", "dk", "dv"):
        own, walked = walked, own
    return own >= WARP_ROWS * candidate.num_warps and walked >= LEAST_WALKED


def first_round(space: list[LaunchConfig]) -> list[LaunchConfig]:
    """One of each shape: with STAGES, or the number nearest to it."""
    nearest: dict[tuple[int, int, int, bool], LaunchConfig] = {}
    for candidate in sorted(space, key=lambda c: abs(c.num_stages - STAGES)):
        nearest.setdefault(shape(candidate), candidate)
    return list(nearest.values())


def second_round(space: list[LaunchConfig], ranked: list[Found]) -> list[LaunchConfig]:
    """The best shapes with a number of stages that is one away from the first."""
    best = {shape(found.candidate): found.candidate.num_stages for found in ranked[:REFINED] if found.share}
    return [c for c in space if abs(c.num_stages - best.get(shape(c), c.num_stages)) == 1]


def compiled(
    kernel: config.Kernel, dim: int, feature: str, chosen: list[LaunchConfig], jobs: int, memory: Path | None
) -> list[Found]:
    """The candidates with what they need, in their order."""
    numbers = (",".join(str(int(value)) for value in dataclasses.astuple(candidate)) for candidate in chosen)
    cases = [Case("sm_90", kernel, dim, feature, override) for override in numbers]
    compiler = functools.partial(compile_report.compile_case, memory=memory)
    made = compile_report.in_processes(compiler, cases, jobs, f"{kernel} {dim} {feature}: ")
    return [Found(candidate, result, predicted(result)) for candidate, result in zip(chosen, made, strict=True)]


def search(kernel: config.Kernel, dim: int, feature: str, jobs: int, memory: Path | None = None) -> list[Found]:
    """The space of one of the model's kernels, best first."""
    space = [c for c in config.search_space(kernel, dim) if worthwhile(kernel, c)]
    ranked = compiled(kernel, dim, feature, first_round(space), jobs, memory)
    ranked.sort(key=lambda found: -found.share)
    ranked += compiled(kernel, dim, feature, second_round(space, ranked), jobs, memory)
    return sorted(ranked, key=lambda found: -found.share)


def line(result: Result, prediction: static_model.Prediction | None, note: str = "") -> str:
    """One candidate: its predicted share, what limits it, and what it needs."""
    head = f"  {result.config or result.override:24}"
    if prediction is None:
        return f"{head}  {result.error or 'no main loop'}"
    return (
        f"{head} {prediction.share:6.3f}  {prediction.bound():12} {result.registers:9} {result.spills:6} "
        f"{result.local:5} {result.shared:7} {prediction.programs:8}  {'serialised  ' * result.serialised}{note}"
    )


def report(kernel: config.Kernel, dim: int, feature: str, found: list[Found], shipped: Result, most: int) -> str:
    """The best candidates beside the shipped one, as text."""
    columns = f"{'share':>6}  {'bound':12} {'registers':>9} {'spills':>6} {'local':>5} {'shared':>7} {'programs':>8}"
    lines = [f"{kernel}, head dim {dim}, {feature}: {len(found)} candidates", f"  {'':24} {columns}"]
    present = predicted(shipped)
    lines += [line(f.result, f.prediction, "shipped" * (f.result.config == shipped.config)) for f in found[:most]]
    if shipped.config not in [f.result.config for f in found[:most]]:
        lines.append(line(shipped, present, "shipped"))
    if present and found:
        lines.append(f"  best {found[0].share / present.share - 1:+.0%} beside the shipped")
    return "\n".join(lines)


def fact(found: Found) -> results.Row:
    """What a search on a GPU reads: see `tuning.candidates`."""
    r = found.result
    key = dict(zip(results.CANDIDATES_KEY, tuning.fact_key(r.kernel, r.dim, found.candidate), strict=True))
    return key | {
        "registers": str(r.registers), "spills": str(r.spills), "local": str(r.local), "error": r.error,
        "instructions": str(r.instructions), "shared": str(r.shared), "serialised": results.text(r.serialised),
        "share": f"{found.share:.3f}" if found.share else "", "triton": triton.__version__,
        "digest": provenance.code_digest(without=tuning.UNRELATED),
    }  # fmt: skip


def main() -> None:
    """Command line: search, and print the best beside the shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=static_model.PRODUCTS, default=list(static_model.PRODUCTS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(compile_report.DIMS))
    parser.add_argument("--features", nargs="+", choices=calls.FEATURES, default=["causal"])
    parser.add_argument("--most", type=int, default=6, help="how many of the best are printed (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time (default: %(default)s)")
    parser.add_argument("--memory", type=Path, help="what was compiled once is taken from this folder, and kept there")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    print(f"Triton {triton.__version__}. A filter for gaps above 15 %. {calibration.error()}")
    for case in compile_report.all_cases(["sm_90"], args.kernel, args.dims, args.features):
        shipped = compile_report.compile_case(case, args.memory)
        found = search(case.kernel, case.dim, case.feature, args.jobs, args.memory)
        print(report(case.kernel, case.dim, case.feature, found, shipped, args.most))


if __name__ == "__main__":
    main()
