"""The cost of a call before any arithmetic: host time on tiny inputs, CUDA graph replay, first call of a process."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastattn
from benchmarks.harness.device import Call, DryRun, Timing
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cpu", "cuda")
TINY = (1, 2, 8, 16)
SHAPE = {"batch": TINY[0], "q_heads": TINY[1], "kv_heads": TINY[1], "q_len": TINY[2], "kv_len": TINY[2],
         "head_dim": TINY[3]}  # fmt: skip


def tiny_inputs(device: str, grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v; float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(TINY, device=device, dtype=dtype, requires_grad=grad) for _ in "qkv")
    return q, k, v


def host_calls(device: str) -> dict[str, dict[str, Callable[[], object]]]:
    """Case -> provider -> call. "sdpa" is torch's function, for the difference."""
    plain, grad = tiny_inputs(device, False), tiny_inputs(device, True)
    mask = torch.ones(TINY[2], TINY[2], dtype=torch.bool, device=device).tril()
    own, attention = fastattn.scaled_dot_product_attention, fastattn.attention
    torch_sdpa = F.scaled_dot_product_attention
    return {
        "sdpa": {"fastattn": lambda: own(*plain), "sdpa": lambda: torch_sdpa(*plain)},
        "sdpa, gradients recorded": {"fastattn": lambda: own(*grad), "sdpa": lambda: torch_sdpa(*grad)},
        "sdpa, causal": {
            "fastattn": lambda: own(*plain, is_causal=True), "sdpa": lambda: torch_sdpa(*plain, is_causal=True),
        },
        "sdpa, boolean mask": {
            "fastattn": lambda: own(*plain, attn_mask=mask), "sdpa": lambda: torch_sdpa(*plain, attn_mask=mask),
        },
        "attention": {"fastattn": lambda: attention(*plain), "sdpa": lambda: torch_sdpa(*plain)},
        "attention, gradients recorded": {"fastattn": lambda: attention(*grad), "sdpa": lambda: torch_sdpa(*grad)},
        "attention, boolean mask": {
            "fastattn": lambda: attention(*plain, mask=mask), "sdpa": lambda: torch_sdpa(*plain, attn_mask=mask),
        },
        "attention, window": {"fastattn": lambda: attention(*plain, window=(4, 0))},
        "attention, lse": {"fastattn": lambda: attention(*plain, return_lse=True)},
        "attention, reference backend": {"fastattn": lambda: attention(*plain, backend="reference")},
        "explain": {"fastattn": lambda: fastattn.explain(*plain)},
    }  # fmt: skip


def without_repeat(call: Callable[[], object]) -> Call:
    return lambda repeat: call()


def key_of(bench: Bench, case: str, mode: str, provider: str) -> dict[str, object]:
    dtype = "bf16" if bench.device.torch_device == "cuda" else "fp32"
    return {"case": case, "mode": mode, "provider": provider, "dtype": dtype, **SHAPE}


def measure_host(bench: Bench, case: str) -> None:
    """Host time per call. The calls take turns in short blocks; the minimum shows an idle machine."""
    calls = {
        name: without_repeat(call) for name, call in host_calls(bench.device.torch_device)[case].items()
        if bench.wants(name)
    }  # fmt: skip
    with torch.set_grad_enabled("gradients" in case):
        timings = bench.device.host_time(calls, 5 * bench.seconds)
    for name, timing in timings.items():
        bench.record("overhead", key_of(bench, case, "host", name), timing)


def measure_graph(bench: Bench, case: str) -> None:
    """Time of one call inside a replayed CUDA graph, without the host."""
    calls: dict[str, Call] = {}
    with torch.no_grad():
        for name, call in host_calls(bench.device.torch_device)[case].items():
            if bench.wants(name) and (replay := bench.device.capture(call)) is not None:
                calls[name] = without_repeat(replay)
        for name, timing in bench.time(calls).items():
            bench.record("overhead", key_of(bench, case, "graph replay", name), timing)


FIRST_CALL = """
import json, time
start = time.perf_counter()
import torch
import_torch = time.perf_counter() - start
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q = torch.randn(1, 2, 256, 64, device=device, dtype=dtype, requires_grad=True)
times = {}

def timed(name, function):
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    times[name] = (time.perf_counter() - start) * 1e3
    return result

def import_fastattn():
    import fastattn
    return fastattn

fastattn = timed("import fastattn", import_fastattn)
out = timed("first forward", lambda: fastattn.attention(q, q, q, causal=True))
timed("first backward", lambda: out.sum().backward())
timed("second forward", lambda: fastattn.attention(q, q, q, causal=True))
print(json.dumps({"import torch": import_torch * 1e3, **times}))
"""


def first_call(cache: str) -> dict[str, float]:
    """Milliseconds of the first steps of a fresh process, with Triton's cache in the folder ``cache``.

    Python has compiled the package before, as `pip` does.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", "import fastattn"], env=environment, check=True, timeout=180)
    result = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True, timeout=180
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure_first_call(bench: Bench) -> None:
    """Importing and the first calls, in fresh processes: with an empty compilation cache, then with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty cache", "filled cache"):
            times = {"first forward": 1.0} if isinstance(bench.device, DryRun) else first_call(cache)
            for name, ms in times.items():
                timing = Timing(ms, ms, ms, ms, 1)
                bench.record("overhead", key_of(bench, name, state, "fastattn"), timing)


def cells() -> list[Cell]:
    found = [
        Cell("overhead", case, functools.partial(measure_host, case=case), 2, ("overhead", case))
        for case in host_calls("cpu")
    ]
    graphs = ("sdpa", "sdpa, causal", "attention, boolean mask")
    found += [Cell("overhead", f"{case}, graph", functools.partial(measure_graph, case=case), 2) for case in graphs]
    return [*found, Cell("overhead", "first call", measure_first_call, 2)]
