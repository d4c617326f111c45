"""Masks and biases over a KV cache: which keys their columns are about, on every backend."""

import pytest
import torch

from fastattn import attention, attention_with_kvcache, explain_with_kvcache
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DOUBLE, HALF, SINGLE
from tests.support.cache_problems import NAN, check, make_problem

LENS = (37, 0, 70)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])


def tree(nodes):
    """Of ``nodes`` draft tokens, two branches from the first one: which of them each one has behind it."""
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        seen[node] |= seen[max(0, node - 2)]
    return seen


def cases(new, capacity):
    """Of 3 entries with 4 heads and ``new`` queries."""
    starts = torch.tensor(LENS)
    return {
        "tree": {"mask": tree(new)[None, None], "mask_start": starts, "causal": False},
        "tree per entry": {"mask": torch.rand(3, 1, new, new) < 0.6, "mask_start": starts},
        "padding": {"mask": torch.rand(3, 1, 1, capacity) < 0.5},
        "one column": {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool), "mask_start": -1 + starts},
        "nothing": {"mask": torch.zeros(capacity, dtype=torch.bool)},
        "relative bias": {"bias": torch.randn(1, 4, new, 90), "mask_start": starts + new - 90, "causal": False},
        "everything": {
            "mask": torch.rand(1, 4, new, 60) < 0.7, "bias": torch.randn(3, 1, 1, 50).half(), "mask_start": 3,
            "softcap": 3.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, -0.06]), "window": (60, 1),
            "causal": False, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]),
        },
    }  # fmt: skip


@BACKENDS
@pytest.mark.parametrize(("new", "page", "num_splits"), [(3, 0, 1), (5, 16, 3)])
@pytest.mark.parametrize("case", cases(1, 8))
def test_parity(case, new, page, num_splits, backend, device):
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in cases(new, 96)[case].items()
    }  # fmt: skip
    check(make_problem(device, LENS, new=new, q_len=new, page=page), backend, num_splits, **options)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", HALF), ("cpu", HALF), ("cpu", BFLOAT), ("reference", BFLOAT)]
)
def test_more_rows_than_a_step_has(dtype, backend, device):
    """As a large tree, or a chunk of a prompt with a bias, has them; masks and caches with any strides."""
    mask, bias = (torch.rand(2, 1, 75, 40) < 0.6).mT, torch.randn(1, 4, 160, 40)[..., ::2, :].mT.contiguous().mT
    problem = make_problem(device, (50, 3), new=40, q_len=40, dtype=dtype, strided=True)
    given = {
        "mask": mask.to(device),
        "bias": bias.to(device)[:, :, :40],
        "mask_start": torch.tensor([11, 0]).to(device),
    }
    check(problem, backend, 2, **given, causal=False)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_keys_may_be_nan(backend, device):
    """What a mask forbids reaches nothing on the backends that docs/numerics.md says this of."""
    problem = make_problem(device, (40, 40), new=0)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    mask[..., 7:19] = False
    for cache in (problem.k_cache, problem.v_cache):
        cache[:, 7:19] = NAN
    out = problem.run(mask=mask.to(device), backend=backend)
    for cache in (problem.k_cache, problem.v_cache):
        cache[:, 7:19] = 0.0
    assert torch.equal(out, problem.run(mask=mask.to(device), backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_a_prompt_with_a_bias_is_attention(backend, device):
    problem = make_problem(device, (0, 0), new=21, q_len=21)
    options = {"bias": torch.randn(1, 4, 21, 30, device=device), "mask": torch.rand(1, 1, 21, 25, device=device) < 0.8}
    out = problem.run(cache_lens=0, backend=backend, **options)
    cut = {name: x[..., :21] for name, x in options.items()}
    assert torch.equal(out, attention(problem.q, problem.k, problem.v, causal=True, backend=backend, **cut))


def test_pytorch_kernel_where_it_is_exact():
    problem = make_problem("cpu", (30, 30), new=1, dims=(16, 24))
    options = {"cache_lens": 30, "mask": torch.rand(2, 1, 1, 96) < 0.6, "bias": torch.randn(1, 4, 1, 31)}
    check(problem, "torch", lse=False, **options)
    arguments = problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v
    why = explain_with_kvcache(*arguments, **options)
    assert why.reasons["torch"] == [] and "mask (2, 1, 1, 96), bias (1, 4, 1, 31)" in why.call
    why = explain_with_kvcache(*arguments, **options, mask_start=0)
    assert why.reasons["torch"] == ["it has no mask_start"] and why.call.endswith("mask_start 0")
    why = explain_with_kvcache(*arguments, **options, mask_start=torch.tensor([0, 0]))
    assert why.call.endswith("mask_start per batch entry")
    why = explain_with_kvcache(*arguments, cache_lens=30, mask=torch.ones(30, dtype=torch.bool))
    assert why.reasons["torch"] == ["it needs a column of mask and bias for each key"]


def test_a_tree_of_drafts_is_each_branch_by_itself(device):
    """The mask of a tree gives each of its tokens what it gets where its own branch alone is appended."""
    nodes, seen = 6, tree(6)
    problem = make_problem(device, (33,), new=nodes, q_len=nodes)
    assert problem.k is not None and problem.v is not None
    out = problem.copy().run(mask=seen.to(device), mask_start=33, causal=False)
    for node in range(nodes):
        branch = seen[node].nonzero().flatten().to(device)
        alone = []
        for dtype in (DOUBLE, SINGLE):
            given = (
                problem.q[:, :, branch[-1:]],
                problem.k_cache,
                problem.v_cache,
                *(x[:, :, branch] for x in (problem.k, problem.v)),
            )
            alone.append(attention_with_kvcache(*(x.to(dtype, copy=True) for x in given), cache_lens=33))
        assert_parity(out[:, :, node], *(x[:, :, 0] for x in alone))


Q, CACHE = torch.zeros(2, 4, 3, 16), torch.zeros(2, 32, 2, 16)
MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"mask": MASK.float()}, TypeError, "mask.dtype: expected bool"),
        ({"bias": MASK}, TypeError, "bias.dtype: expected a floating-point dtype, got torch.bool; it goes to mask="),
        ({"mask": MASK[:, :, :2]}, ValueError, r"mask.shape: expected broadcastable .* \(2, 4, 3, 5\), got \(2, 1, 2"),
        ({"bias": MASK[:, 0, 0].float()}, ValueError, r"one row per batch entry is bias\[:, None, None, :\]"),
        ({"mask": MASK.to("meta")}, ValueError, "mask.device: expected cpu, got meta"),
        ({"mask": 1}, TypeError, "mask: expected a Tensor, got int"),
        ({"mask_start": 3}, ValueError, "mask_start: expected None without mask and bias, got one"),
        ({"mask": MASK, "mask_start": 1.0}, TypeError, "mask_start: expected an int or an integer tensor, got float"),
        ({"mask": MASK, "mask_start": torch.zeros(2)}, TypeError, "mask_start.dtype: expected int32 or int64"),
        ({"mask": MASK, "mask_start": torch.zeros(3).int()}, ValueError, r"mask_start.shape: expected \(B,\) =="),
        ({"mask": MASK, "mask_start": 1 << 31}, ValueError, r"mask_start: expected at most 2\*\*30 in size"),
        (
            {"mask": MASK, "q": Q[0].transpose(0, 1), "cu_seqlens_q": torch.tensor([0, 1, 3])}, ValueError,
            "mask: expected None with cu_seqlens_q, got a tensor; pass q as",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(changes, error, text):
    given = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_lens": torch.tensor([20, 7]), **changes}
    with pytest.raises(error, match=text):
        attention_with_kvcache(**given)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step():
    torch._dynamo.reset()
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager")
    for entries in (2, 3):
        problem = make_problem("cpu", LENS[:entries], new=3, q_len=3)
        eager = problem.copy()
        options = {
            "mask": tree(3), "bias": torch.randn(4, 1, 100), "mask_start": problem.lens,
            "cache_lens": problem.lens,
        }  # fmt: skip
        ours = compiled(problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v, **options)
        assert torch.equal(ours, eager.run(**options))
    torch._dynamo.reset()
