"""The CPU path against PyTorch's: full and causal attention, every feature per allowed pair, layers, and decode.

Plain attention is measured on one and on two threads; the peers take turns within a cell. A decode step is compared
with reading as many bytes as its cache has, by `torch.sum`; over a quantised cache also with the same step in bfloat16.
`python -m benchmarks.tools.cpu_ratios` prints the ratios of the rows.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from benchmarks.harness.attention import measure
from benchmarks.harness.device import DryRun
from benchmarks.harness.peers import OWN
from benchmarks.harness.problems import DTYPES, Problem
from benchmarks.harness.runner import Bench, Cell
from benchmarks.harness.summary import READ, UNQUANTISED
from fastattn.backends.reference.kvcache import quantise
from fastattn.testing import check_kvcache

from . import decode
from .layers import measure_layer

DEVICES = ("cpu",)
LENGTHS = (128, 512, 1024, 2048, 4096)
HEAD_DIMS = (64, 128)
THREADS = (1, 2)
MODES = ("forward", "backward")
SDPA = "sdpa"
ANY_PEER = (OWN, SDPA, "flex", "sdpa-math")

SIZES: dict[str, Any] = {"batch": 1, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32"}
PLAIN: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}}

# The features' length for the comparison with "causal" and all peers; at the other lengths the only peer is PyTorch's
# kernel. Packed documents are far shorter than a tile.
FEATURE_LENGTH = 1024
FEATURE_LENGTHS = (256, 1024, 2048)
FEATURES: dict[str, dict[str, Any]] = {
    "window 256": {"window": 256, "causal": True},
    "softcap 30": {"softcap": 30.0, "causal": True},
    "ALiBi": {"alibi": True, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "GQA 8/2": {"kv_heads": 2, "causal": True},
    "mask": {"mask": "random", "causal": True},
    "bias": {"bias": "constant", "causal": True},
    "bias with gradient": {"bias": "learned", "causal": True},
    "dropout 0.1": {"dropout_p": 0.1, "causal": True},
    "packed documents": {"pattern": "documents", "packed": True, "causal": True},
    "block mask": {"pattern": "causal"},
    "bf16": {"dtype": "bf16", "causal": True},
    "fp16": {"dtype": "fp16", "causal": True},
}

MATMUL = "matmul"
QUANTISED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
CACHE_BYTES = 1 << 26
# (q_heads, kv_heads, head_dim) of a decode step.
CACHE_HEADS = ((8, 8, 64), (32, 8, 128))

# Case -> the fields that it changes in a Problem of these sizes.
CASES = PLAIN | FEATURES


def cells() -> list[Cell]:
    """Most important first: plain attention, features, long sequences, layers."""
    found = [Cell("cpu", f"{MATMUL}, {counted(1)}", functools.partial(measure_matmul, threads=1), 0)]
    for length, head_dim, threads in itertools.product(LENGTHS, HEAD_DIMS, THREADS):
        for (case, changes), mode in itertools.product(PLAIN.items(), MODES):
            problem = Problem(**{**SIZES, "length": length, "head_dim": head_dim, **changes})
            priority = 3 if length > 2048 else 1
            found.append(attention_cell(case, problem, mode, threads, (OWN, SDPA), priority))
    for length, (case, changes), mode in itertools.product(FEATURE_LENGTHS, FEATURES.items(), MODES):
        problem = Problem(**{**SIZES, "length": length, **changes})
        held_against_all = length == FEATURE_LENGTH
        providers = ANY_PEER if held_against_all else (OWN, SDPA)
        found.append(attention_cell(case, problem, mode, 1, providers, 2 if held_against_all else 3))
    layers = [
        *itertools.product(("MultiheadAttention", "TransformerEncoderLayer"), (("train", False), ("eval", True))),
        ("TransformerEncoder", ("eval", True)),
    ]
    for length, (kind, (mode, padded)) in itertools.product((64, 256, 1024), layers):
        run = functools.partial(
            measure_layer, suite="cpu", kind=kind, length=length, mode=mode, padded=padded,
            providers=("fastattn", "torch"), dtype="fp32", tokens=1024, width=256,
            dropout=0.1 if mode == "train" else 0.0,
        )  # fmt: skip
        found.append(Cell("cpu", f"{kind} L={length} {mode}{', padded' if padded else ''}", run, 2))
    for heads, batch, dtype in itertools.product(CACHE_HEADS, (1, 8), ("fp32", "bf16")):
        run = functools.partial(measure_decode, step=step_of(batch, dtype, *heads))
        found.append(Cell("cpu", f"decode, {heads[0]}/{heads[1]} heads, batch {batch}, {dtype}", run, 2))
    for heads, batch, kind in itertools.product(CACHE_HEADS, (1, 8), QUANTISED):
        run = functools.partial(measure_quantised, step=step_of(batch, "bf16", *heads, itemsize=1), kind=kind)
        found.append(Cell("cpu", f"decode, {heads[0]}/{heads[1]} heads, batch {batch}, {kind} cache", run, 2))
    return found


def step_of(
    batch: int, dtype: str, q_heads: int, kv_heads: int, head_dim: int, itemsize: int | None = None
) -> decode.Step:  # fmt: skip
    """One step over a cache of CACHE_BYTES; ``itemsize`` if its numbers do not have ``dtype``."""
    length = CACHE_BYTES // (2 * batch * kv_heads * head_dim * (itemsize or DTYPES[dtype].itemsize))
    return decode.Step(batch, q_heads, kv_heads, length, 0, head_dim, dtype)


def measure_decode(bench: Bench, step: decode.Step) -> None:
    """Time a step, and reading as many bytes."""
    actual = decode.Step(2, 4, 2, 64, 0, 16, "fp32") if isinstance(bench.device, DryRun) else step
    x = decode.make_inputs(actual, "cpu")
    call = decode.prepare_fastattn(actual, x).call
    source = torch.ones(actual.bytes() // 4)
    with torch.no_grad():
        decode.check(x, call())
        for name, timing in bench.time({OWN: lambda _: call(), READ: lambda _: source.sum()}).items():
            bench.record(
                "cpu", step.key() | {"provider": name, "mbytes": step.bytes() * 1e-6}, timing, tokens=step.batch
            )


def measure_quantised(bench: Bench, step: decode.Step, kind: str) -> None:
    """Time a step over a quantised cache, with a scale for each token and head, and one over a bfloat16 cache."""
    actual = decode.Step(2, 4, 2, 64, 0, 16, "bf16") if isinstance(bench.device, DryRun) else step
    x = decode.make_inputs(actual, "cpu")
    (k, k_scale), (v, v_scale) = (quantise(cache, None, QUANTISED[kind]) for cache in (x.k_cache, x.v_cache))
    scales: dict[str, Any] = {"k_scale": k_scale[..., 0].contiguous(), "v_scale": v_scale[..., 0].contiguous()}
    one: dict[str, Any] = {name: scale[:1] for name, scale in scales.items()}
    check_kvcache(x.q[:1], k[:1], v[:1], cache_lens=actual.length, backend="cpu", **one)
    moved = [x.q, x.q, k, v, *scales.values()]
    source = torch.ones(sum(t.numel() * t.element_size() for t in moved) // 4)
    calls = {
        OWN: functools.partial(fastattn.attention_with_kvcache, x.q, k, v, cache_lens=x.lens, **scales),
        UNQUANTISED: decode.prepare_fastattn(actual, x).call,
        READ: source.sum,
    }
    key = step.key() | {"case": f"{step.case}, {kind} cache", "mbytes": source.numel() * 4e-6}
    with torch.no_grad():
        timings = bench.time({name: lambda _, call=call: call() for name, call in calls.items()})
    for name, timing in timings.items():
        bench.record("cpu", key | {"provider": name}, timing, tokens=step.batch)


def attention_cell(
    case: str, problem: Problem, mode: str, threads: int, providers: tuple[str, ...], priority: int
) -> Cell:  # fmt: skip
    run = functools.partial(
        measure_threads, case=case, problem=problem, mode=mode, threads=threads, providers=providers
    )
    label = f"{case} L={problem.length} D={problem.head_dim} {mode}, {counted(threads)}"
    return Cell("cpu", label, run, priority)


def counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def measure_threads(
    bench: Bench, case: str, problem: Problem, mode: str, threads: int, providers: tuple[str, ...]
) -> None:  # fmt: skip
    """`measure` on this many threads, which become part of the case."""
    with on_threads(bench, threads):
        measure(bench, "cpu", f"{case}, {counted(threads)}", problem, mode, providers)


def measure_matmul(bench: Bench, threads: int) -> None:
    """The rate of a matrix product on this many threads: the upper limit in the chart of rates."""
    with on_threads(bench, threads):
        bench.measure_matmul("cpu", f", {counted(threads)}")


@contextlib.contextmanager
def on_threads(bench: Bench, threads: int) -> Iterator[None]:
    before, stamp, ceiling = torch.get_num_threads(), bench.stamp, bench.matmul_tflops
    torch.set_num_threads(threads)
    bench.stamp = stamp | {"threads": str(threads)}
    bench.matmul_tflops = {}  # it was measured on another number of threads
    try:
        yield
    finally:
        torch.set_num_threads(before)
        bench.stamp, bench.matmul_tflops = stamp, ceiling
