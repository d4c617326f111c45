"""The host time of a call of the Triton backend until the driver gets it, and that of the same call with Triton's own
binder. It runs on a stand-in for a GPU (`benchmarks.harness.standin`), so on any machine, in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

import fastattn
from benchmarks.harness.device import Call, Device, DryRun, Timing
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cpu", "cuda")
HEADS, LENGTH, DIM, CAPACITY = 8, 128, 64, 4096


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


def measure(bench: Bench) -> None:
    """Record every case."""
    if isinstance(bench.device, DryRun):
        found = {case: dict.fromkeys(("fastattn", "triton-binder"), (1.0, 1.0, 1.0, 1.0, 1)) for case in calls()}
    else:
        code = f"import json; from benchmarks.suites import launch; print(json.dumps(launch.times({bench.seconds})))"
        environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=180
        )
        found = json.loads(result.stdout.splitlines()[-1])
    for case, by_provider in found.items():
        q_len, kv_len, batch = (1, CAPACITY, 2) if case == "append and attend" else (LENGTH, LENGTH, 1)
        for provider, timing in by_provider.items():
            key = {
                "case": case, "mode": "host", "provider": provider, "dtype": "bf16", "batch": batch, "q_heads": HEADS,
                "kv_heads": 2 if batch == 2 else HEADS, "q_len": q_len, "kv_len": kv_len, "head_dim": DIM,
            }  # fmt: skip
            bench.record("launch", key, Timing._make((*timing[:4], int(timing[4]))))


def cells() -> list[Cell]:
    return [Cell("launch", "host time up to the driver", measure, 2)]
