"""The device of a benchmark and how it takes time: a GPU, a CPU, or a dry run that measures nothing.

On a GPU the method is that of `triton.testing.do_bench`: events around each call, the L2 cache overwritten before it,
median and 20th / 80th percentile over many. In addition, the compared calls take turns, repeat by
repeat, so that clocks and temperature are the same for all; each call gets its repeat index, to rotate between inputs.
"""

import functools
import gc
import itertools
import math
import platform
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], Any]


SHORT_SECONDS = 4e-4
"""Calls that take less, with the overwriting of the cache, may end before the host has queued the next."""
SLEEP_CYCLES = 1_000_000
"""The GPU then waits this many cycles: more than half a millisecond, longer than the host takes for any call."""


class Timing(NamedTuple):
    """Percentiles over the repeats, in milliseconds."""

    p20: float
    p50: float
    p80: float
    min: float
    repeats: int


def summarize(samples: list[float]) -> Timing:
    """Percentiles with linear interpolation, as numpy and torch define them."""
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return Timing(quantile(0.2), quantile(0.5), quantile(0.8), ordered[0], len(ordered))


def repeats_within(seconds: float, estimate: float, at_most: int) -> int:
    """How often a call of ``estimate`` seconds fits, at least 5 times."""
    return max(5, min(at_most, int(seconds / max(estimate, 1e-9))))


class Allocations(NamedTuple):
    """The memory of one call on a CPU, in bytes."""

    peak: int
    """The most that was held at a time, beyond what was held before."""
    largest: int
    """The largest single buffer."""


def allocations(call: Callable[[], Any]) -> Allocations:
    """The memory of a call from PyTorch's CPU allocator, without scratch memory that libraries take elsewhere."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))
    return Allocations(max(held, default=0), max((size for _, size in changes), default=0))


class Device:
    """The facts and methods of a device that the suites need. The methods here serve a CPU."""

    torch_device = "cpu"
    input_sets = 2
    """How many sets of inputs a benchmark should rotate between."""

    @property
    def name(self) -> str:
        return "none"

    @property
    def folder(self) -> str:
        """The folder of its results: letters, digits, dots and dashes."""
        return slug(f"cpu {processor()}")

    def time(self, calls: Mapping[str, Call], seconds: float = 0.1, block_seconds: float = 0.0) -> dict[str, Timing]:
        """Time the calls against each other.

        Args:
            calls: by name; each gets its repeat index.
            seconds: how long to repeat each of them.
            block_seconds: time blocks of calls that take at least this long and divide, for calls so short that
                reading the clock shows.
        """
        counts, blocks = {}, {}
        for name, call in calls.items():
            estimate = min(self._once(call) for _ in range(3))
            blocks[name] = max(1, round(block_seconds / max(estimate, 1e-7)))
            counts[name] = repeats_within(seconds, estimate * blocks[name], at_most=1000)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        enabled = gc.isenabled()
        gc.disable()  # a garbage collection would count for the call that triggers it
        try:
            for repeat in range(max(counts.values(), default=0)):
                for name in rotated(list(calls), repeat):
                    if repeat < counts[name]:
                        call, block = calls[name], blocks[name]
                        start = time.perf_counter()
                        for _ in range(block):
                            call(repeat)
                        samples[name].append((time.perf_counter() - start) * 1e3 / block)
        finally:
            if enabled:
                gc.enable()
        return {name: summarize(values) for name, values in samples.items()}

    def _once(self, call: Call) -> float:
        start = time.perf_counter()
        call(0)
        return time.perf_counter() - start

    def time_long(self, calls: Mapping[str, Call], repeats: int = 3, seconds: float = 20.0) -> dict[str, Timing]:
        """Time calls that take seconds and end with a result on the host's clock; they have been called once already.

        Args:
            calls: by name; each is given its repeat index.
            repeats: of each.
            seconds: a call that has taken so long altogether is not repeated.
        """
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats):
            for name in rotated(list(calls), repeat):
                if sum(samples[name]) < seconds * 1e3:
                    self.synchronize()
                    start = time.perf_counter()
                    calls[name](repeat)
                    self.synchronize()
                    samples[name].append((time.perf_counter() - start) * 1e3)
        return {name: summarize(values) for name, values in samples.items()}

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def host_time(self, calls: Mapping[str, Call], seconds: float = 0.1) -> dict[str, Timing]:
        """The time that the calling thread needs, in blocks long enough for the clock."""
        return self.time(calls, seconds, block_seconds=1e-3)

    def peak_memory(self, call: Callable[[], Any]) -> float | None:
        """The peak of the MiB that the call allocates; None if this device cannot count them.

        On a CPU this is the memory of PyTorch's allocator, from its profiler.
        """
        return allocations(call).peak / 2**20

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """The call as a replayable graph, or None if the device has none."""
        return None

    def total_memory(self) -> float:
        """Bytes."""
        return 8 * 2.0**30

    def free_memory(self) -> float:
        """Free bytes."""
        return self.total_memory()

    def clock(self) -> float:
        return time.monotonic()

    def pause(self) -> None:
        """Called between cells, against throttling."""

    def free(self) -> None:
        """Called between cells: return unused memory."""
        gc.collect()


class CudaDevice(Device):
    """The current CUDA device."""

    torch_device = "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    @property
    def folder(self) -> str:
        return slug(self.name)

    @functools.cached_property
    def _flush_buffer(self) -> torch.Tensor:
        return torch.empty(2**28, dtype=torch.int8, device="cuda")  # several times the L2 of any GPU

    def time(self, calls: Mapping[str, Call], seconds: float = 0.1, block_seconds: float = 0.0) -> dict[str, Timing]:
        counts, short = {}, set()
        for name, call in calls.items():
            call(0)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(3):
                self._flush_buffer.zero_()
                call(0)
            end.record()
            torch.cuda.synchronize()
            estimate = start.elapsed_time(end) / 3e3
            counts[name] = repeats_within(seconds, estimate, at_most=200)
            if estimate < SHORT_SECONDS:
                short.add(name)
            for repeat in range(max(1, counts[name] // 4)):
                call(repeat)
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        torch.cuda.synchronize()
        for repeat in range(max(counts.values(), default=0)):
            for name in rotated(list(calls), repeat):
                if repeat < counts[name]:
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    if name in short:  # the GPU waits until all of it is queued; otherwise this would time the host
                        torch.cuda._sleep(SLEEP_CYCLES)
                    self._flush_buffer.zero_()
                    start.record()
                    calls[name](repeat)
                    end.record()
                    events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: summarize([s.elapsed_time(e) for s, e in pairs]) for name, pairs in events.items()}

    def host_time(self, calls: Mapping[str, Call], seconds: float = 0.1) -> dict[str, Timing]:
        """The time until a call returns, with an empty queue before each block, so that nothing waits for the GPU."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        block = 20
        for call in calls.values():
            for _ in range(block):
                call(0)
        deadline = time.perf_counter() + seconds * len(calls)
        repeat = 0
        while repeat < 5 or time.perf_counter() < deadline:
            for name in rotated(list(calls), repeat):
                call = calls[name]
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(block):
                    call(repeat)
                samples[name].append((time.perf_counter() - start) * 1e3 / block)
            repeat += 1
        torch.cuda.synchronize()
        return {name: summarize(values) for name, values in samples.items()}

    def peak_memory(self, call: Callable[[], Any]) -> float | None:
        self.free()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak / 2**20

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up outside the graph, on a side stream, as its documentation asks
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def total_memory(self) -> float:
        return float(torch.cuda.get_device_properties(0).total_memory)

    def free_memory(self) -> float:
        return float(torch.cuda.mem_get_info()[0])

    def pause(self) -> None:
        time.sleep(0.05)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class DryRun(Device):
    """Runs every call once on small CPU tensors and invents the figures, with its own clock.

    ``step`` is how many seconds each timing takes on that clock.
    """

    input_sets = 1

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step, self.timings = 0.0, step, 0

    @property
    def name(self) -> str:
        return "dry run"

    @property
    def folder(self) -> str:
        return "dry-run"

    def time(self, calls: Mapping[str, Call], seconds: float = 0.1, block_seconds: float = 0.0) -> dict[str, Timing]:
        for call in calls.values():
            call(0)
        self.now += self.step
        self.timings += 1
        factors = {name: 1.0 + 0.25 * i for i, name in enumerate(calls)}
        return {name: Timing(0.9 * x, x, 1.1 * x, 0.8 * x, 5) for name, x in factors.items()}

    def time_long(self, calls: Mapping[str, Call], repeats: int = 3, seconds: float = 20.0) -> dict[str, Timing]:
        return self.time(calls)

    def peak_memory(self, call: Callable[[], Any]) -> float | None:
        call()
        self.now += self.step
        return 1.0

    def free(self) -> None:
        pass

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        return call

    def clock(self) -> float:
        return self.now


class Compiling(CudaDevice):
    """Runs every call once and records nothing: fills the compilers' caches on disk."""

    input_sets = 1

    def time(self, calls: Mapping[str, Call], seconds: float = 0.1, block_seconds: float = 0.0) -> dict[str, Timing]:
        for call in calls.values():
            call(0)
        torch.cuda.synchronize()
        return {name: Timing(1.0, 1.0, 1.0, 1.0, 1) for name in calls}

    def host_time(self, calls: Mapping[str, Call], seconds: float = 0.1) -> dict[str, Timing]:
        return self.time(calls)

    def time_long(self, calls: Mapping[str, Call], repeats: int = 3, seconds: float = 20.0) -> dict[str, Timing]:
        return self.time(calls)

    def pause(self) -> None:
        pass


def rotated(names: list[str], repeat: int) -> list[str]:
    """The calls in an order with another first one each time, so that none always follows the same neighbour."""
    start = repeat % max(1, len(names))
    return names[start:] + names[:start]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return re.sub(r"\((R|TM)\)", "", line.partition(":")[2]).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def choose(dry_run: bool) -> Device:
    """The device that this machine measures on."""
    if dry_run:
        return DryRun()
    return CudaDevice() if torch.cuda.is_available() else Device()
