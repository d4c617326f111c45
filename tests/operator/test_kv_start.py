"""kv_start: the key of each batch entry from which on they take part; those before it cost nothing."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import BlockMask, attention, attention_varlen, attention_with_kvcache, explain, explain_with_kvcache
from fastattn.backends import reference
from fastattn.backends.cpu import library
from fastattn.testing import assert_parity, check_attention
from tests.operator.test_varlen import packed
from tests.support.attention_cases import BFLOAT, LENGTHS, count_tiles, make_mask, make_qkv
from tests.support.cache_problems import NAN, check, make_problem

STARTS = [0, 37, 64, 70]
"""Of 70 keys: all, within a tile and at its edge, none."""
Q_LEN, KV_LEN = LENGTHS
BATCH = len(STARTS)
BACKENDS = ["triton", "cpu", "reference"]


def inputs(device, **options):
    qkv = make_qkv(device, LENGTHS, heads=(2, 1), batch=BATCH, **options)
    return qkv, torch.tensor(STARTS, device=device, dtype=torch.int32)


def terms(device):
    bias = torch.randn(1, 2, *LENGTHS).to(device).requires_grad_()
    documents = torch.arange(KV_LEN)[None].expand(BATCH, -1) // 40
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (11, 4), "alibi_slopes": torch.randn(BATCH, 2).to(device).requires_grad_()},
        "offsets": {"q_offset": torch.arange(BATCH, device=device) * 9, "sinks": torch.randn(2).to(device),
                    "causal": True},
        "bias": {"bias": bias, "softcap": 3.0, "mask": make_mask(device, (BATCH, 1, 1, KV_LEN))},
        "shared bias": {"bias": torch.randn(KV_LEN).to(device).requires_grad_(), "causal": True},
        "blocks": {"block_mask": BlockMask.from_documents(documents[:, :Q_LEN], documents).to(device)},
        "dropout": {"dropout_p": 0.3, "causal": True},
    }  # fmt: skip


def test_the_definition_is_that_of_a_mask(device):
    """In float64, where the specification computes."""
    (q, k, v), starts = inputs("cpu", dtype=torch.float64)
    mask = (torch.arange(KV_LEN) >= starts[:, None])[:, None, None]
    with_mask = reference.attention(q, k, v, mask, scale=0.3, right=0, q_offset=37)
    for ours, expected in zip(
        reference.attention(q, k, v, kv_start=starts, scale=0.3, right=0, q_offset=37), with_mask, strict=True
    ):
        assert torch.equal(ours, expected)


def test_the_rule_in_half_precision(backend, device):
    qkv, starts = inputs(device, dtype=BFLOAT)
    check_attention(*qkv, backend=backend, causal=True, kv_start=starts)


@pytest.mark.parametrize(("backend", "term"), [
    *((name, term) for name in ("cpu", "reference") for term in terms("cpu")),
    *(("triton", term) for term in ("window", "shared bias", "blocks", "dropout")),
    *(("torch", term) for term in ("plain", "bias without the cap", "top left")),
])  # fmt: skip
def test_the_rule(term, backend, device):
    qkv, starts = inputs(device, dtype=torch.float32)
    torch_alone = {
        "bias without the cap": {"bias": torch.randn(2, 1, KV_LEN), "mask": make_mask(device, LENGTHS)},
        "top left": {"causal": True, "q_offset": 0},
    }
    options = (terms(device) | torch_alone)[term]
    check_attention(*qkv, backend=backend, kv_start=starts, lse_gradient=backend != "torch", **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_before_it_may_be_nan_and_have_no_gradient(backend, device):
    (q, k, v), starts = inputs(device, dtype=torch.float32)
    before = torch.arange(KV_LEN, device=device) < starts[:, None]
    results = []
    for rest in (0.0, torch.nan):
        own = [x.masked_fill(before[:, None, :, None], rest) for x in (k, v)]
        leaves = [x.requires_grad_() for x in (q.clone(), *own)]
        out = attention(*leaves, causal=True, kv_start=starts.long(), backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, poisoned in zip(*results, strict=True):
        assert torch.equal(plain, poisoned)
    for gradient in results[0][2:]:
        assert (gradient.transpose(1, 2)[before] == 0).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_counts_positions_from_it(backend, device):
    """Queries without padding: each entry is causal attention over its own keys alone, positions from 0 on."""
    q, k, v = make_qkv(device, (40, 100), batch=3, dtype=torch.float32)
    starts = torch.tensor([0, 37, 60], device=device)
    options = {"causal": True, "window": (9, 0), "alibi_slopes": torch.tensor([0.5, 0.25], device=device)}
    check_attention(q, k, v, kv_start=starts, q_offset=starts, backend=backend, **options)
    exact = [x.double() for x in (q, k, v)]
    out = attention(*exact, kv_start=starts, q_offset=starts, backend="reference", **options)
    for entry, start in enumerate(starts.tolist()):
        own_q, own_k, own_v = (x[entry : entry + 1] for x in exact)
        alone = attention(own_q, own_k[:, :, start:], own_v[:, :, start:], q_offset=0, backend="reference", **options)
        assert_parity(out[entry : entry + 1], alone, [alone], "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, device):
    """Counted within each sequence, and beside `seqused_k`."""
    qkv, bounds = packed(device, "few", torch.float32, heads=(2, 1))
    count = len(bounds["cu_seqlens_q"]) - 1
    starts = torch.tensor([3, 0, 17, 1][:count], device=device)
    used = (bounds["cu_seqlens_k"].diff() - 2).clamp(min=0)
    check_attention(*qkv, backend=backend, causal=True, kv_start=starts, seqused_k=used, **bounds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_and_vmap(backend, device):
    (q, k, v), starts = inputs(device, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, kv_start=starts, backend=backend)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    before = torch.arange(KV_LEN, device=device) < starts[:, None]
    assert all((x.transpose(1, 2)[before] == 0).all() and x.abs().sum() > 0 for x in second[1:])

    def one(start, dtype=torch.float32, backend=backend):
        own = (x[:2].detach().to(dtype) for x in (q, k, v))
        return attention(*own, kv_start=start, backend=backend)

    pairs = starts.view(2, 2)
    exact = torch.stack([one(pair, torch.float64, "reference") for pair in pairs])
    assert_parity(torch.func.vmap(one)(pairs), exact, torch.stack([one(pair) for pair in pairs]))


def test_tiles_before_it_are_not_visited(monkeypatch):
    """Those of an entry are those of its keys alone."""
    counts = count_tiles(monkeypatch)
    (q, k, v), starts = make_qkv("cpu", (128, 128), batch=1, dtype=torch.float32), torch.tensor([64])
    counts.append(0)
    attention(q, k, v, causal=True, kv_start=starts, backend="triton")
    counts.append(0)
    attention(q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], causal=True, backend="triton")
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")
def test_keys_before_it_are_not_even_packed():
    """2**29 keys: the memory that they would take packed, nobody has."""
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 1, 16).expand(-1, -1, 1 << 29, -1)
    out = attention(q, k, k, kv_start=torch.tensor([(1 << 29) - 5]), causal=True, backend="cpu")
    assert torch.equal(out, attention(q, k[:, :, :5], k[:, :, :5], causal=True, backend="cpu"))


@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_all_starts_without_a_graph_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    qkv, starts = inputs("cpu", dtype=torch.float32)
    counts = []
    for less in (0, 1):
        ours, expected = (f(*qkv, causal=True, kv_start=(starts - less).clamp(min=0)) for f in (compiled, attention))
        assert torch.equal(ours, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    torch._dynamo.reset()


def test_explain_and_errors():
    (q, k, v), starts = inputs("cpu", dtype=torch.float32)
    why = explain(q, k, v, kv_start=starts)
    assert "kv_start per batch entry" in why.call
    for bad, text in (
        (starts[1:], r"kv_start.shape: expected \(B,\) == \(4,\), got \(3,\)"),
        (starts - 1, "kv_start: expected 0 to 70, got -1 for batch entry 0"),
        (starts + 1, "kv_start: expected 0 to 70, got 71 for batch entry 3"),
    ):
        with pytest.raises(ValueError, match=text):
            attention(q, k, v, kv_start=bad)
    for bad, text in ((starts.float(), "kv_start.dtype: expected int32 or int64"), (4, "kv_start: expected an int")):
        with pytest.raises(TypeError, match=text):
            attention(q, k, v, kv_start=bad)
    with pytest.raises(ValueError, match=r"kv_start.shape: expected \(B,\) == \(2,\)"):
        attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), torch.tensor([0, 3, Q_LEN]), kv_start=starts)


# Over a cache

LENS = (37, 0, 70)
CACHES = {
    "a step": {"new": 1, "q_len": 1},
    "splits and pages": {"new": 3, "q_len": 3, "page": 16},
    "a chunk": {"new": 20, "q_len": 20, "page": 16},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CACHES)
def test_a_cache(case, backend, device):
    """With NaN before it, in pages that do not exist where there are pages."""
    starts = torch.tensor([20, 0, 33], device=device)
    problem = make_problem(device, LENS, **CACHES[case])
    poisoned = problem.copy()
    for entry, start in enumerate(starts.tolist()):
        if problem.table is None:
            poisoned.k_cache[entry, :start] = poisoned.v_cache[entry, :start] = NAN
        else:
            poisoned.table = problem.table.clone() if entry == 0 else poisoned.table
            poisoned.table[entry, : start // 16] = 1 << 20
    num_splits = 3 if case == "splits and pages" else None
    options = {"kv_start": starts, **({"window": (30, 0)} if case == "a chunk" else {})}
    out = poisoned.run(backend=backend, num_splits=num_splits, **options)
    assert torch.equal(out, problem.copy().run(backend=backend, num_splits=num_splits, **options))
    check(problem, backend, num_splits, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt(backend, device):
    """Into an empty cache, whose length the host knows: attention among the new keys."""
    problem = make_problem(device, (0, 0), new=40, q_len=40)
    starts = torch.tensor([11, 3], device=device)
    check(problem.copy(), backend, None, kv_start=starts)
    alone = attention(problem.q, problem.k, problem.v, causal=True, kv_start=starts, backend=backend)
    assert torch.equal(problem.run(kv_start=starts, backend=backend, cache_lens=0), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_queries_over_a_cache(backend, device):
    problem, starts = make_problem(device, (37, 5, 70), new=0), torch.tensor([30, 0, 20], device=device)
    rows = torch.tensor([0, 1, 2, 42], device=device)
    q = torch.randn(42, 4, 16).to(device)
    out = attention_with_kvcache(
        q, problem.k_cache, problem.v_cache, cache_lens=problem.lens, cu_seqlens_q=rows, kv_start=starts,
        backend=backend,
    )  # fmt: skip
    for entry, (first, end) in enumerate(pairwise(rows.tolist())):
        own = slice(entry, entry + 1)
        alone = attention_with_kvcache(
            q[first:end].transpose(0, 1)[None], problem.k_cache[own], problem.v_cache[own],
            cache_lens=problem.lens[own], kv_start=starts[own], backend=backend,
        )  # fmt: skip
        assert torch.equal(out[first:end], alone[0].transpose(0, 1))


def test_explain_over_a_cache():
    problem = make_problem("cpu", (5,))
    why = explain_with_kvcache(
        problem.q, problem.k_cache, problem.v_cache, cache_lens=5, kv_start=torch.tensor([2])
    )  # fmt: skip
    assert "kv_start per batch entry" in why.call and "it has no kv_start" in why.reasons["torch"]
