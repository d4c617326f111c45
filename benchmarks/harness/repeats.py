"""Bit-equal repeats, on a GPU that is busy with other work too, and NVIDIA's sanitizer over the same kernels."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import parity
from .checks import Checks
from .device import Device, DryRun
from .parity_features import FEATURES, CacheFeature, Feature, Shape, packed, shrink_cache
from .problems import DTYPES
from .provenance import ROOT

LEAST_SECONDS, MOST_SECONDS = 60.0, 240.0
"""The time of a process under the sanitizer: PyTorch and CUDA alone take half a minute to start in it."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")
REPEATED = ("cache", "causal", "everything at once", "cache, pages of 16", "packed sequences", "block mask")
"""Features that between them launch every kernel in every way."""
# (Lq, Lk): one tile, tails, more keys than queries and fewer, several tiles.
REPEAT_SHAPES = ((1, 239), (239, 1), (3, 799), (127, 513), (128, 128), (257, 257), (1024, 1023), (2048, 2048))
# (Lq, capacity) of a cache
REPEAT_STEPS = ((1, 256), (4, 1024), (17, 2048), (1, 16384))
REPEATS = {"race": 250, "determinism": 50}


def repeat_shapes(device: Device, feature: Feature | CacheFeature) -> list[Any]:
    """The shapes in which a feature is repeated; two of them in a dry run."""
    dry = isinstance(device, DryRun)
    if isinstance(feature, CacheFeature):
        shapes = [
            dataclasses.replace(feature.shape, heads=(8, 2), q_len=q_len, capacity=capacity, lens=(None, 0, 77, 200))
            for q_len, capacity in REPEAT_STEPS
        ]
        return [shrink_cache(shape) for shape in shapes[:2]] if dry else shapes
    is_packed = feature.options is packed
    return [
        Shape(1 if is_packed else 8, 4, 2, *(n * (8 if is_packed else 1) for n in lengths))
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
    """One program writes each output element and adds in a fixed order, so repeats must be equal bit for bit."""
    dims = (16,) if isinstance(checks.device, DryRun) else (128, 64, 256)
    for head_dim, feature, check in itertools.product(dims, REPEATED, REPEATS):
        repeats = 2 if isinstance(checks.device, DryRun) else REPEATS[check]
        shapes = repeat_shapes(checks.device, FEATURES[feature])
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
            check, outcome, kernel=", ".join(FEATURES[feature].kernels), feature=feature, dtype="bf16",
            head_dim=head_dim, seconds=time.monotonic() - started,
            note=note or f"{repeats} repeats of {len(shapes)} shapes",
        )  # fmt: skip
        if outcome != "not run":
            checks.count(check, outcome, f"{feature}, head dim {head_dim}: {note}" if note else "")


def count_different(device: Device, feature: str, shape: Any, head_dim: int, repeats: int, loaded: bool) -> int:
    """How many of the repeats differ from the first in any bit."""
    dtype = torch.float32 if isinstance(device, DryRun) else DTYPES["bf16"]
    call = FEATURES[feature].call(device, dtype, head_dim, shape)
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
    dry = isinstance(checks.device, DryRun)
    for name, feature in itertools.product(SANITIZERS, REPEATED):  # a process for each: one that fails ends no other
        started = time.monotonic()
        outcome, note = "not run", ""
        left = checks.deadline - checks.device.clock()  # its process has a device of its own
        if dry:
            sanitized(checks.device, feature)
            note = "dry run"
        elif not Path(tool).is_file():
            note = "compute-sanitizer is not installed"
        elif left < LEAST_SECONDS:
            note = "the time budget is spent"
        else:
            outcome, note = run_sanitizer(tool, name, feature, min(MOST_SECONDS, left))
        checks.record(
            name, outcome, kernel=", ".join(FEATURES[feature].kernels), feature=feature, dtype="bf16",
            head_dim=64, seconds=time.monotonic() - started, note=note,
        )  # fmt: skip
        checks.count(name, outcome, f"{feature}: {note}" if outcome == "failed" else "")
        if outcome == "not run":
            checks.not_run.append(f"{name}: {feature}: {note}")


def run_sanitizer(tool: str, name: str, feature: str, limit: float) -> tuple[str, str]:
    """(outcome, note). Without torch's caching allocator, so that each tensor ends where its memory does."""
    words = [tool, "--tool", name, "--error-exitcode", "99"]
    words += [sys.executable, "-m", "benchmarks.tools.gpu_check", "--sanitized", feature]
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


def sanitized(device: Device, name: str) -> int:
    """What runs under the sanitizer of one feature: every kernel, tails in both directions. The process's exit code."""
    dry = isinstance(device, DryRun)
    feature: Any = FEATURES[name]
    shape: Any = Shape(1 if name == "packed sequences" else 2, 4, 2, 77, 133)
    if isinstance(feature, CacheFeature):
        shape = dataclasses.replace(shrink_cache(feature.shape), q_len=3, capacity=192, lens=(None, 0, 150))
    feature.call(device, torch.float32 if dry else DTYPES["bf16"], 16 if dry else 64, shape)()
    return 0
