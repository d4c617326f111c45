"""Runs cells of suites within a time budget: parity first, the most important cells first, rows stored as they come."""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import gate, parity, peers, results, summary
from .device import Call, Compiling, Device, DryRun, Timing, choose
from .flops import matmul_flops
from .parity import ParityCase
from .problems import DTYPES
from .provenance import ROOT, conditions, provenance, without_kernels

SUITES = (
    "forward", "backward", "features", "decode", "layers", "generation", "huggingface", "overhead", "launch", "memory",
    "cpu", "scaling",
)  # fmt: skip
RESERVE = 10.0
"""Seconds kept at the end of a budget for the last cell and the table."""


@dataclass(frozen=True)
class Cell:
    """One thing to measure. Lower priority numbers come first."""

    suite: str
    label: str
    run: Callable[["Bench"], None]
    priority: int = 0
    compiles: object = None
    """Cells of equal value share compiled code; None compiles nothing."""
    rests_on: tuple[ParityCase, ...] | None = None
    """The parity cases that its figures depend on; None means those of layers and models, `gate.BASIC`."""


class Fatal(Exception):
    """The device no longer answers, so later measurements would mean nothing."""


LOST = ("illegal memory access", "misaligned address", "device-side assert", "launch failure", "illegal instruction")


def is_lost(error: BaseException) -> bool:
    """Errors after which every later call on the device fails too."""
    return isinstance(error, Fatal) or any(text in str(error) for text in LOST)


def raise_if_lost(error: BaseException) -> None:
    """End the run if it can no longer measure."""
    if isinstance(error, Fatal):
        raise error
    if is_lost(error):
        raise Fatal(peers.first_line(error)) from error


@dataclass
class Bench:
    """What a running cell sees."""

    device: Device
    output: Path
    seconds: float = 0.1
    """Seconds for each timed call."""
    only: tuple[str, ...] = ()
    """If any are given, measure only these providers."""
    record_rows: bool = True
    note: str = ""
    """Added to every row."""
    stamp: dict[str, str] = field(default_factory=dict)
    matmul_tflops: dict[str, float] = field(default_factory=dict)
    rows: list[results.Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def providers(self, names: Iterable[str]) -> list[str]:
        """The peers that this run measures on this machine."""
        chosen = []
        for name in names:
            if reason := peers.PEERS[name].missing(self.device.torch_device):
                self.skipped[name] = reason
            elif self.wants(name, peers.PEERS[name].compiles):
                chosen.append(name)
        return chosen

    def wants(self, provider: str, compiles: bool = True) -> bool:
        if isinstance(self.device, Compiling) and not compiles:
            return False
        return not self.only or provider in self.only

    def time(self, calls: dict[str, Call], seconds: float | None = None) -> dict[str, Timing]:
        return self.device.time(calls, self.seconds if seconds is None else seconds)

    def record(
        self, suite: str, key: Mapping[str, object], timing: Timing | None = None, *, flops: float = 0.0,
        tokens: float = 0.0, peak_mib: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Store one row at once."""
        row = dict(key) | {"peak_mib": peak_mib, "note": "; ".join(filter(None, (note, self.note)))}
        if timing is not None:
            row |= {f"{name}_ms": getattr(timing, name) for name in ("p20", "p50", "p80", "min")}
            row["repeats"] = timing.repeats
            if flops:
                tflops = flops / timing.p50 * 1e-9
                row["tflops"] = tflops
                if peak := self.matmul_tflops.get(str(key.get("dtype"))):
                    row["of_matmul"] = tflops / peak
            if tokens:
                row["tokens_per_s"] = tokens / timing.p50 * 1e3
        stored = dict.fromkeys(results.FIELDS, "") | {name: results.text(value) for name, value in row.items()}
        stored |= self.stamp
        self.rows.append(stored | {"suite": suite})
        if self.record_rows:
            results.upsert(self.output / self.device.folder / f"{suite}.csv", [stored])

    def refused(self, suite: str, key: Mapping[str, object], error: BaseException) -> None:
        """Store why there is no figure; end the run if the device is lost."""
        raise_if_lost(error)
        out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        reason = "out of memory" if out_of_memory else peers.first_line(error)
        self.record(suite, key, note=f"cannot: {reason}")
        self.device.free()

    def measure_matmul(self, suite: str, when: str = "") -> None:
        """Measure the rate of matrix products here, the upper limit of other rates. ``when``: if not at the start."""
        on_gpu = self.device.torch_device == "cuda"
        size = 8192 if on_gpu else 32 if isinstance(self.device, DryRun) else 1024
        for dtype in ("bf16", "fp16") if on_gpu or isinstance(self.device, DryRun) else ("fp32",):
            options = {"device": self.device.torch_device, "dtype": DTYPES[dtype]}
            a, b = (torch.randn(size, size, **options) for _ in "ab")
            timing = self.time({"matmul": lambda _, a=a, b=b: a @ b})["matmul"]
            flops = matmul_flops(size, size, size)
            if not when:
                self.matmul_tflops[dtype] = flops / timing.p50 * 1e-9
            key = {"case": f"matmul {size}{when}", "mode": "forward", "provider": "torch", "dtype": dtype}
            self.record(suite, key, timing, flops=flops, note=conditions() if on_gpu else "")

    def measure_copy(self, suite: str, when: str = "") -> None:
        """Measure the rate of a copy on a GPU, the upper limit of all that memory bounds."""
        if self.device.torch_device == "cuda" and self.device.free_memory() > 4 << 30:
            source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
            target = torch.empty_like(source)
            timing = self.time({"copy": lambda _: target.copy_(source)})["copy"]
            key = {"case": f"copy 1 GiB{when}", "mode": "copy", "provider": "torch", "mbytes": 2.0 * 2**30 * 1e-6}
            self.record(suite, key, timing, note=conditions())


class Progress:
    """A progress bar on a terminal, else an occasional line."""

    def __init__(self, total: int, clock: Callable[[], float], deadline: float) -> None:
        self.total, self.clock, self.deadline = total, clock, deadline
        self.done, self.last_line = 0, -1e9

    def show(self, label: str) -> None:
        left = "" if self.deadline == float("inf") else f"{max(0, int(self.deadline - self.clock()))} s left, "
        text = f"{self.done}/{self.total}, {left}{label}"
        if sys.stderr.isatty():
            filled = 30 * self.done // max(1, self.total)
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text:60.60}", end="", file=sys.stderr, flush=True)
        elif self.clock() - self.last_line >= 30.0:
            self.last_line = self.clock()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def cells_of(suites: Sequence[str], device: Device) -> list[Cell]:
    """All cells that the device can run, most important first, suites in the order given."""
    cells = []
    for name in suites:
        module = importlib.import_module(f"benchmarks.suites.{name}")
        if device.torch_device in module.DEVICES or isinstance(device, DryRun):
            cells += module.cells()
    return interleaved(cells)


def interleaved(cells: Sequence[Cell]) -> list[Cell]:
    """Most important first, and among equals one of each suite in turn, so that no suite waits for all of another."""
    met: dict[tuple[int, str], int] = {}
    order = []
    for number, cell in enumerate(cells):
        turn = met[cell.priority, cell.suite] = met.get((cell.priority, cell.suite), 0) + 1
        order.append((cell.priority, turn, number))
    return [cells[number] for *_, number in sorted(order)]


def refuse_unknown(device: Device, stamp: dict[str, str]) -> bool:
    """Whether the code of figures on a GPU would be unknown; if so, print what to do."""
    if device.torch_device != "cuda" or stamp["commit"] != "unknown":
        return False
    print("the commit is unknown, and nothing repairs that afterwards: export FASTATTN_COMMIT=$(git describe --always "
          "--dirty --abbrev=12) in the command that runs this")  # fmt: skip
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"all, or some of: {', '.join(SUITES)}")
    parser.add_argument("--minutes", type=float, help="start no cell after this time, everything counted in")
    parser.add_argument("--seconds", type=float, default=0.1, help="for which each call is repeated")
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--match", default="", help="only cells with this in their label")
    parser.add_argument("--providers", nargs="+", default=(), help="only these")
    parser.add_argument("--note", default="", help="added to every row: conditions that the other columns do not show")
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--list", action="store_true", help="print the cells in their order and stop")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors, made-up figures: tests every path")
    parser.add_argument("--ignore-gate", action="store_true", help="measure cells that red parity blocks; rows say so")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)  # I/N: be the I-th of N compiling processes
    args = parser.parse_args(argv)
    args.suites = list(SUITES) if args.suites in ([], ["all"]) else args.suites
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"expected suites among {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    """Run suites; return 0, or 1 if parity fails or the device is lost, or 2 if figures would be useless."""
    started = time.monotonic()
    args = parse(argv)
    device = device or choose(args.dry_run)
    cells = [cell for cell in cells_of(args.suites, device) if args.match in cell.label]
    if args.list:
        for cell in cells:
            print(f"{cell.priority} {cell.suite:9} {cell.label}")
        return 0
    if args.compile_share:
        compile_share(args, cells)
        return 0
    if not cells:
        print(f"nothing to measure on {device.torch_device!r}; --dry-run tests the paths without a GPU")
        return 0
    spent = time.monotonic() - started if device.torch_device == "cuda" else 0.0
    deadline = device.clock() + args.minutes * 60 - RESERVE - spent if args.minutes else float("inf")
    if device.torch_device == "cuda" and args.minutes:  # a kernel that hangs must not hold the machine
        faulthandler.dump_traceback_later(args.minutes * 60 + 60, exit=True)
    bench = Bench(
        device, output(args, device), args.seconds, tuple(args.providers), note=args.note, stamp=provenance(device)
    )
    print(", ".join(f"{name} {value}" for name, value in bench.stamp.items()))
    if refuse_unknown(device, bench.stamp):
        return 2
    if type(device) is Device and (missing := without_kernels({cell.suite for cell in cells})):
        print(missing)
        return 2
    dead: list[str] = []
    compile_ahead(args, device, deadline, dead.append)
    red = gate.red_cases(device, parity.gate(device), is_lost)
    if lost := next((error for error in red.values() if is_lost(error)), None):
        print(f"stopped: {peers.first_line(lost)}")
        return 1
    if red:
        bench.note = "; ".join(filter(None, (bench.note, f"parity red: {', '.join(sorted({c.feature for c in red}))}")))
        kept = [cell for cell in cells if args.ignore_gate or not gate.blocking(cell.rests_on, red)]
        print(f"{len(cells) - len(kept)} of {len(cells)} cells rest on what is red and are not measured")
        cells = kept
    gc.collect()
    gc.freeze()  # imported objects stay: garbage collections between cells skip them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA explains every refusal; the rows say "cannot"
            run_cells(bench, cells, deadline)
    except Fatal as error:
        print(f"stopped: {error}")
        return 1
    finally:
        gc.unfreeze()
        faulthandler.cancel_dump_traceback_later()
        for name, reason in bench.skipped.items():
            print(f"{name} skipped: {reason}")
        print(summary.short(bench.rows))
        folder = bench.output / device.folder
        archived = device.torch_device == "cuda" or isinstance(device, DryRun)
        print(f"rows in {results.archive(folder) if archived else folder}")
        print(*dead, sep="\n", end="\n" * bool(dead))
    return 1 if red or dead else 0


def output(args: argparse.Namespace, device: Device) -> Path:
    """Invented figures never go into the folder of real ones."""
    if isinstance(device, DryRun) and not args.output and not os.environ.get("OUT"):
        return ROOT / ".cache" / "dry-run"
    return results.output_folder(args.output)


def run_cells(
    bench: Bench, cells: list[Cell], deadline: float, after: Callable[[Cell], None] = lambda cell: None
) -> None:
    """Run the cells that the budget allows, between two measurements of the limits; call ``after`` after each."""
    if not cells:
        return
    progress = Progress(len(cells), bench.device.clock, deadline)
    bench.measure_matmul(cells[0].suite)
    bench.measure_copy(cells[0].suite)
    for cell in cells:
        if bench.device.clock() >= deadline:
            break
        progress.show(f"{cell.suite} {cell.label}")
        try:
            cell.run(bench)
        except Exception as error:  # one cell that fails must not cost the others
            raise_if_lost(error)
            print(f"\n{cell.suite} {cell.label}: {type(error).__name__}: {peers.first_line(error)}")
        progress.done += 1
        after(cell)
        bench.device.free()
        bench.device.pause()
    progress.close()
    if bench.device.torch_device == "cuda":
        bench.measure_matmul(cells[0].suite, ", at the end")
        bench.measure_copy(cells[0].suite, ", at the end")
    print(f"{progress.done} of {len(cells)} cells measured")


# Compiling ahead, in parallel


def compile_ahead(
    args: argparse.Namespace, device: Device, deadline: float, report: Callable[[str], None]
) -> None:  # fmt: skip
    """Fill the compilers' caches with several processes, at most for a third of the budget."""
    jobs = args.compile_jobs
    if jobs is None:
        jobs = (os.cpu_count() or 1) * 3 // 4 if device.torch_device == "cuda" else 0
    if jobs <= 0:
        return
    limit = min(600.0, (deadline - device.clock()) / 3)
    arguments = ["benchmarks", *args.suites, "--match", args.match]
    arguments += ["--providers", *args.providers] if args.providers else []
    seconds = run_shares(arguments, jobs, limit, report)
    print(f"compiled ahead in {seconds:.0f} s")


def run_shares(
    arguments: list[str], jobs: int, limit: float, report: Callable[[str], None] = print
) -> float:  # fmt: skip
    """Run ``python -m ARGUMENTS --compile-share I/N`` N times at once; kills what is left after ``limit`` seconds.

    Reports how many failed by themselves, and the last words of one: what they were to compile costs time later.
    """
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(jobs)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *arguments, "--compile-share", f"{i}/{jobs}"],
                cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log,
            )
            for i, log in enumerate(logs)
        ]  # fmt: skip
        failed = []
        for process, log in zip(running, logs, strict=True):
            try:
                if process.wait(max(0.0, started + limit - time.monotonic())):
                    log.seek(0)
                    failed.append((log.read().strip().splitlines() or ["no word"])[-1])
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if failed:
            report(f"{len(failed)} of {jobs} compiling processes failed: {failed[0][:200]}")
    return time.monotonic() - started


def share(spec: str, items: Sequence[object]) -> list[int]:
    """The indices of the I-th of N parts: every N-th index, so that important ones come first in each."""
    part, _, parts = spec.partition("/")
    return list(range(int(part), len(items), int(parts)))


def compile_share(args: argparse.Namespace, cells: list[Cell]) -> None:
    """Be one of the compiling processes: run its part of the gate and of the cells that compile, once each."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    bench = Bench(device, Path(), only=tuple(args.providers), record_rows=False)
    tasks: list[Callable[[], None]] = [lambda case=case: case.run(device) for case in parity.gate(device)]
    seen: set[object] = {None}
    for cell in cells:
        if cell.compiles not in seen:
            seen.add(cell.compiles)
            tasks.append(lambda cell=cell: cell.run(bench))
    for index in share(args.compile_share, tasks):
        with contextlib.suppress(Exception):  # shown when the same case is measured
            tasks[index]()
        device.free()
