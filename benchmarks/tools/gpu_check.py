"""Is it right on this GPU? Parity of every feature, tensors of more than 2^31 elements, bit-equal repeats, the
sanitizer, the device tests; as data.

    python -m benchmarks.tools.gpu_check --minutes 8

What tells most comes first. Writes <output>/<gpu>/parity.csv as it goes, from which `benchmarks.tools.status` makes
docs/status.md, and ends by naming what the time did not suffice for. Exit code 1 if anything failed.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn
from benchmarks.harness import parity, results, runner
from benchmarks.harness.device import Compiling, Device, DryRun, choose
from benchmarks.harness.problems import DTYPES
from benchmarks.harness.provenance import ROOT, provenance

STEPS = ("parity", "large", "repeats", "sanitizer", "tests")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
REPEATED = ("causal", "everything at once", "packed sequences", "block mask", "cache", "cache, pages of 16")
"""Features that between them launch every kernel in every way."""
# (Lq, Lk): one tile, tails, more keys than queries and fewer, several tiles.
REPEAT_SHAPES = ((1, 239), (239, 1), (3, 799), (127, 513), (128, 128), (257, 257), (1024, 1023), (2048, 2048))
# (Lq, capacity) of a cache
REPEAT_STEPS = ((1, 256), (4, 1024), (17, 2048), (1, 16384))
REPEATS = {"race": 250, "determinism": 50}
SECONDS_PER_KERNEL = 2.0
"""To compile one, roughly: for the forecast alone."""


@dataclass
class Checks:
    """Where outcomes go."""

    device: Device
    output: Path
    deadline: float
    stamp: dict[str, str]
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    lost: bool = False
    """Whether the device answers no more."""

    @property
    def left(self) -> float:
        """Seconds; none on a device that is lost."""
        return 0.0 if self.lost else self.deadline - self.device.clock()

    def see(self, error: BaseException) -> None:
        """Remember if an error leaves the device unusable."""
        self.lost = self.lost or runner.is_lost(error)

    def skip(self, check: str, what: str) -> str:
        """Count what is left out; the reason."""
        reason = "the device is lost" if self.lost else "the time budget is spent"
        self.tally[check, "not run"] += 1
        self.not_run.append(f"{check}: {what}")
        return reason

    def record(
        self, check: str, outcome: str, *, kernel: str = "", feature: str = "", dtype: str = "", head_dim: object = "",
        seconds: float = 0.0, note: str = "",
    ) -> None:  # fmt: skip
        """Store one outcome at once: "passed", "failed", "error", "not reached" or "not run"."""
        row = {
            "check": check, "kernel": kernel, "feature": feature, "dtype": dtype, "head_dim": str(head_dim),
            "outcome": outcome, "seconds": f"{seconds:.3g}", "note": note, **self.stamp,
        }  # fmt: skip
        results.upsert(self.output / self.device.folder / "parity.csv", [row])

    def count(self, check: str, outcome: str, problem: str = "") -> None:
        self.tally[check, outcome] += 1
        if problem:
            self.problems.append(f"{check}: {problem}")


# Parity of every feature


def check_parity(checks: Checks) -> None:
    """The matrix of `benchmarks.harness.parity`, one row per kernel of each case."""
    for case in parity.matrix():
        if checks.left <= 0:
            checks.skip("parity", str(case))
            continue
        started = time.monotonic()
        error = next((error for _, error in parity.failures(checks.device, [case])), None)
        reason = None if error is None else parity.describe(error)
        for kernel, outcome in parity.outcomes(case.feature, reason).items():
            checks.record(
                "parity", outcome, kernel=kernel, feature=case.feature, dtype=case.dtype, head_dim=case.head_dim,
                seconds=time.monotonic() - started, note=reason or "",
            )  # fmt: skip
        checks.count("parity", "failed" if error else "passed", f"{case}: {reason}" if error else "")
        if error is not None:
            checks.see(error)


# More elements than 32 bits count


def dense_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """q, k, v, out and every gradient: the last batch entry against the same alone."""
    heads, length, dim = 16, 256 if elements > 1 << 20 else 16, 128
    batch = elements // (heads * length * dim) + 2
    q, k, v, dout = (random(device, dtype, batch, heads, length, dim) for _ in range(4))
    return equal_alone(lambda *qkv: fastattn.attention(*qkv, causal=True), (q, k, v), dout, lambda x: x[-1:])


def packed_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """The same for packed sequences: the last one against itself alone."""
    heads, length, dim = 16, 256 if elements > 1 << 20 else 16, 128
    sequences = elements // (heads * length * dim) + 2
    q, k, v, dout = (random(device, dtype, sequences * length, heads, dim) for _ in range(4))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = torch.arange(0, q.shape[0] + 1, length, dtype=torch.int32, device=q.device)
        return fastattn.attention_varlen(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=True)

    return equal_alone(attend, (q, k, v), dout, lambda x: x[-length:])


def mask_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """A mask with a row per query: the last two tiles of queries against the same alone."""
    length = (math.isqrt(elements) // 128 + 1) * 128
    q, k, v = (random(device, dtype, 1, 1, length, 64) for _ in range(3))
    mask = torch.rand(length, device=device.torch_device) < 0.5
    mask = mask[:, None] ^ (torch.arange(length, device=device.torch_device) % 3 == 0)
    with torch.no_grad():
        whole = fastattn.attention(q, k, v, mask=mask)
        return same(whole[:, :, -256:], fastattn.attention(q[:, :, -256:], k, v, mask=mask[-256:]))


def cache_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """Two batch entries, contiguous and then on pages: the second against itself alone, and what is appended to it."""
    kv_heads, dim, page = 8, 128, 64
    length = (elements // (2 * kv_heads * dim) // page + 1) * page
    caches = [random(device, dtype, 2, length, kv_heads, dim) for _ in "kv"]
    q = random(device, dtype, 2, 32, 1, dim)
    new = [random(device, dtype, 2, kv_heads, 1, dim) for _ in "kv"]
    lens = torch.tensor([5, length - 1], dtype=torch.int32, device=device.torch_device)
    table = torch.arange(2 * length // page, dtype=torch.int32, device=device.torch_device).view(2, -1)
    pages = [cache.view(-1, page, kv_heads, dim) for cache in caches]
    alone = {"cache_lens": lens[1:], "num_splits": 16}
    for given, last, tables in (
        (caches, [cache[1:].clone() for cache in caches], (None, None)),
        (pages, [half.view(-1, page, kv_heads, dim) for half in (cache[1:].clone() for cache in caches)],
         (table, table[:1])),
    ):  # fmt: skip
        out = fastattn.attention_with_kvcache(
            q, *given, *new, cache_lens=lens, block_table=tables[0], num_splits=16
        )  # fmt: skip
        expected = fastattn.attention_with_kvcache(
            q[1:], *last, *(x[1:] for x in new), block_table=tables[1], **alone
        )  # fmt: skip
        rows = [cache[1, -1] for cache in caches]
        if not same(out[1:], expected) or not all(map(torch.equal, rows, (x[1, :, 0] for x in new))):
            return False
        for cache in caches:
            cache[1, -1] = 0
    return True


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; on a CPU, where PyTorch's products depend on the batch, the same but for rounding."""
    return torch.equal(a, b) if a.is_cuda else torch.allclose(a, b, atol=1e-5)


def random(device: Device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal, made in place: nothing beside the tensor itself."""
    return torch.empty(shape, dtype=dtype, device=device.torch_device).normal_()


def equal_alone(
    attend: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor, last: Callable[[Tensor], Tensor]
) -> bool:  # fmt: skip
    """Whether the ``last`` part of the result and of each gradient has the bits that it has when computed alone."""
    own = [last(x).clone().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    out, expected = attend(*leaves), attend(*own)
    both = zip(
        (out, *torch.autograd.grad(out, leaves, dout)),
        (expected, *torch.autograd.grad(expected, own, last(dout))), strict=True,
    )  # fmt: skip
    return all(same(last(whole), alone) for whole, alone in both)


LARGE: dict[str, tuple[Callable[[Device, int, torch.dtype], bool], int, str]] = {
    "cache": (cache_beyond, 6, "decode, combine, append"),
    "mask": (mask_beyond, 2, "forward"),
    "dense": (dense_beyond, 9, "forward, delta, dkdv, dq"),
    "packed sequences": (packed_beyond, 9, "forward, delta, dkdv, dq"),
}
"""Name -> check, how many tensors of 2^31 half-precision elements it holds at once, kernels."""


def check_large(checks: Checks) -> None:
    """Tensors of more than 2^31 elements, where the memory suffices; offsets in 32 bits would wrap around."""
    dry = isinstance(checks.device, DryRun)
    elements, dtype = (1 << 13, torch.float32) if dry else (1 << 31, DTYPES["bf16"])
    for name, (check, tensors, kernels) in LARGE.items():
        checks.device.free()
        needed, started, outcome, note = 2.0 * tensors * elements, time.monotonic(), "passed", ""
        if checks.left <= 0:
            outcome, note = "not run", checks.skip("large", name)
        elif needed > checks.device.free_memory():
            outcome, note = "not run", f"needs {needed / 2**30:.0f} GiB of free memory"
            checks.count("large", outcome)
            checks.not_run.append(f"large: {name}: {note}")
        else:
            try:
                if not check(checks.device, elements, dtype):
                    outcome, note = "failed", "differs from what the last part gives alone"
            except Exception as error:
                checks.see(error)
                outcome, note = "error", parity.describe(error)
            checks.count("large", outcome, f"{name}: {note}" if note else "")
        checks.record(
            "large", outcome, kernel=kernels, feature=name, dtype="bf16", head_dim=64 if name == "mask" else 128,
            seconds=time.monotonic() - started, note=note,
        )  # fmt: skip
    checks.device.free()


# The tests that take a device


class Recorder:
    """A pytest plugin: counts outcomes by test file and ends the run at the deadline."""

    def __init__(self, checks: Checks) -> None:
        self.checks, self.files, self.failed, self.stored = checks, {}, {}, 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, _, test = report.nodeid.partition("::")
            self.files.setdefault(file, Counter())[report.outcome] += 1
            if report.failed:
                self.failed.setdefault(file, []).append(test)
                self.checks.count("tests", "failed", report.nodeid)
            elif report.outcome == "passed":
                self.checks.count("tests", "passed")
        if time.monotonic() - self.stored > 2.0:
            self.store()
        if self.checks.left <= 0:
            import pytest

            self.checks.not_run.append("tests: the rest")

            pytest.exit("the time budget is spent", returncode=0)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.setdefault(report.nodeid, []).append("does not import")
            self.files.setdefault(report.nodeid, Counter())["failed"] += 1
            self.checks.count("tests", "failed", f"{report.nodeid} does not import")

    def store(self) -> None:
        self.stored = time.monotonic()
        for file, counts in self.files.items():
            failed = self.failed.get(file, [])
            note = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
            if failed:
                note += ": " + "; ".join(failed[:5])
            self.checks.record("tests", "failed" if failed else "passed", feature=Path(file).name, note=note)


def check_tests(checks: Checks) -> None:
    """pytest on the tests that take the ``device`` fixture, in this process so that each report counts at once."""
    if importlib.util.find_spec("pytest") is None:
        checks.count("tests", "not run", "pytest is not installed")
        return
    if checks.left <= 0:
        checks.skip("tests", "all")
        return
    import pytest

    arguments = [str(ROOT / "tests"), "-q", "-p", "benchmarks.harness.only_device", "-p", "no:cacheprovider",
                 "--no-header", "--continue-on-collection-errors", "--tb=line", "-rN"]  # fmt: skip
    if isinstance(checks.device, DryRun):
        arguments += ["--collect-only", "-qq"]
    elif importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    recorder = Recorder(checks)
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[recorder])
    recorder.store()


# Repeats


def repeat_shapes(device: Device, feature: parity.Feature | parity.CacheFeature) -> list[Any]:
    """The shapes in which a feature is repeated; two of them in a dry run."""
    dry = isinstance(device, DryRun)
    if isinstance(feature, parity.CacheFeature):
        shapes = [
            dataclasses.replace(feature.shape, heads=(8, 2), q_len=q_len, capacity=capacity, lens=(None, 0, 77, 200))
            for q_len, capacity in REPEAT_STEPS
        ]
        return [parity.shrink_cache(shape) for shape in shapes[:2]] if dry else shapes
    packed = feature.options is parity.packed
    return [
        parity.Shape(1 if packed else 8, 4, 2, *(n * (8 if packed else 1) for n in lengths))
        for lengths in (REPEAT_SHAPES[:2] if dry else REPEAT_SHAPES)
    ]


@contextlib.contextmanager
def other_work(device: Device) -> Iterator[Callable[[], None]]:
    """A function that keeps the GPU busy on another stream, so that programs run in another order."""
    if device.torch_device != "cuda":
        yield lambda: None
        return
    stream = torch.cuda.Stream()
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a)

    yield work
    torch.cuda.synchronize()


def check_repeats(checks: Checks) -> None:
    """Every output element has one writer that adds in a fixed order: repeats must be equal bit for bit."""
    dims = (16,) if isinstance(checks.device, DryRun) else (128, 64, 256)
    for head_dim, feature, check in itertools.product(dims, REPEATED, REPEATS):
        repeats = 2 if isinstance(checks.device, DryRun) else REPEATS[check]
        shapes = repeat_shapes(checks.device, parity.FEATURES[feature])
        started, outcome, note = time.monotonic(), "passed", ""
        for shape in shapes:
            if checks.left <= 0:
                outcome, note = "not run", checks.skip(check, f"{feature}, head dim {head_dim}")
                break
            lengths = f"{shape.q_len}x{getattr(shape, 'kv_len', 0) or shape.capacity}"
            try:
                different = count_different(checks.device, feature, shape, head_dim, repeats, loaded=check == "race")
            except Exception as error:
                checks.see(error)
                outcome, note = "error", f"{lengths}: {parity.describe(error)}"
                break
            if different:
                outcome, note = "failed", f"{lengths}: {different} of {repeats} repeats differ"
                break
        checks.record(
            check, outcome, kernel=", ".join(parity.FEATURES[feature].kernels), feature=feature, dtype="bf16",
            head_dim=head_dim, seconds=time.monotonic() - started,
            note=note or f"{repeats} repeats of {len(shapes)} shapes",
        )  # fmt: skip
        if outcome != "not run":
            checks.count(check, outcome, f"{feature}, head dim {head_dim}: {note}" if note else "")


def count_different(device: Device, feature: str, shape: Any, head_dim: int, repeats: int, loaded: bool) -> int:
    """How many of the repeats differ from the first in any bit."""
    dtype = torch.float32 if isinstance(device, DryRun) else DTYPES["bf16"]
    call = parity.FEATURES[feature].call(device, dtype, head_dim, shape)
    first = call()
    different = torch.zeros((), dtype=torch.int64, device=device.torch_device)
    with other_work(device) as work:
        for _ in range(repeats):
            if loaded:
                work()
            unequal = [(a != b).any() for a, b in zip(first, call(), strict=True)]
            different += torch.stack(unequal).any()
    return int(different)


# Sanitizer


def check_sanitizer(checks: Checks) -> None:
    """NVIDIA's compute-sanitizer over a few small calls in a process of its own."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    kernels = dict.fromkeys(kernel for name in REPEATED for kernel in parity.FEATURES[name].kernels)
    for name in SANITIZERS:
        started = time.monotonic()
        outcome, note = "not run", ""
        left = checks.deadline - checks.device.clock()  # its process has a device of its own
        if isinstance(checks.device, DryRun):
            sanitized(checks.device)
            note = "dry run"
        elif not Path(tool).is_file():
            note = "compute-sanitizer is not installed"
        elif left < 20:
            note = "the time budget is spent"
        else:
            outcome, note = run_sanitizer(tool, name, min(90.0, left / 3))  # the tests come after it
        checks.record(name, outcome, kernel=", ".join(kernels), seconds=time.monotonic() - started, note=note)
        checks.count(name, outcome, note if outcome == "failed" else "")
        if outcome == "not run":
            checks.not_run.append(f"{name}: {note}")


def run_sanitizer(tool: str, name: str, limit: float) -> tuple[str, str]:
    """(outcome, note). Without torch's caching allocator, so that each tensor ends where its memory does."""
    words = [tool, "--tool", name, "--error-exitcode", "99"]
    words += [sys.executable, "-m", "benchmarks.tools.gpu_check", "--sanitized"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "not run", f"did not finish within {limit:.0f} s"
    last = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    note = (last or result.stdout.splitlines() or [""])[-1][:200]
    if result.returncode == 0 and last:
        return "passed", note
    return ("failed" if last else "not run"), note


def sanitized(device: Device) -> None:
    """What runs under the sanitizer: every kernel, tails in both directions, every optional operand."""
    dry = isinstance(device, DryRun)
    for name in REPEATED:
        feature: Any = parity.FEATURES[name]
        shape: Any = parity.Shape(1 if name == "packed sequences" else 2, 4, 2, 77, 133)
        if isinstance(feature, parity.CacheFeature):
            shape = dataclasses.replace(parity.shrink_cache(feature.shape), q_len=3, capacity=192, lens=(None, 0, 150))
        feature.call(device, torch.float32 if dry else DTYPES["bf16"], 16 if dry else 64, shape)()


def compile_share(spec: str) -> None:
    """Be one of the processes that compile the parity matrix, by launching its kernels."""
    device: Device = Compiling() if torch.cuda.is_available() else DryRun()
    cases = parity.matrix()
    for index in runner.share(spec, cases):
        with contextlib.suppress(Exception):
            cases[index].launch(device)


def forecast(jobs: int) -> str:
    """What compiling the parity matrix will take."""
    cases = parity.matrix()
    kernels = parity.to_compile(cases)
    seconds = SECONDS_PER_KERNEL * kernels / jobs
    return f"{len(cases)} cases of parity compile {kernels} kernels: about {seconds:.0f} s in {jobs} processes"


def report(checks: Checks) -> str:
    """The table that ends the output."""
    lines = [f"{'check':12} {'passed':>7} {'failed':>7} {'error':>6} {'not run':>8}"]
    for check in dict.fromkeys(check for check, _ in checks.tally):
        counts = [checks.tally[check, outcome] for outcome in ("passed", "failed", "error", "not run")]
        lines.append(f"{check:12} {counts[0]:7} {counts[1]:7} {counts[2]:6} {counts[3]:8}")
    if checks.not_run:
        more = len(checks.not_run) - 20
        lines.append("not run: " + "; ".join(checks.not_run[:20]) + (f"; and {more} more" if more > 0 else ""))
    return "\n".join([*(problem[:200] for problem in checks.problems[:30]), *lines])


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", help="folder for results; without it $OUT, else benchmarks/results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--compile-jobs", type=int, help="processes that compile ahead; default: three in four cores")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors: tests every path without a GPU")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_share:
        compile_share(args.compile_share)
        return 0
    device = device or choose(args.dry_run)
    if args.sanitized:
        sanitized(device)
        return 0
    if device.torch_device != "cuda" and not isinstance(device, DryRun):
        print("needs a CUDA device; --dry-run tests the paths without one")
        return 2
    deadline = device.clock() + args.minutes * 60 - runner.RESERVE
    if device.torch_device == "cuda":
        faulthandler.dump_traceback_later(args.minutes * 60 + 60, exit=True)
    checks = Checks(device, runner.output(args, device), deadline, provenance(device))
    print(", ".join(f"{name} {value}" for name, value in checks.stamp.items()))
    most = max(1, (os.cpu_count() or 1) * 3 // 4)
    jobs = args.compile_jobs
    if jobs is None:
        jobs = most if device.torch_device == "cuda" else 0
    print(forecast(jobs or most))
    if jobs:
        seconds = runner.run_shares(["benchmarks.tools.gpu_check"], jobs, args.minutes * 60 / 4)
        print(f"compiled ahead in {seconds:.0f} s")
    run = {
        "parity": check_parity, "large": check_large, "repeats": check_repeats, "sanitizer": check_sanitizer,
        "tests": check_tests,
    }  # fmt: skip
    for step in (step for step in STEPS if step in args.steps):
        print(f"{step}: {max(0.0, checks.left):.0f} s left", file=sys.stderr, flush=True)
        run[step](checks)
    faulthandler.cancel_dump_traceback_later()
    print(report(checks))
    print(f"rows in {checks.output / device.folder / 'parity.csv'}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
