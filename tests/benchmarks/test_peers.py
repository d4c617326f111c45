"""Each peer computes what it should, or says that it cannot; stand-ins for packages that are not installed."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks.harness import attention, peers, problems
from benchmarks.harness.device import Device
from benchmarks.harness.problems import Problem
from fastattn.testing import ORDERS, assert_parity
from tests.support.benchmark_runs import SMALL

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


def check_gradients(actual, problem):
    """Hold gradients (B, H, L, D), of a learned bias too, to the rule."""

    def gradients_in(dtype, order):
        x = problems.make_inputs(problem, Device(), seed=0, grad=True)
        learned = [x.bias] if problem.bias == "learned" else []
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v, *learned)]
        changes = {"bias": leaves[3] if learned else None if x.bias is None else x.bias.to(dtype)}
        q, k = (t[..., order] for t in leaves[:2])
        out = fastattn.attention(q, k, leaves[2], **(problems.options(problem, x) | changes), backend="reference")
        return torch.autograd.grad(out, leaves, x.dout.to(dtype))

    orders = [torch.randperm(problem.head_dim) for _ in range(ORDERS)]
    exact, plain = gradients_in(torch.float64, orders[0]), [gradients_in(torch.float32, order) for order in orders]
    for name, ours, expected, *eager in zip(("dq", "dk", "dv", "dbias"), actual, exact, *plain, strict=False):
        assert_parity(ours, expected, eager, name)


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
    check_gradients([x.unflatten(0, (batch, -1)).transpose(1, 2) for x in gradients(prepared)], problem)


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
def test_gradients_of_a_peer_and_of_fastattn(feature):
    problem = dataclasses.replace(SMALL, **FEATURES[feature])
    own, math = (gradients(prepare(name, problem, grad=True)[1]) for name in ("fastattn", "sdpa-math"))
    assert len(own) == (4 if problem.bias == "learned" else 3)
    check_gradients(own, problem)
    check_gradients(math, problem)


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
    """The adapter gives the right output and gradients in the end."""
    assert peers.PEERS[name].missing("cuda") == ""
    inputs, prepared = prepare(name, problem, grad=backward)
    problems.check_output(prepared.to_heads(prepared.call()), problem, inputs, own=False)
    if backward:
        theirs = [g if g.ndim == 4 else g.unflatten(0, (problem.batch, -1)) for g in gradients(prepared)]
        check_gradients([g.transpose(1, 2) for g in theirs[:3]], problem)


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
