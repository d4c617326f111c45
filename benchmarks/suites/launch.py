"""What a call of the Triton backend costs on the host until the driver gets it, beside the same call with Triton's own
binder: on a stand-in for a GPU (`benchmarks.harness.standin`), so on any machine, in a process of its own.

Seconds depend on the machine and its load. How many functions a call calls does not, so a test holds that to limits.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch

import fastattn
from benchmarks.harness.device import Call, Device, DryRun, Timing
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cpu", "cuda")
HEADS, LENGTH, DIM, CAPACITY = 8, 128, 64, 4096
DESCRIPTORS = "a launch that makes tensor descriptors"
PLAIN, WITH_MEMORY = "triton", "triton, memory offered"
"""Providers of `DESCRIPTORS`: Triton's launcher for a kernel that makes none, and for one that makes three of them."""


def calls() -> dict[str, Callable[[], object]]:
    """Case -> call, on CPU tensors in bfloat16."""
    q, k, v, dout = (torch.randn(1, HEADS, LENGTH, DIM).bfloat16() for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    caches = [torch.zeros(2, CAPACITY, 2, DIM).bfloat16() for _ in "kv"]
    query, new = torch.randn(2, HEADS, 1, DIM).bfloat16(), [torch.randn(2, 2, 1, DIM).bfloat16() for _ in "kv"]
    lens = torch.tensor([100, 200], dtype=torch.int32)

    def train() -> object:
        return torch.autograd.grad(fastattn.attention(*leaves, causal=True), leaves, dout)

    return {
        "forward": lambda: fastattn.attention(q, k, v, causal=True),
        "forward, gradients recorded": lambda: fastattn.attention(*leaves, causal=True),
        "forward and backward": train,
        "append and attend": lambda: fastattn.attention_with_kvcache(query, *caches, *new, cache_lens=lens),
    }


def descriptors() -> dict[str, Call]:
    """Triton's launcher up to the driver.

    A kernel that makes descriptors on the device needs memory for them, 128 bytes each in every program, from the
    allocator that `triton.set_allocator` set: one allocation for each launch, here on the CPU.
    """
    import triton
    from triton.backends.nvidia.driver import CudaLauncher

    def launcher(bytes_per_program: int) -> Call:
        built: Any = object.__new__(CudaLauncher)
        for name in ("global_scratch_align", "num_ctas", "profile_scratch_align"):
            setattr(built, name, 1)
        for name in ("profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "arg_annotations",
                     "kernel_signature", "gsan_enabled"):  # fmt: skip
            setattr(built, name, 0)
        built.global_scratch_size, built.launch = bytes_per_program, lambda *_: None
        return lambda repeat: built(132, 1, 1, 0, 1, None, None, None, None)

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    return {PLAIN: launcher(0), WITH_MEMORY: launcher(3 * 128)}


class Calls(NamedTuple):
    """How many functions one call calls, itself counted in."""

    python: int
    c: int
    """built-in ones, PyTorch's among them"""
    operators: int
    """passes through PyTorch's dispatcher that Python starts by name"""

    def __str__(self) -> str:
        return f"calls {self.python} Python and {self.c} C functions, {self.operators} operators"


def count(call: Callable[[], object], warm: int = 4) -> Calls:
    """Counted once its layout is known: a launcher records the second call and repeats it from then on."""
    for _ in range(warm):
        call()
    seen = {"call": 0, "c_call": 0, "operator": 0}

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event in seen:
            seen[event] += 1
        if event == "call" and frame.f_code.co_name == "__call__" and frame.f_code.co_filename == torch._ops.__file__:
            seen["operator"] += 1

    sys.setprofile(see)
    call()
    sys.setprofile(None)
    return Calls(seen["call"], seen["c_call"] - 1, seen["operator"])  # the last one is setprofile itself


def counts() -> dict[str, dict[str, Calls]]:
    """Case -> provider -> its count. For a process in which kernels are not interpreted."""
    from benchmarks.harness import standin
    from fastattn.kernels import replay

    found = {}
    with standin.installed():
        for case, call in calls().items():
            found[case] = {"fastattn": count(call)}
            with replay.off():
                found[case]["triton-binder"] = count(call)
    return found


def times(seconds: float) -> dict[str, dict[str, tuple[float, ...]]]:
    """Case -> provider -> the fields of its Timing. Call it in a process in which kernels are not interpreted."""
    from benchmarks.harness import standin
    from fastattn.kernels import replay

    def bound_anew(call: Callable[[], object]) -> Call:
        def run(repeat: int) -> object:
            with replay.off():
                return call()

        return run

    def as_it_is(call: Callable[[], object]) -> Call:
        return lambda repeat: call()

    torch.set_num_threads(1)
    found = {}
    with standin.installed():
        for case, call in calls().items():
            both = {"fastattn": as_it_is(call), "triton-binder": bound_anew(call)}
            found[case] = {name: tuple(timing) for name, timing in Device().host_time(both, seconds).items()}
    return found


def descriptor_times(seconds: float) -> dict[str, tuple[float, ...]]:
    """Provider -> the fields of its Timing, of `DESCRIPTORS`."""
    return {name: tuple(timing) for name, timing in Device().host_time(descriptors(), seconds).items()}


def elsewhere(expression: str) -> Any:
    """The value of an expression of this module in a process in which kernels are not interpreted, as JSON has it."""
    code = f"import json; from benchmarks.suites import launch; print(json.dumps(launch.{expression}))"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=180
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure(bench: Bench) -> None:
    """Record every case."""
    found: dict[str, Any]
    if isinstance(bench.device, DryRun):
        found = {case: dict.fromkeys(("fastattn", "triton-binder"), (1.0, 1.0, 1.0, 1.0, 1)) for case in calls()}
        found[DESCRIPTORS] = dict.fromkeys((PLAIN, WITH_MEMORY), (1.0, 1.0, 1.0, 1.0, 1))
        counted = {case: dict.fromkeys(("fastattn", "triton-binder"), (1, 1, 1)) for case in calls()}
    else:
        found, counted = elsewhere(f"times({bench.seconds})"), elsewhere("counts()")
        found[DESCRIPTORS] = elsewhere(f"descriptor_times({bench.seconds})")
    for case, by_provider in found.items():
        if case == DESCRIPTORS:
            for provider, timing in by_provider.items():
                key = {"case": case, "mode": "host", "provider": provider}
                bench.record("launch", key, Timing._make((*timing[:4], int(timing[4]))))
            continue
        q_len, kv_len, batch = (1, CAPACITY, 2) if case == "append and attend" else (LENGTH, LENGTH, 1)
        for provider, timing in by_provider.items():
            key = {
                "case": case, "mode": "host", "provider": provider, "dtype": "bf16", "batch": batch, "q_heads": HEADS,
                "kv_heads": 2 if batch == 2 else HEADS, "q_len": q_len, "kv_len": kv_len, "head_dim": DIM,
            }  # fmt: skip
            note = str(Calls(*counted[case][provider])) if case in counted else ""
            bench.record("launch", key, Timing._make((*timing[:4], int(timing[4]))), note=note)


def cells() -> list[Cell]:
    return [Cell("launch", "host time up to the driver", measure, 2)]
