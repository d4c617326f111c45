"""Timing on a CPU, and on stand-ins for the functions of torch.cuda."""

import contextlib
import sys
import time
import types
from collections import Counter

import pytest
import torch

from benchmarks.harness import device, resident
from benchmarks.harness.device import CudaDevice, Device
from fastattn.testing import assert_parity


def test_percentiles_are_those_of_torch():
    samples = torch.rand(37).tolist()
    timing = device.summarize(samples)
    found = torch.tensor(timing[:3], dtype=torch.float64)
    expected = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    # Each rounds its position among the samples, 36 at most, and that many eps are what samples below 1 can move.
    assert_parity(found, expected, expected, intermediate=36.0)
    assert timing.min == min(samples) and timing.repeats == 37
    assert device.summarize([3.0])[:4] == (3.0, 3.0, 3.0, 3.0)


def test_calls_take_turns_and_rotate():
    order = []
    calls = {name: lambda repeat, name=name: order.append((name, repeat)) or time.sleep(1e-3) for name in "ab"}
    timings = Device().time(calls, seconds=0.02)
    assert timings["a"].repeats >= 5 and 0.9 < timings["a"].min < 100
    measured = order[6:]  # three calls of each come before, to estimate
    repeats = [repeat for _, repeat in measured]
    assert repeats == sorted(repeats)
    assert [name for name, _ in measured[:4]] == ["a", "b", "b", "a"]


def test_memory_of_a_call_on_a_cpu():
    """What is held at once, and the largest buffer: not what was there before, nor the sum of all that came."""
    before = torch.ones(1 << 22)

    def call():
        for _ in range(3):
            first = torch.ones(1 << 18)
            first = first + torch.ones(1 << 18)
        return before + 1

    found = device.allocations(call)
    assert found.largest == 1 << 24
    assert 1 << 24 <= found.peak < (1 << 24) + (4 << 20)
    assert Device().peak_memory(call) == pytest.approx(found.peak / 2**20, rel=0.01)


def prepare_bytes(results: int, scratch: int):
    """A call that holds so much more than it returns, past PyTorch's allocator."""

    def call():
        other = b"x" * scratch
        return b"y" * results, len(other)

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_a_process_grows_by():
    """An interpreter has some free, and takes some of its own: so nearer to the sum than if a part were missed, or
    counted twice.
    """
    results, scratch = 20, 30  # MiB
    peak = resident.peak(prepare_bytes, results << 20, scratch << 20)
    assert abs(peak - (results + scratch)) < min(results, scratch) / 2


def test_blocks_of_short_calls_are_divided():
    count = Counter()
    timings = Device().time({"a": lambda repeat: count.update("a")}, seconds=0.02, block_seconds=1e-3)
    assert timings["a"].p50 < 0.1
    assert count["a"] > 5 * timings["a"].repeats


class FakeEvent:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return max(1e-3, (other.at - self.at) * 1e3)


@pytest.fixture
def cuda_device(monkeypatch):
    """A CudaDevice on stand-ins for the functions of torch.cuda that it calls."""
    used = []

    class FakeStream:
        def wait_stream(self, other):
            used.append("wait_stream")

    class FakeGraph:
        def replay(self):
            used.append("replay")

    @contextlib.contextmanager
    def within(x):
        yield

    fakes = {
        "Event": FakeEvent,
        "synchronize": lambda: used.append("synchronize"),
        "_sleep": lambda cycles: used.append("sleep"),
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda index: types.SimpleNamespace(total_memory=80 * 2**30),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 4 * 2**20,
        "empty_cache": lambda: used.append("empty_cache"),
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": within,
        "CUDAGraph": FakeGraph,
        "graph": within,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    made = CudaDevice()
    made.__dict__["_flush_buffer"] = torch.ones(8)
    made.used = used
    return made


def test_cuda_timing_flushes_the_cache_before_each_call(cuda_device, monkeypatch):
    def call(repeat):
        assert not cuda_device._flush_buffer.any()
        cuda_device._flush_buffer.fill_(1.0)

    def warm_up(repeat):
        cuda_device._flush_buffer.zero_()

    cuda_device.__dict__["_flush_buffer"] = torch.zeros(8)
    timings = cuda_device.time({"a": warm_up, "b": warm_up}, seconds=0.01)
    assert timings.keys() == {"a", "b"} and timings["a"].repeats >= 5
    flushed = []
    cuda_device.__dict__["_flush_buffer"] = types.SimpleNamespace(zero_=lambda: flushed.append(1))
    timing = cuda_device.time({"a": lambda repeat: None}, seconds=0.001)["a"]
    assert len(flushed) == timing.repeats + 3
    before = cuda_device.used.count("sleep")
    monkeypatch.setattr(device, "SHORT_SECONDS", 0.0)
    cuda_device.time({"a": lambda repeat: None}, seconds=0.001)
    assert before >= timing.repeats and cuda_device.used.count("sleep") == before  # short calls alone wait for the host
    assert cuda_device.used.count("synchronize") >= 3


def test_cuda_host_time_memory_graph_and_name(cuda_device):
    timing = cuda_device.host_time({"a": lambda repeat: None}, seconds=0.005)["a"]
    assert timing.repeats >= 5
    assert cuda_device.peak_memory(lambda: None) == 3.0
    cuda_device.capture(lambda: None)()
    assert "replay" in cuda_device.used
    assert (cuda_device.name, cuda_device.folder) == ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3")
    assert cuda_device.total_memory() == 80 * 2**30
    assert device.Compiling().time({"a": lambda repeat: None}).keys() == {"a"}
