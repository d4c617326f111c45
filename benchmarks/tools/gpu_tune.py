"""Search launch configurations on this GPU for `kernels/config.py`, and print each with its figure.

    python -m benchmarks.tools.gpu_tune --minutes 8                 on a GPU: measure, print the table
    python -m benchmarks.tools.gpu_tune --resources sm_90           without one: what is known of candidates
    python -m benchmarks.tools.gpu_tune --table FOLDER/tune.csv     print the table of an earlier run

The space is `config.search_space` and what is near the present choice. Candidates that are known to spill in their loop
or predicted to be far below the best are left out where the resource facts are of these kernels, and come last where
they are of older ones; where nothing is known, few are tried. The most promising come first: the present choice, then
those whose products are not serialised, those near the present choice, large tiles before small ones. The best few of
each group are measured again against each other and held to the parity rule. Nothing is written to
`kernels/config.py`: its tables are per head dim, so the compromise between causal and not is its reader's.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastattn
from benchmarks.harness import parity, resources, results, runner, tuning
from benchmarks.harness.device import Call, Compiling, Device, DryRun, choose
from benchmarks.harness.peers import first_line
from benchmarks.harness.problems import Problem, fit, make_inputs
from benchmarks.harness.provenance import provenance
from benchmarks.harness.tuning import (
    STEPS,
    Group,
    candidates,
    config_of,
    groups,
    load_facts,
    table,
)
from benchmarks.suites import decode
from fastattn.functional import Backend
from fastattn.kernels import config
from fastattn.kernels.config import LaunchConfig

FINALISTS = 3
CHUNK = 6
"""Candidates that take turns with one another and with the present choice."""


def architecture(device: Device) -> str:
    if device.torch_device != "cuda":
        return "sm_90"
    from fastattn.kernels import launch

    return launch.architecture(torch.device("cuda"))


@contextlib.contextmanager
def only(kernel: config.Kernel, candidate: LaunchConfig) -> Iterator[None]:
    """Launch one kernel with the candidate and the others as configured."""
    usual = config.lookup

    def lookup(name: config.Kernel, *arguments: Any, **options: Any) -> LaunchConfig:
        return candidate if name == kernel else usual(name, *arguments, **options)

    with mock.patch.object(config, "lookup", lookup):
        yield


def decode_steps(group: Group, device: Device, backend: Backend | None, short: bool) -> Callable[[], None]:
    """One step of each of STEPS, or two short ones."""
    runs = []
    for batch, length in STEPS:
        step = decode.Step(batch, 32, 8, length, 0, group.head_dim, group.dtype)
        if short:
            step = dataclasses.replace(step, batch=min(batch, 2), length=512)
        if isinstance(device, DryRun):
            step = decode.Step(2, 4, 2, 64, 0, 16, "fp32")
        x = decode.make_inputs(step, device.torch_device)
        runs.append(
            functools.partial(
                fastattn.attention_with_kvcache, x.q, x.k_cache, x.v_cache, cache_lens=x.lens, backend=backend
            )
        )

    def run() -> None:
        for step in runs:
            step()

    return run


def runnable(group: Group, device: Device, short: bool = False) -> Callable[[], None]:
    """One pass of the group's direction, on the Triton backend where it can run; ``short``: on little data."""
    triton = device.torch_device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    backend = "triton" if triton else None
    if group.kernel == "decode":
        return decode_steps(group, device, backend, short)
    problem = Problem(1, 2, 2, 256, group.head_dim, group.dtype, group.causal) if short else group.problem()
    problem = fit(problem, device)
    x = make_inputs(problem, device, 0, grad=group.mode == "backward")
    if group.mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                fastattn.attention(x.q, x.k, x.v, causal=group.causal, q_offset=0, backend=backend)

        return forward

    out = fastattn.attention(x.q, x.k, x.v, causal=group.causal, q_offset=0, backend=backend)

    def backward() -> None:
        torch.autograd.grad(out, x.leaves, x.dout, retain_graph=True)

    return backward


@dataclass
class Tuner:
    device: Device
    output: Path
    deadline: float
    seconds: float
    stamp: dict[str, str]

    @property
    def left(self) -> float:
        return self.deadline - self.device.clock()

    def record(
        self, group: Group, candidate: LaunchConfig, stage: str, times: tuple[float, float, float] | None = None,
        note: str = "",
    ) -> None:  # fmt: skip
        row = group.key(candidate) | {"stage": stage, "note": note} | self.stamp
        if times:
            row |= {name: results.text(ms) for name, ms in zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)}
            row["tflops"] = results.text(group.flops() / times[1] * 1e-9)
        results.upsert(self.output / self.device.folder / "tune.csv", [row])

    def shortlist(self, group: Group, pool: Sequence[LaunchConfig]) -> Sequence[LaunchConfig]:
        """For float16 the present choice and the best few of the same search in bfloat16, where there was one."""
        twin = Group(group.kernel, "bf16", group.head_dim, group.causal).key(pool[0])
        same = ("kernel", "dtype", "head_dim", "causal")
        rows = [
            row for row in results.read(self.output / self.device.folder / "tune.csv")
            if row["p50_ms"] and all(row[name] == twin[name] for name in same)
        ]  # fmt: skip
        if group.dtype == "bf16" or not rows:
            return pool
        best = sorted(rows, key=lambda row: float(row["p50_ms"]))[:CHUNK]
        return [pool[0], *(c for c in map(config_of, best) if c != pool[0])]

    def search(self, group: Group, pool: Sequence[LaunchConfig]) -> None:
        """Measure the pool in chunks, then the best again, and mark the winner."""
        run = runnable(group, self.device)
        present = pool[0]
        medians: dict[LaunchConfig, float] = {}
        for start in range(1, max(2, len(pool)), CHUNK):
            if self.left <= 0:
                return
            medians |= self.measure(group, [present, *pool[start : start + CHUNK]], run, "search")
        finalists = sorted(medians, key=medians.__getitem__)[:FINALISTS]
        if present in medians and present not in finalists:
            finalists.append(present)
        finals = self.measure(group, finalists, run, "final", 4 * self.seconds)
        for candidate in sorted(finals, key=finals.__getitem__):
            error = self.parity_error(group, candidate)
            if error is None:
                self.mark(group, candidate, "winner", "parity green")
                return
            self.mark(group, candidate, "wrong", error)

    def mark(self, group: Group, candidate: LaunchConfig, stage: str, note: str) -> None:
        path = self.output / self.device.folder / "tune.csv"
        key = group.key(candidate)
        rows = [row for row in results.read(path) if all(row[name] == value for name, value in key.items())]
        results.upsert(path, [row | {"stage": stage, "note": note} for row in rows])

    def measure(
        self, group: Group, pool: Sequence[LaunchConfig], run: Callable[[], None], stage: str,
        seconds: float | None = None,
    ) -> dict[LaunchConfig, float]:  # fmt: skip
        """Medians of those that run; a row for each."""
        calls: dict[str, Call] = {}
        for candidate in pool:
            call = self.call_of(group, candidate, run)
            try:
                call(0)
                calls[repr(candidate)] = call
            except Exception as error:  # does not compile, or asks for more than the GPU has
                runner.raise_if_lost(error)
                self.record(group, candidate, stage, note=f"cannot: {first_line(error)}")
        timings = self.device.time(calls, seconds or self.seconds)
        medians = {}
        for candidate in pool:
            if timing := timings.get(repr(candidate)):
                medians[candidate] = timing.p50
                self.record(group, candidate, stage, (timing.p20, timing.p50, timing.p80))
        return medians

    def call_of(self, group: Group, candidate: LaunchConfig, run: Callable[[], None]) -> Call:
        def call(repeat: int) -> None:
            with only(group.kernel, candidate):
                run()

        return call

    def parity_error(self, group: Group, candidate: LaunchConfig) -> str | None:
        feature = "cache" if group.kernel == "decode" else "causal" if group.causal else "plain"
        case = parity.ParityCase(feature, group.dtype, group.head_dim)
        with only(group.kernel, candidate):
            return next((parity.describe(error) for _, error in parity.failures(self.device, [case])), None)


# Resource facts, without a GPU


def write_resources(jobs: int, path: Path, match: str, memory: Path | None) -> None:
    """What the static model finds of each of its kernels and each head dim, as a file that the search reads."""
    from . import static_model, tile_search

    wanted = [g for g in groups() if g.dtype == "bf16" and g.kernel in static_model.PRODUCTS and match in str(g)]
    searches: dict[tuple[config.Kernel, int], None] = dict.fromkeys((g.kernel, g.head_dim) for g in wanted)
    for kernel, head_dim in searches:
        found = tile_search.search(kernel, head_dim, "causal", jobs, memory)
        kept = [row for row in results.read(path) if (row["kernel"], row["head_dim"]) != (kernel, str(head_dim))]
        whole = path.with_name(f"{path.stem}-part.csv")
        whole.unlink(missing_ok=True)
        results.upsert(whole, kept + list(map(tile_search.fact, found)))
        whole.replace(path)
    print(path)


def compile_share(spec: str, match: str) -> None:
    """Be one of the processes that compile candidates, by launching them once on little data."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    arch = architecture(device)
    facts = load_facts(arch)
    tasks = [
        (group, candidate) for group in groups() if match in str(group) for candidate in candidates(group, arch, facts)
    ]
    for index in runner.share(spec, tasks):
        group, candidate = tasks[index]
        with contextlib.suppress(Exception), only(group.kernel, candidate):
            runnable(group, device, short=True)()
        device.free()


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=0.03, help="for which each candidate is repeated at first")
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--match", default="", help="only searches with this in their name, as 'forward bf16 D=128'")
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--dry-run", action="store_true", help="few candidates, made-up figures: tests every path")
    parser.add_argument("--list", action="store_true", help="print the searches and how many candidates each has")
    parser.add_argument(
        "--resources", metavar="ARCH", choices=["sm_90"], help="compile candidates for ARCH instead, without a GPU"
    )
    parser.add_argument("--memory", type=Path, help="with --resources: what was compiled once is kept in this folder")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the table of an earlier run instead")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        print(table(results.read(args.table)))
        return 0
    if args.resources:
        path = tuning.facts_path(args.resources, Path(args.output) if args.output else resources.HERE)
        write_resources(args.compile_jobs or 1, path, args.match, args.memory)
        return 0
    if args.compile_share:
        compile_share(args.compile_share, args.match)
        return 0
    device = device or choose(args.dry_run)
    arch = architecture(device)
    facts = load_facts(arch)
    chosen = [(group, candidates(group, arch, facts)) for group in groups() if args.match in str(group)]
    if args.list:
        for group, pool in chosen:
            print(f"{group}: {len(pool)} candidates")
        return 0
    if isinstance(device, DryRun):
        chosen = [(group, pool[:3]) for group, pool in chosen if group.dtype == "bf16" and group.head_dim == 64]
    elif device.torch_device != "cuda":
        print("needs a CUDA device; --dry-run tests the paths without one")
        return 2
    stamp = provenance(device)
    if runner.refuse_unknown(device, stamp):
        return 2
    deadline = device.clock() + args.minutes * 60 - runner.RESERVE
    dead: list[str] = []
    if device.torch_device == "cuda":
        faulthandler.dump_traceback_later(args.minutes * 60 + 60, exit=True)
        jobs = (os.cpu_count() or 1) * 3 // 4 if args.compile_jobs is None else args.compile_jobs
        if jobs:
            words = ["benchmarks.tools.gpu_tune", "--match", args.match]
            print(f"compiled ahead in {runner.run_shares(words, jobs, args.minutes * 60 * 0.4, dead.append):.0f} s")
    tuner = Tuner(device, runner.output(args, device), deadline, args.seconds, stamp)
    progress = runner.Progress(len(chosen), device.clock, deadline)
    for group, pool in chosen:
        if tuner.left <= 0:
            break
        progress.show(str(group))
        tuner.search(group, tuner.shortlist(group, pool))
        progress.done += 1
        device.free()
    progress.close()
    faulthandler.cancel_dump_traceback_later()
    path = tuner.output / device.folder / "tune.csv"
    results.archive(path.parent)
    print(f"{progress.done} of {len(chosen)} searches\n{table(results.read(path))}\nrows in {path}", *dead, sep="\n")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
