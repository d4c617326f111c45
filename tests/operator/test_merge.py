"""merge: attention over keys in parts is attention over all of them, with gradients, and with rows that see nothing."""

import math

import pytest
import torch

from fastattn import attention, attention_varlen, attention_with_kvcache, merge
from fastattn.testing import assert_parity, calls
from tests.support.attention_cases import BFLOAT, DOUBLE, HALF, INF, SINGLE, make_qkv

CUT = 20


def in_parts(q, k, v, mask=None, cut=CUT):
    """(out, lse) over the keys before ``cut`` and those from it on, merged."""
    first, second = (None, None) if mask is None else (mask[..., :cut], mask[..., cut:])
    one = attention(q, k[:, :, :cut], v[:, :, :cut], mask=first, return_lse=True)
    return merge(*one, *attention(q, k[:, :, cut:], v[:, :, cut:], mask=second, return_lse=True))


@pytest.mark.parametrize("cut", [0, 1, CUT, 50])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE, DOUBLE], ids=str)
def test_parts_make_the_whole(dtype, cut):
    """Rounded twice on the way: each part is held to the rule, so is the result."""
    q, k, v = (x.requires_grad_() for x in make_qkv("cpu", (9, 50), heads=(4, 2), dtype=dtype))
    inputs = {"q": q, "k": k, "v": v, "dout": torch.randn(q.shape).to(dtype), "dlse": torch.randn(q.shape[:3])}
    out, lse = in_parts(q, k, v, cut=cut)
    assert out.dtype == dtype and lse.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)
    gradients = torch.autograd.grad([out, lse], (q, k, v), [inputs["dout"], inputs["dlse"].to(lse.dtype)])
    calls.hold_to_the_rule([out, lse, *gradients], inputs, {}, seed=0)


def test_rows_that_see_nothing():
    q, k, v = (x.requires_grad_() for x in make_qkv("cpu", (4, 50), dtype=SINGLE))
    mask = torch.ones(4, 50, dtype=torch.bool)
    mask[0, :CUT], mask[1, CUT:], mask[2] = False, False, False  # in the first part, the second, both
    out, lse = in_parts(q, k, v, mask)
    exact, plain = (
        attention(*(x.detach().to(d) for x in (q, k, v)), mask=mask, return_lse=True, backend="reference")
        for d in (DOUBLE, SINGLE)
    )
    assert_parity(out, exact[0], plain[0], "out")
    assert_parity(lse, exact[1], plain[1], "lse")
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -INF).all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :, [0, 1, 3]].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, 2] == 0).all()


def test_gradcheck_with_rows_that_see_nothing():
    leaves = [x.requires_grad_() for x in make_qkv("cpu", (3, 6), dims=(4, 4), dtype=DOUBLE)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)

    def function(*leaves):
        out, lse = in_parts(*leaves, mask, cut=3)
        return out, lse[:, :, :2]

    assert torch.autograd.gradcheck(function, leaves)


def test_gradcheck_of_the_statistics():
    out1, out2 = (torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    lse1, lse2 = (torch.randn(2, 3, dtype=DOUBLE).mul(20).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(merge, (out1, lse1, out2, lse2))
    assert torch.autograd.gradgradcheck(merge, (out1, lse1, out2, lse2))


def test_statistics_far_apart_and_large():
    out = torch.randn(2, 2, 3)
    lse = torch.tensor([[1e4, -1e4], [3e38, -3e38]])
    merged, merged_lse = merge(out, lse, out.flip(0), -lse)
    assert merged.isfinite().all() and torch.equal(merged_lse, lse.abs())


def test_packed_and_mixed_dtypes():
    q, k, v = torch.randn(7, 2, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, lse = attention_varlen(q, k, v, starts, return_lse=True)
    merged, both = merge(out, lse.mT, out.bfloat16(), lse.mT)
    assert merged.dtype == SINGLE and both.dtype == SINGLE
    assert_parity(both, lse.mT.double() + math.log(2), lse.mT + math.log(2))
    with pytest.raises(ValueError, match=r"lse1.shape: expected out1.shape\[:-1\] == \(7, 2\).*lse.mT"):
        merge(out, lse, out, lse.mT)


def test_a_prefix_that_the_batch_shares():
    """One pass over the prefix for the rows of the whole batch, merged with what each entry has of its own."""
    batch, heads, q_len, prefix, own = 3, 4, 2, 40, 9
    q = torch.randn(batch, heads, q_len, 16)
    pk, pv = torch.randn(2, 1, 2, prefix, 16)
    k, v = torch.randn(2, batch, 2, own, 16)
    rows = q.transpose(0, 1).reshape(1, heads, batch * q_len, 16)
    out1, lse1 = attention(rows, pk, pv, return_lse=True)
    out1 = out1.view(heads, batch, q_len, 16).transpose(0, 1)
    lse1 = lse1.view(heads, batch, q_len).transpose(0, 1)
    out, lse = merge(out1, lse1, *attention(q, k, v, causal=True, return_lse=True))
    whole = [torch.cat([p.expand(batch, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v))]
    exact, plain = (
        attention(*(x.to(d) for x in (q, *whole)), causal=True, return_lse=True, backend="reference")
        for d in (DOUBLE, SINGLE)
    )
    assert_parity(out, exact[0], plain[0], "out")
    assert_parity(lse, exact[1], plain[1], "lse")


BAD = {
    "dtype": ({"lse1": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "lse1: expected a floating-point Tensor"),
    "type": ({"out2": None}, TypeError, "out2: expected a floating-point Tensor, got NoneType"),
    "shape": ({"out2": torch.zeros(2, 4, 4)}, ValueError, r"out2.shape: expected out1.shape == \(2, 3, 4\)"),
    "device": ({"lse2": torch.zeros(2, 3, device="meta")}, ValueError, "lse2.device: expected out1.device == cpu"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    good = {"out1": torch.zeros(2, 3, 4), "lse1": torch.zeros(2, 3)}
    good |= {"out2": good["out1"], "lse2": good["lse1"]}
    with pytest.raises(error, match=text):
        merge(**(good | change))


def cascade(q, k, v, prefix, caches, lens, **options):
    """As docs/kv-cache.md has it: a prefix that the batch shares, read once, and what each entry has of its own."""
    rows = q.transpose(0, 1).flatten(1, 2)[None]
    common = attention(rows, *prefix, return_lse=True)
    common = (x[0].unflatten(1, (q.shape[0], -1)).transpose(0, 1) for x in common)
    own = attention_with_kvcache(q, *caches, k, v, cache_lens=lens, return_lse=True, **options)
    return merge(*common, *own)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "pages"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_a_shared_prefix_is_one_call_over_the_whole(dtype, new, paged):
    lengths = (11, 4, 0)  # of each entry, beside the prefix
    q, k, v = (torch.randn(3, heads, new, 16).to(dtype) for heads in (4, 2, 2))
    prefix = [torch.randn(1, 2, 33, 16).to(dtype) for _ in "kv"]
    caches = [torch.randn(3, 16, 2, 16).to(dtype) for _ in "kv"]
    options = {}
    if paged:
        caches = [x.reshape(12, 4, 2, 16) for x in caches]
        options["block_table"] = torch.arange(12, dtype=torch.int32).view(3, 4)
    out, lse = cascade(q, k, v, prefix, caches, torch.tensor(lengths), **options)
    rows = [x.reshape(3, 16, 2, 16).transpose(1, 2) for x in caches]
    for entry, length in enumerate(lengths):
        one = slice(entry, entry + 1)
        whole = [torch.cat([a, b[one, :, : length + new]], 2) for a, b in zip(prefix, rows, strict=True)]
        exact, plain = (
            attention(*(x.to(d) for x in (q[one], *whole)), causal=True, return_lse=True, backend="reference")
            for d in (DOUBLE, dtype)
        )
        assert_parity(out[one], exact[0], plain[0], "out")
        assert_parity(lse[one], exact[1], plain[1], "lse")
