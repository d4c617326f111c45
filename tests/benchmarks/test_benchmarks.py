"""The benchmarks without a GPU: what they compute, keep and print; dry runs, and stand-ins for devices and peers."""

import contextlib
import csv
import dataclasses
import faulthandler
import importlib.util
import itertools
import shutil
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from benchmarks import (
    attention,
    bench_cpu,
    bench_features,
    bench_forward,
    bench_layers,
    bench_overhead,
    compare,
    device,
    flops,
    gpu_check,
    gpu_tune,
    models,
    parity,
    peers,
    plot,
    problems,
    provenance,
    readme,
    results,
    runner,
    status,
    summary,
    test_host,
)
from benchmarks.device import CudaDevice, Device, DryRun
from benchmarks.problems import Problem
from benchmarks.runner import Bench, Cell

ROOT = Path(__file__).resolve().parents[2]
SMALL = Problem(2, 4, 4, 24, 16, "fp32")


# FLOPs


def test_flops_are_those_of_the_two_products():
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)) @ v
    assert flops.attention_flops(2, 3, 5, 7, 8, 4) == counter.get_total_flops()


def test_flop_conventions():
    full = flops.attention_flops(4, 16, 2048, 2048, 128)
    assert full == 4 * 4 * 16 * 2048 * 2048 * 128
    assert flops.attention_flops(4, 16, 2048, 2048, 128, causal=True) == full / 2 * (1 + 1 / 2048)
    assert flops.attention_flops(1, 1, 100, 100, 8, causal=True, window=9) == 4 * 8 * (100 * 10 - 45)
    assert flops.attention_flops(4, 16, 2048, 2048, 128, mode="backward") == 2.5 * full
    assert flops.attention_flops(4, 16, 2048, 2048, 128, mode="forward+backward") == 3.5 * full


# Timing


def test_percentiles_are_those_of_torch():
    samples = torch.rand(37).tolist()
    timing = device.summarize(samples)
    expected = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    torch.testing.assert_close(torch.tensor(timing[:3], dtype=torch.float64), expected)
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


def test_cuda_timing_flushes_the_cache_before_each_call(cuda_device):
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


# Results and provenance


def row(provider="fastattn", p50="1", **columns):
    base = {
        "case": "grid", "mode": "forward", "provider": provider, "dtype": "bf16", "batch": "4", "q_heads": "16",
        "kv_heads": "16", "q_len": "4096", "kv_len": "4096", "head_dim": "128", "causal": "no", "p50_ms": p50,
        "p20_ms": p50, "p80_ms": p50, "min_ms": p50, "tflops": str(500 / float(p50)) if p50 else "",
        "gpu": "NVIDIA H100", "digest": "new", "date": "2026-12-01T00:00:00Z", "commit": "abc", "dirty": "no",
        "torch": "2.11.0", "triton": "3.6.0",
    }  # fmt: skip
    return base | columns


def test_upsert_replaces_by_key_and_keeps_order(tmp_path):
    path = tmp_path / "gpu" / "forward.csv"
    results.upsert(path, [row(p50="1"), row("sdpa-flash", p50="2")])
    results.upsert(path, [row(p50="3"), row(p50="4", q_len="512")])
    assert [(r["provider"], r["q_len"], r["p50_ms"]) for r in results.read(path)] == [
        ("fastattn", "4096", "3"), ("sdpa-flash", "4096", "2"), ("fastattn", "512", "4"),
    ]  # fmt: skip
    assert not list(path.parent.glob("*.tmp"))
    with pytest.raises(ValueError, match="no column speed"):
        results.upsert(path, [row(speed="1")])


def test_rows_of_an_older_layout_are_read(tmp_path):
    path = tmp_path / "forward.csv"
    path.write_text("case,provider,p50_ms\ngrid,fastattn,1\n")
    assert results.read(path)[0]["digest"] == ""


def test_merge_brings_results_home(tmp_path):
    results.upsert(tmp_path / "out" / "gpu" / "forward.csv", [row(p50="2")])
    results.upsert(tmp_path / "out" / "dry-run" / "forward.csv", [row(p50="3")])
    results.upsert(tmp_path / "home" / "gpu" / "forward.csv", [row(p50="1"), row("flex", p50="5")])
    results.main([str(tmp_path / "out"), "--into", str(tmp_path / "home")])
    assert [r["p50_ms"] for r in results.read(tmp_path / "home" / "gpu" / "forward.csv")] == ["2", "5"]
    assert not (tmp_path / "home" / "dry-run").exists()


def test_provenance_has_every_field():
    stamp = provenance.provenance(Device())
    assert tuple(stamp) == provenance.FIELDS and all(stamp.values())
    assert stamp["torch"] == torch.__version__ and len(stamp["digest"]) == 12


def test_digest_follows_the_kernel_sources(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1\n")
    first = provenance.digest(tmp_path)
    (tmp_path / "other.py").write_text("x = 1\n")
    assert provenance.digest(tmp_path) == first
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("int x;\n")
    second = provenance.digest(tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert len({first, second, provenance.digest(tmp_path)}) == 3


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_revision_with_and_without_git(tmp_path, monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    assert provenance.revision(tmp_path) == ("unknown", "unknown")
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123-dirty")
    assert provenance.revision(tmp_path) == ("abc123", "yes")
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    assert provenance.revision(tmp_path) == ("abc123", "no")
    git(tmp_path, "init", "--quiet")
    assert provenance.revision(tmp_path) == ("abc123", "no")  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert provenance.revision(tmp_path) == (head, "no")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.csv").write_text("1")
    assert provenance.revision(tmp_path) == (head, "no")
    (tmp_path / "a.py").write_text("2")
    assert provenance.revision(tmp_path) == (head, "yes")


# Peers: each computes what it should, or says that it cannot

FEATURES = {
    "full": {}, "causal": {"causal": True}, "GQA": {"kv_heads": 2, "causal": True}, "random mask": {"mask": "random"},
    "padding": {"mask": "padding"}, "causal, padding": {"mask": "padding", "causal": True},
    "bias": {"bias": "constant"}, "learned bias": {"bias": "learned"},
    "causal, learned bias": {"bias": "learned", "causal": True}, "mask, bias": {"mask": "random", "bias": "constant"},
    "window": {"window": 5}, "causal, window": {"window": 5, "causal": True}, "alibi": {"alibi": True},
    "causal, alibi, bias": {"alibi": True, "bias": "constant", "causal": True},
    "documents": {"pattern": "documents", "causal": True}, "prefix": {"pattern": "prefix"},
    "strided": {"pattern": "strided", "causal": True, "length": 300, "batch": 1}, "block mask": {"pattern": "causal"},
}  # fmt: skip
MORE = {"softcap": {"softcap": 1.0}, "sinks": {"sinks": True}, "softcap, alibi": {"softcap": 1.0, "alibi": True}}


def prepare(name, problem, grad=False):
    inputs = problems.make_inputs(problem, Device(), seed=0, grad=grad)
    return inputs, peers.PEERS[name].prepare(problem, inputs)


def gradients(prepared):
    out = prepared.call()
    return torch.autograd.grad(out, prepared.leaves, prepared.dout)


@pytest.mark.parametrize("name", ["fastattn", "sdpa-math", "flex"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_adapter_computes_the_feature(name, feature):
    problem = dataclasses.replace(SMALL, **FEATURES[feature])
    inputs, prepared = prepare(name, problem)
    problems.check_output(prepared.to_heads(prepared.call()), problem, inputs, own=name == "fastattn")


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_the_documents_of_a_block_mask(batch):
    problem = dataclasses.replace(SMALL, pattern="documents", causal=True, batch=batch, kv_heads=2)
    assert len(problems.document_lengths(SMALL.length)) > 1 and sum(problems.document_lengths(1000)) == 1000
    packed = dataclasses.replace(problem, packed=True)
    inputs, prepared = prepare("fastattn", packed, grad=True)
    problems.check_output(prepared.to_heads(prepared.call()), packed, inputs, own=True)
    masked = gradients(prepare("fastattn", problem, grad=True)[1])
    for ours, theirs in zip(gradients(prepared), masked, strict=True):
        torch.testing.assert_close(ours.unflatten(0, (batch, -1)).transpose(1, 2), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", problems.PATTERNS)
def test_pairs_of_a_pattern_are_those_of_its_mask(pattern):
    problem = Problem(1, 1, 1, 700, 16, pattern=pattern, causal=pattern == "documents")
    inputs = problems.make_inputs(problem, Device(), 0, False)
    assert problem.pattern_pairs() == int(inputs.block_mask.to_dense().sum()) < 700 * 700
    assert problem.flops("forward") == 4.0 * 16 * problem.pattern_pairs()


@pytest.mark.parametrize("name", ["fastattn", "flex"])
@pytest.mark.parametrize("feature", MORE)
def test_adapter_computes_what_sdpa_has_not(name, feature):
    problem = dataclasses.replace(SMALL, causal=True, **MORE[feature])
    inputs, prepared = prepare(name, problem)
    problems.check_output(prepared.to_heads(prepared.call()), problem, inputs, own=name == "fastattn")
    with pytest.raises(peers.Cannot, match=r"no s(oftcap|inks)"):
        prepare("sdpa-math", problem)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "mask, bias"])
def test_gradients_of_a_peer_are_those_of_fastattn(feature):
    problem = dataclasses.replace(SMALL, **FEATURES[feature])
    own, math = (gradients(prepare(name, problem, grad=True)[1]) for name in ("fastattn", "sdpa-math"))
    assert len(own) == (4 if problem.bias == "learned" else 3)
    torch.testing.assert_close(own, math, rtol=1e-4, atol=1e-5)


def eager(q, k, v, causal, window_size=(-1, -1), **more):
    """(B, L, H, D) attention, as the libraries that lay tensors out like this compute it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window_size[0] >= 0 or more:
        sides = [None if side < 0 else side for side in window_size]
        return fastattn.attention(q, k, v, causal=causal, window=tuple(sides), **more).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def fake_module(monkeypatch, name, **functions):
    """An importable module of that name; parents are made as needed."""
    import importlib.machinery

    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__spec__ = importlib.machinery.ModuleSpec(path, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in functions.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def agrees(monkeypatch, name, problem, backward=True):
    """The adapter gives fastattn's output and gradients in the end."""
    assert peers.PEERS[name].missing("cuda") == ""
    inputs, prepared = prepare(name, problem, grad=backward)
    problems.check_output(prepared.to_heads(prepared.call()), problem, inputs, own=False)
    if backward:
        own = gradients(prepare("fastattn", problem, grad=True)[1])
        theirs = [g if g.ndim == 4 else g.unflatten(0, (problem.batch, -1)) for g in gradients(prepared)]
        torch.testing.assert_close([g.transpose(1, 2) for g in theirs[:3]], list(own[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "name, module, result",
    [
        ("flash-attn-2", "flash_attn", lambda out: out),
        ("flash-attn-3", "flash_attn_interface", lambda out: (out, None)),
        ("flash-attn-4", "flash_attn.cute", lambda out: (out, None)),
    ],
)
def test_flash_attn_adapters(name, module, result, causal, monkeypatch):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return result(eager(q, k, v, causal))

    fake_module(monkeypatch, module, flash_attn_func=flash_attn_func)
    agrees(monkeypatch, name, dataclasses.replace(SMALL, kv_heads=2, causal=causal))
    with pytest.raises(peers.Cannot, match="no mask"):
        prepare(name, dataclasses.replace(SMALL, mask="random"))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        return result(fastattn.attention_varlen(q, k, v, causal=causal, **bounds))

    fake_module(monkeypatch, module, flash_attn_varlen_func=flash_attn_varlen_func)
    agrees(monkeypatch, name, dataclasses.replace(SMALL, kv_heads=2, causal=causal, pattern="documents"))
    with pytest.raises(peers.Cannot, match="documents alone"):
        prepare(name, dataclasses.replace(SMALL, pattern="prefix"))


def test_flash_attn_2_has_more(monkeypatch):
    def flash_attn_func(q, k, v, causal, window_size, softcap, alibi_slopes):
        return eager(q, k, v, causal, window_size, softcap=softcap, alibi_slopes=alibi_slopes)

    fake_module(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    problem = dataclasses.replace(SMALL, causal=True, window=5, softcap=1.0, alibi=True)
    agrees(monkeypatch, "flash-attn-2", problem)
    with pytest.raises(peers.Cannot, match="no alibi"):
        prepare("flash-attn-3", problem)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 5)])
def test_varlen_adapter(old, causal, window, monkeypatch):
    def packed(q, k, v, starts_q, starts_k, max_q, max_k, causal, window_size=(-1, -1)):
        assert starts_q.dtype == starts_k.dtype == torch.int32 and starts_q.tolist() == [0, 24, 48]
        q, k, v = (x.unflatten(0, (2, -1)) for x in (q, k, v))
        return eager(q, k, v, causal, window_size).flatten(0, 1)

    def new_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        return packed(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size[1] == 0, window_size)

    def old_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return packed(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    fake = old_varlen_attn if old else new_varlen_attn
    fake_module(monkeypatch, "torch.nn.attention.varlen", varlen_attn=fake)
    problem = dataclasses.replace(SMALL, kv_heads=4 if old else 2, causal=causal, window=window)
    if old and window:
        with pytest.raises(peers.Cannot, match="no window in this torch"):
            prepare("varlen", problem)
    else:
        agrees(monkeypatch, "varlen", problem)


@pytest.mark.parametrize("feature", ["full", "causal", "bias", "learned bias"])
def test_xformers_adapter(feature, monkeypatch):
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0):
        if isinstance(attn_bias, LowerTriangularMask):
            return eager(q, k, v, True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_bias).transpose(1, 2)

    functions = {"LowerTriangularMask": LowerTriangularMask, "memory_efficient_attention": memory_efficient_attention}
    fake_module(monkeypatch, "xformers.ops", **functions)
    agrees(monkeypatch, "xformers", dataclasses.replace(SMALL, **FEATURES[feature]))


@pytest.mark.parametrize("causal", [False, True])
def test_flashinfer_adapter(causal, monkeypatch):
    class BatchPrefillWithRaggedKVCacheWrapper:
        def __init__(self, workspace, kv_layout):
            assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

        def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, causal, q_data_type):
            assert (num_qo_heads, num_kv_heads, head_dim_qk, q_data_type) == (4, 2, 16, torch.float32)
            self.batch, self.causal = len(qo_indptr) - 1, causal

        def run(self, q, k, v):
            q, k, v = (x.unflatten(0, (self.batch, -1)) for x in (q, k, v))
            return eager(q, k, v, self.causal).flatten(0, 1)

    wrapper = BatchPrefillWithRaggedKVCacheWrapper
    fake_module(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=wrapper)
    problem = dataclasses.replace(SMALL, kv_heads=2, causal=causal)
    agrees(monkeypatch, "flashinfer", problem, backward=False)
    with pytest.raises(peers.Cannot, match="no backward"):
        prepare("flashinfer", problem, grad=True)


def test_compiled_peers_never_fall_back_to_eager_code():
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    # Not by monkeypatch: it undoes a change by deletion where a module computes its attributes.
    limits = {name: getattr(dynamo, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with dynamo.patch(limits), functorch.patch(donated_buffer=functorch.donated_buffer):
        assert callable(peers.compiled(lambda x: x)) and callable(peers.compiled_flex("cuda"))
        assert all(getattr(dynamo, name) > 1000 for name in limits) and not functorch.donated_buffer
    assert limits == {name: getattr(dynamo, name) for name in limits}


def test_a_peer_that_is_missing_says_why(monkeypatch):
    assert peers.PEERS["sdpa-cudnn"].missing("cpu") == "needs a CUDA device"
    assert peers.PEERS["flash-attn-3"].missing("cuda") == "flash_attn_interface is not installed"
    fake_module(monkeypatch, "flash_attn")
    assert peers.PEERS["flash-attn-2"].missing("cuda") == "flash_attn has no flash_attn_func"
    assert peers.PEERS["flash-attn-4"].missing("cuda") == "flash_attn.cute is not installed"


def test_scores_too_large_for_the_device_are_refused():
    problem = dataclasses.replace(SMALL, length=64)
    inputs = problems.make_inputs(problem, Device(), 0, False)._replace(total_memory=1e5)
    with pytest.raises(peers.Cannot, match="its scores need"):
        peers.PEERS["sdpa-math"].prepare(problem, inputs)


def test_a_wrong_function_is_found():
    problem = dataclasses.replace(SMALL, causal=True)
    inputs = problems.make_inputs(problem, Device(), 0, False)
    wrong = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    with pytest.raises(problems.WrongResult, match="computes something else"):
        problems.check_output(wrong, problem, inputs, own=False)
    right = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True)
    problems.check_output(right, problem, inputs, own=True)
    with pytest.raises(problems.WrongResult, match="exceeds"):
        problems.check_output(right + 1e-4, problem, inputs, own=True)
    with pytest.raises(problems.WrongResult, match="not finite"):
        problems.check_output(right * torch.nan, dataclasses.replace(problem, dropout_p=0.1), inputs, own=True)


def test_backward_calls_can_be_repeated():
    sets = [problems.make_inputs(SMALL, Device(), seed, True) for seed in range(2)]
    call = attention.build_call("fastattn", SMALL, sets, "backward")
    for repeat in range(3):
        call(repeat)


# Runs


def dry_run(tmp_path, suite, *arguments, dev=None):
    code = runner.main([*arguments, "--dry-run", "--output", str(tmp_path)], suites=(suite,), device=dev)
    assert code == 0
    return results.read(tmp_path / "dry-run" / f"{suite}.csv")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A folder with rows of every suite."""
    folder = tmp_path_factory.mktemp("dry")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(parity, "gate", lambda device: [])  # once is enough: test_red_parity_records_nothing
        for suite, match in (
            ("forward", "L=1024"), ("backward", "L=1024"), ("features", "L=1024"), ("features", "L=16384"),
            ("layers", "L=1024"), ("layers", "training step"), ("memory", "L=1024"), ("memory", "L=2048"),
            ("overhead", ""), ("cpu", "L=128"), ("decode", "L=1024"), ("generation", "64 tokens"),
        ):  # fmt: skip
            dry_run(folder, suite, "--match", match)
    return folder / "dry-run"


TRANSFORMERS = importlib.util.find_spec("transformers") is not None
EXPECTED = {
    "forward": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "backward": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "features": {"fastattn", "sdpa-flash", "sdpa-math", "flex", "torch"},
    "decode": {"fastattn", "sdpa", "flex", "torch"},
    "layers": {"fastattn", "torch", "torch-compile", "sdpa", "sdpa-flash"},
    "generation": {"fastattn", "torch"} | ({"transformers", "transformers-static"} if TRANSFORMERS else set()),
    "memory": {"fastattn", "sdpa-flash", "sdpa-math", "torch"},
    "overhead": {"fastattn", "sdpa", "torch"},
    "cpu": {"fastattn", "sdpa", "torch"},
}


@pytest.mark.parametrize("suite", runner.SUITES)
def test_every_path_of_a_suite_runs(suite, dry):
    rows = results.read(dry / f"{suite}.csv")
    assert {r["provider"] for r in rows} == EXPECTED[suite]
    for r in rows:
        assert r["gpu"] == "dry run" and r["digest"] == provenance.digest() and r["date"]
        assert "something else" not in r["note"], r
        if r["provider"] == "fastattn":
            assert (r["p50_ms"] or r["peak_mib"]) and "cannot" not in r["note"], r
    own = {r["case"] for r in rows if r["provider"] == "fastattn"}
    if suite == "features":
        assert own == {*bench_features.FEATURES, *bench_features.LONG_FEATURES}
    if suite == "decode":
        assert all(float(r["mbytes"]) > 0 and float(r["of_copy"]) > 0 for r in rows if r["provider"] == "fastattn")
    if suite == "overhead":
        assert {"sdpa", "attention, reference backend", "first forward"} <= own


def test_the_grid_is_the_fields():
    cells = {(c.suite, c.label) for c in runner.cells_of(["forward", "backward"], CudaDevice())}
    plain = [label for suite, label in cells if suite == "forward" and "other" not in label]
    assert len(plain) == 6 * 3 * 2 * 2
    for cell in bench_forward.cells():
        problem = cell.run.keywords["problem"] if "problem" in cell.run.keywords else cell.run.func.keywords["problem"]
        assert problem.batch * problem.length == 16384 and problem.q_heads * problem.head_dim == 2048


def test_suites_by_device():
    assert {c.suite for c in runner.cells_of(runner.SUITES, Device())} == {"generation", "overhead", "cpu"}
    assert {c.suite for c in runner.cells_of(runner.SUITES, CudaDevice())} == set(runner.SUITES) - {"cpu"}
    priorities = [c.priority for c in runner.cells_of(runner.SUITES, CudaDevice())]
    assert priorities == sorted(priorities) and priorities[0] == 0
    decode = [c.label for c in runner.cells_of(["decode"], CudaDevice())]
    assert all(label.startswith("32/8 heads") and label.endswith(("L=8192", "L=32768")) for label in decode[:6])
    features = [c.label for c in runner.cells_of(["features"], CudaDevice())]
    assert features[0] == "causal L=16384 forward" and "L=1024" in features[-1]


def test_a_budget_keeps_the_most_important_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])
    minutes = (runner.RESERVE + 5.5) / 60  # the matrix products take two seconds of it, each cell one
    rows = dry_run(tmp_path, "forward", "--minutes", str(minutes), dev=DryRun(step=1.0))
    own = [r for r in rows if r["provider"] == "fastattn"]
    assert len(own) == 4
    assert all(
        (r["dtype"], r["q_len"], r["head_dim"]) in (("bf16", "4096", "128"), ("bf16", "4096", "64")) for r in own
    )
    assert "4 of 90 cells measured" in capsys.readouterr().out


def test_red_parity_records_nothing(tmp_path, capsys, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr("fastattn.testing.attention", lambda *a, **o: tuple(1.01 * t for t in right(*a, **o)))
    assert runner.main(["--dry-run", "--output", str(tmp_path)], suites=("forward",)) == 1
    assert not list(tmp_path.rglob("*.csv"))
    out = capsys.readouterr().out
    assert "parity red: plain, fp32, head dim 64: AssertionError: out:" in out and "nothing is recorded" in out


def test_a_failing_cell_costs_only_itself_and_a_lost_device_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])

    def fail(text):
        def run(bench):
            raise RuntimeError(text)

        return run

    def good(bench):
        bench.record("forward", {"case": "good", "provider": "fastattn", "mode": "forward", "dtype": "fp32"})

    def run(*cells):
        monkeypatch.setattr(runner, "cells_of", lambda suites, device: list(cells))
        return runner.main(["--dry-run", "--output", str(tmp_path)], suites=("forward",))

    assert run(Cell("forward", "a", fail("a bug")), Cell("forward", "b", good)) == 0
    assert "forward a: RuntimeError: a bug" in capsys.readouterr().out
    assert "good" in {r["case"] for r in results.read(tmp_path / "dry-run" / "forward.csv")}
    lost = fail("CUDA error: an illegal memory access was encountered")
    assert run(Cell("forward", "a", lost), Cell("forward", "b", fail("never reached"))) == 1
    out = capsys.readouterr().out
    assert "stopped: CUDA error: an illegal memory access" in out and "never reached" not in out


def test_what_cannot_run_is_a_row_with_the_reason(tmp_path):
    bench = Bench(DryRun(), tmp_path, stamp=provenance.provenance(DryRun()))
    attention.measure(bench, "features", "dropout", dataclasses.replace(SMALL, dropout_p=0.1), "forward", ["flex"])
    (cannot,) = results.read(tmp_path / "dry-run" / "features.csv")
    assert cannot["note"] == "cannot: no dropout" and cannot["p50_ms"] == ""
    bench.refused("features", {"provider": "a"}, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"))
    assert results.read(tmp_path / "dry-run" / "features.csv")[-1]["note"] == "cannot: out of memory"


def test_options_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "gate", lambda device: [])
    assert runner.main(["--list", "--match", "D=64"], suites=("forward",)) == 0  # without a GPU: nothing to list
    assert capsys.readouterr().out == ""
    assert runner.main(["--list", "--match", "D=64", "--dry-run"], suites=("forward",)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 30
    if not torch.cuda.is_available():
        assert runner.main([], suites=("forward",)) == 0
        assert "nothing to measure on 'cpu'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["no-such-suite"])
    monkeypatch.setenv("OUT", str(tmp_path))
    match = ["--match", "bf16 D=64 L=512 full", "--providers", "fastattn", "--note", "shared machine"]
    assert runner.main([*match, "--dry-run"], suites=("forward",)) == 0
    rows = results.read(tmp_path / "dry-run" / "forward.csv")
    assert {r["provider"] for r in rows} == {"fastattn", "torch"}
    assert rows[-1]["note"] == "backend torch; shared machine"


class PretendedGpu(DryRun):
    """What `main` takes for a GPU; nothing may be put on it."""

    torch_device = "cuda"


@pytest.mark.parametrize("module", [runner, gpu_check, gpu_tune])
def test_a_gpu_run_compiles_ahead_and_guards_against_hangs(module, tmp_path, monkeypatch, capsys):
    shares, guards = [], []
    monkeypatch.setattr(runner, "run_shares", lambda words, jobs, limit: shares.append((words, jobs, limit)) or 1.0)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: guards.append(seconds))
    monkeypatch.setattr(parity, "gate", lambda device: [])
    monkeypatch.setattr(parity, "matrix", list)
    monkeypatch.setattr(Bench, "measure_matmul", lambda self, suite: None)
    cell = Cell("forward", "a", lambda bench: bench.record("forward", {"case": "a", "provider": "fastattn"}))
    monkeypatch.setattr(runner, "cells_of", lambda suites, device: [cell])
    monkeypatch.setattr(gpu_tune, "groups", list)
    monkeypatch.setattr(gpu_tune, "architecture", lambda device: "sm_90")
    arguments = ["--minutes", "6", "--output", str(tmp_path), "--compile-jobs", "3"]
    arguments += ["--steps", "parity"] if module is gpu_check else []
    assert module.main(arguments, device=PretendedGpu()) == 0
    ((words, jobs, limit),) = shares
    assert words[0].startswith("benchmarks") and jobs == 3 and 60 < limit < 180
    assert guards == [420.0] and "compiled ahead in 1 s" in capsys.readouterr().out


def test_a_dry_run_never_writes_among_real_results(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    arguments = types.SimpleNamespace(output=None)
    assert not runner.output(arguments, DryRun()).is_relative_to(results.HERE)
    assert runner.output(arguments, Device()) == results.HERE


def test_compiling_ahead_deals_every_task_once(monkeypatch):
    tasks = list(range(10))
    dealt = [index for i in range(3) for index in runner.share(f"{i}/3", tasks)]
    assert sorted(dealt) == tasks and runner.share("0/3", tasks)[0] == 0
    ran = []
    monkeypatch.setattr(parity, "gate", lambda device: [])
    cells = [Cell("forward", str(i), lambda bench, i=i: ran.append(i), compiles=key) for i, key in enumerate("aab")]
    cells += [Cell("forward", "fails", lambda bench: 1 / 0, compiles="c"), Cell("forward", "none", ran.append)]
    monkeypatch.setattr(runner, "cells_of", lambda suites, device: cells)
    assert runner.main(["--compile-share", "0/1"], suites=("forward",)) == 0
    assert ran == [0, 2]


def test_compiling_processes_are_ended_at_the_limit(monkeypatch):
    started = time.monotonic()
    runner.run_shares(["benchmarks", "overhead"], jobs=2, limit=0.2)
    assert time.monotonic() - started < 10


def test_module_runs():
    command = [sys.executable, "-m", "benchmarks", "overhead", "--list"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 overhead  sdpa\n" in result.stdout


# Suites of their own kind


@pytest.mark.parametrize("config", [models.TINY, dataclasses.replace(models.TINY, llama=False)])
def test_models_compute_the_same_with_attention_swapped(config):
    tokens = torch.randint(config.vocabulary, (2, config.length + 1))
    losses = []
    for provider in models.ATTEND:
        torch.manual_seed(0)
        losses.append(models.Decoder(config, models.ATTEND[provider])(tokens))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_a_training_step_changes_the_weights():
    step = models.training_step(models.TINY, "fastattn", "cpu", torch.float32)
    optimizer = step.__closure__[[*step.__code__.co_freevars].index("optimizer")].cell_contents
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    step(0)
    assert all(not torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("kind", bench_layers.LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_compared_are_the_same_function(kind, padded):
    torch.manual_seed(0)
    layer = bench_layers.make_layer(kind, 64)
    x = torch.randn(2, 10, 64)
    padding = torch.arange(10) >= torch.tensor([[10], [6]]) if padded else None
    causal = torch.nn.Transformer.generate_square_subsequent_mask(10)
    expected = bench_layers.apply(kind, layer, x, padding, causal)
    report = fastattn.convert(layer)
    assert report.converted
    torch.testing.assert_close(bench_layers.apply(kind, layer, x, padding, causal), expected)


def test_overhead_calls_are_the_same_function():
    for case, calls in bench_overhead.host_calls("cpu").items():
        if "sdpa" in calls:
            torch.testing.assert_close(calls["fastattn"](), calls["sdpa"](), msg=case)


def test_pytest_benchmark_cases_run():
    def benchmark(call):
        call()

    for case, mode in itertools.product(bench_cpu.CASES, ("forward", "backward")):
        test_host.test_cpu(benchmark, case, mode, "fastattn")
    for case in bench_overhead.host_calls("cpu"):
        test_host.test_overhead(benchmark, case, "fastattn")


@pytest.mark.slow
def test_first_call_of_a_fresh_process(tmp_path):
    times = bench_overhead.first_call(str(tmp_path))
    assert times.keys() == {"import torch", "import fastattn", "first forward", "first backward", "second forward"}
    assert times["second forward"] < times["import torch"]


# Summaries, charts, texts


def test_ratios_and_means():
    rows = [
        row(p50="2"), row("sdpa-flash", "3"), row("sdpa-cudnn", "1"),
        row(p50="2", q_len="512"), row("sdpa-flash", "12", q_len="512"), row("sdpa-cudnn", "", q_len="512"),
    ]  # fmt: skip
    short, long = summary.cells(rows)
    assert (short.length, short.best_peer(), short.ratio()) == (512, ("sdpa-flash", 12.0), 6.0)
    assert (long.best_peer(), long.ratio(), long.ratio("sdpa-flash")) == (("sdpa-cudnn", 1.0), 0.5, 1.5)
    means = summary.mean_ratios(rows)
    assert means["sdpa-flash"] == (pytest.approx(3.0), 2) and means["sdpa-cudnn"] == (pytest.approx(0.5), 1)
    assert means["best peer"] == (pytest.approx(3.0**0.5), 2)
    assert summary.table(rows) == [
        ["", "L=512", "L=4096"],
        ["D=128, full, bf16, forward", "250 (6.00x)", "250 (0.50x)"],
    ]


def test_targets():
    suites = {name: [] for name in ("forward", "backward", "features", "layers")}
    assert {line[2] for line in summary.targets_table(suites)[1:]} == {"not measured yet"}
    suites["forward"] = [row(p50="1"), row("sdpa-flash", "1.3"), row("sdpa-cudnn", "0.7")]
    suites["features"] = [row(case="a"), row("flex", "2", case="a"), row(case="b"), row("flex", "1.4", case="b")]
    base = {"case": "MultiheadAttention, padded", "mode": "eval"}
    suites["layers"] = [row(**base), row("torch", "1.6", **base), row("torch-compile", "0.5", **base)]
    met = {line[0]: line[2:] for line in summary.targets_table(suites)[1:]}
    assert [met[target.text] for target in summary.TARGETS] == [
        ["1.30x", "yes"], ["0.70x", "no"], ["not measured yet", ""],
        ["1.40x", "no"], ["1.60x", "yes"], ["1.60x", "yes"],
    ]  # fmt: skip


def test_short_summary_fits_the_tail_of_an_output(dry):
    rows = [r | {"suite": path.stem} for path in dry.glob("*.csv") for r in results.read(path)]
    text = summary.short(rows)
    for suite in runner.SUITES:
        assert f"{suite}, " in text
    assert "added p50" in text


def test_charts_are_drawn(dry, tmp_path):
    pytest.importorskip("matplotlib")
    made = {path.name: path for path in plot.draw_all(dry, tmp_path)}
    assert {"forward-bf16.png", "backward-bf16.png", "features.png", "memory.png", "layers.png", "cpu.png"} <= set(made)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.values())
    assert "decode-bf16.png" not in made  # only where there are data


def test_tables_of_a_folder(dry):
    text = plot.tables(dry)
    assert "## forward" in text and "| against | geometric mean | cells |" in text


@pytest.fixture
def texts(tmp_path):
    """A repository with one page, and results of one GPU."""
    results.upsert(tmp_path / "results" / "gpu" / "forward.csv", [row(), row("sdpa-flash", "2")])
    (tmp_path / "README.md").write_text(
        "It is <!-- numbers:gpu -->old<!-- end -->\n<!-- numbers:forward -->\n<!-- end -->"
    )
    return tmp_path


def test_numbers_are_written_and_checked(texts):
    data = readme.Data(texts / "results", current="new")
    assert readme.outdated(texts, data) == ["README.md"]
    assert readme.outdated(texts, data, write=True) == ["README.md"]
    text = (texts / "README.md").read_text()
    assert "| D=128, full, bf16, forward | 500 (2.00x) |" in text and "Measured on NVIDIA H100" in text
    assert "older kernels" not in text
    assert readme.outdated(texts, data) == []
    results.upsert(texts / "results" / "gpu" / "forward.csv", [row(p50="0.5")])
    assert readme.outdated(texts, data) == ["README.md"]  # the data changed, the text did not


def test_numbers_of_older_kernels_must_say_so(texts):
    readme.outdated(texts, readme.Data(texts / "results", current="new"), write=True)
    newer = readme.Data(texts / "results", current="newer")
    assert readme.outdated(texts, newer) == ["README.md"]
    readme.outdated(texts, newer, write=True)
    assert "**Some rows are of older kernels than those of this checkout.**" in (texts / "README.md").read_text()
    assert readme.outdated(texts, newer) == []


def test_unknown_numbers_are_an_error(texts):
    (texts / "README.md").write_text("<!-- numbers:speed -->1<!-- end -->")
    with pytest.raises(KeyError, match="numbers:speed: expected one of forward"):
        readme.outdated(texts, readme.Data(texts / "results"))


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_every_block_has_a_text_with_and_without_data(name, dry, tmp_path):
    empty = readme.Data(tmp_path)
    assert readme.NO_GPU in readme.BLOCKS[name](empty) or "not measured yet" in readme.BLOCKS[name](empty)
    for folder in ("gpu", "cpu-x"):
        for path in dry.glob("*.csv"):
            results.upsert(tmp_path / folder / path.name, results.read(path))
    assert readme.BLOCKS[name](readme.Data(tmp_path))


def test_texts_of_this_repository_are_what_the_data_says():
    assert readme.outdated() == [], "python -m benchmarks.readme --write"
    assert status.PAGE.read_text() == status.page(), "python -m benchmarks.status --write"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target, module",
    [("gpu-check", "benchmarks.gpu_check"), ("gpu-bench", "benchmarks all"), ("gpu-tune", "benchmarks.gpu_tune")],
)
def test_make_targets_need_no_environment(target, module):
    command = ["make", "--dry-run", "--no-print-directory", target, "MINUTES=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"python3 -m {module} --minutes 3\n"


# Two commits


@pytest.fixture
def two_commits(tmp_path):
    """A repository whose package differs between two commits."""
    root = tmp_path / "repository"
    (root / "fastattn").mkdir(parents=True)
    git(root, "init", "--quiet")
    for number in (1, 2):
        (root / "fastattn" / "__init__.py").write_text(f"version = {number}\n")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", str(number))
    (root / "fastattn" / "__init__.py").write_text("version = 3\n")
    return root


def test_compare_takes_turns_and_cleans_up(two_commits, monkeypatch, capsys):
    order = []

    def run(tree, output, arguments):
        assert (tree / "benchmarks" / "compare.py").is_file() and not (tree / "benchmarks" / "results").exists()
        version = int((tree / "fastattn" / "__init__.py").read_text().split()[-1])
        order.append(version)
        return [row(p50=str(10.0 / version + len(order)), suite="forward")]

    monkeypatch.setattr(compare, "run", run)
    assert compare.main(["HEAD~1", "HEAD", "--rounds", "2"], root=two_commits) == 0
    assert order == [1, 2, 2, 1]
    out = capsys.readouterr().out
    assert "forward grid forward bf16 D=128 L=4096" in out and "geometric mean of 1" in out
    assert f"{11 / 7:.3f}x" in out
    assert compare.main(["HEAD", ".", "--rounds", "1"], root=two_commits) == 0
    assert order[4:] == [2, 3]
    assert git(two_commits, "worktree", "list").count("\n") == 0


def test_compare_runs_a_suite_in_a_checkout(tmp_path):
    arguments = ["forward", "--dry-run", "--match", "bf16 D=64 L=512 full"]
    with compare.checkout(".") as tree:
        rows = compare.run(tree, tmp_path, arguments)
    assert {r["provider"] for r in rows} == {"fastattn", "torch"} and {r["suite"] for r in rows} == {"forward"}


def test_csv_is_plain(dry):
    with open(dry / "forward.csv", newline="") as file:
        header = next(csv.reader(file))
    assert tuple(header) == results.FIELDS
