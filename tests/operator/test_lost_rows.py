"""NaN and infinity in one key: the rows that see it are lost, and of the rest of the call not a digit."""

import math

import pytest
import torch

from fastattn import BlockMask, attention, attention_varlen, attention_with_kvcache
from fastattn.backends.cpu import library
from fastattn.testing import assert_parity
from tests.support.attention_cases import DOUBLE, SINGLE

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")),
    "triton",
]
LENGTH, SPOILED = 140, 70
ROW, KEY = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
DOCUMENT, HALVES = KEY // 6, KEY // 128

# What is called, and which pairs that allows.
CASES = {
    "causal": ({"causal": True}, KEY <= ROW),
    "window": ({"window": (4, 2)}, (KEY >= ROW - 4) & (KEY <= ROW + 2)),
    "mask": ({"mask": (ROW + 2 * KEY) % 7 != 0}, (ROW + 2 * KEY) % 7 != 0),
    "bias": ({"bias": torch.where(KEY <= ROW + 1, 0.5, -math.inf), "softcap": 4.0}, KEY <= ROW + 1),
    "everything": (
        {"causal": True, "window": (7, 0), "softcap": 3.0, "alibi_slopes": torch.tensor([0.5, 0.1]),
         "sinks": torch.tensor([0.5, -1.0])},
        (KEY <= ROW) & (KEY >= ROW - 7),
    ),
    "block mask, causal": (
        {"block_mask": BlockMask.from_documents(DOCUMENT), "causal": True},
        (DOCUMENT[:, None] == DOCUMENT) & (KEY <= ROW),
    ),
    "full tiles, causal": (
        {"block_mask": BlockMask.from_documents(HALVES), "causal": True},
        (HALVES[:, None] == HALVES) & (KEY <= ROW),
    ),
    "padding": ({"mask": KEY[None] != SPOILED, "softcap": 4.0}, (KEY != SPOILED).expand(LENGTH, -1)),
}  # fmt: skip


def make_problem(content, in_key=True, dims=(16, 24)):
    """q, k and v of grouped heads, with ``content`` in one value, and in its key if that is wanted."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, LENGTH, dims[0]), torch.randn(1, 1, LENGTH, dims[0]), torch.randn(1, 1, LENGTH, dims[1])
    k[:, :, SPOILED, 3] = content if in_key else 0.0
    v[:, :, SPOILED, 5] = content
    return [q, k, v]


def with_gradients(function, inputs, weights, dtype=SINGLE):
    """out and the gradients of the inputs, and of the other operands that have one."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]


@pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")
def test_many_blocks_without_a_spoiled_key_have_the_same_bits():
    """Sums over more keys and queries than a block has, by the CPU kernels' two ways."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 300, 48), torch.randn(1, 2, 400, 48), torch.randn(1, 2, 400, 32)
    weights, mask = torch.randn(1, 2, 300, 32), torch.arange(400) != 3
    results = []
    for content in (0.0, math.nan):
        q, k, v = (x.detach().clone() for x in (q, k, v))
        k[:, :, 3, 5] = v[:, :, 3, 7] = content
        results.append(
            with_gradients(lambda *x: attention(*x, mask=mask[None, None, None], backend="cpu"), (q, k, v), weights)
        )
    for name, whole, spoiled in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(whole, spoiled), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "content"), [*((case, math.nan) for case in CASES), ("everything", -math.inf)])
def test_only_what_sees_the_key_is_lost(case, content, backend):
    """Also of the gradients: a key loses its own where a lost row sees it.

    Not in a key where a product may be -inf, which forbids it, nor under a bias: NaN - inf is NaN.
    """
    options, allowed = CASES[case]
    in_key = math.isnan(content) and "bias" not in options
    lost = allowed[:, SPOILED]
    lost_keys = allowed[lost].any(0)
    lost_keys[SPOILED] |= bool(lost.any())
    weights = torch.randn(1, 2, LENGTH, 24)
    actual = with_gradients(
        lambda q, k, v: attention(q, k, v, backend=backend, **options), make_problem(content, in_key), weights
    )
    assert not actual[0][:, :, lost].isfinite().all(-1).any()
    clean = make_problem(0.0)
    expected, eager = (
        with_gradients(lambda q, k, v: attention(q, k, v, backend="reference", **options), clean, weights, dtype)
        for dtype in (DOUBLE, SINGLE)
    )
    kept = (~lost, ~lost, ~lost_keys, ~lost_keys)
    for name, keep, *results in zip(("out", "dq", "dk", "dv"), kept, actual, expected, eager, strict=True):
        assert_parity(*(x[:, :, keep] for x in results), name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_sequence_is_not_reached_by_another(backend):
    q, k, v = (x[0].transpose(0, 1) for x in make_problem(math.nan))
    starts = torch.tensor([0, 40, 40, 110, LENGTH], dtype=torch.int32)
    packing = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True}
    weights = torch.randn(LENGTH, 2, 24)
    actual = with_gradients(lambda q, k, v: attention_varlen(q, k, v, backend=backend, **packing), (q, k, v), weights)
    out, dq, dk, dv = (x.isfinite().all(-1).all(1) for x in actual)
    own = (KEY >= 40) & (KEY < 110)
    assert torch.equal(out, ~(own & (KEY >= SPOILED)))
    assert torch.equal(dq, out)
    for reached in (dk, dv):
        assert torch.equal(reached, ~own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("page", [0, 16])
def test_a_prompt_over_a_cache(page, num_splits, backend):
    """The last rows of a prompt see a key that the first ones do not; ALiBi and sinks besides."""
    prompt, length, capacity = 12, 36, 64
    lens = torch.tensor([length], dtype=torch.int32)
    options = {
        "window": (9, 0), "alibi_slopes": torch.tensor([0.5, 0.1]),
        "sinks": torch.tensor([0.5, -1.0]), "num_splits": num_splits, "backend": backend,
    }  # fmt: skip
    q = torch.randn(1, 2, prompt, 16)
    caches = [torch.randn(1, capacity, 1, dim) for dim in (16, 24)]
    table = None
    if page:
        table = torch.arange(capacity // page, dtype=torch.int32).flip(0)[None]
    results = []
    for content in (0.0, math.nan):
        k_cache, v_cache = (x.clone() for x in caches)
        for cache in (k_cache, v_cache):
            cache[:, length - 5] = content  # seen by the last five rows, and outside the window of none of them
            cache[:, length - prompt - 6] = content  # seen by the first four rows
        if page:
            k_cache, v_cache = (x.view(-1, page, *x.shape[2:]).flip(0) for x in (k_cache, v_cache))
        results.append(attention_with_kvcache(q, k_cache, v_cache, cache_lens=lens, block_table=table, **options))
    clean, actual = results
    expected = torch.tensor([False] * 4 + [True] * 3 + [False] * 5)
    assert torch.equal(actual.isfinite().all(-1).all(1)[0], expected)
    assert torch.equal(actual[:, :, expected], clean[:, :, expected])
