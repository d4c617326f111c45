"""The specification itself: against attention written out by hand, finite differences, and its block-wise form.

Every other backend is held to `reference.attention`. Nothing here calls what it tests through the helper that uses it.
"""

import itertools
import math

import pytest
import torch

from fastattn import attention, reference
from fastattn.backends.reference import blockwise
from fastattn.testing import assert_parity, check_attention
from tests.support.attention_cases import DOUBLE, HALF, INF, SINGLE, make_bias, make_mask, make_qkv

EPS = torch.finfo(DOUBLE).eps


def written_out(q, k, v, allowed, bias, scale):
    """out and lse in Python floats, one element at a time."""
    batch, q_heads, q_len, dim = q.shape
    group = q_heads // k.shape[1]
    out = torch.zeros(batch, q_heads, q_len, v.shape[3], dtype=DOUBLE)
    lse = torch.full((batch, q_heads, q_len), -INF, dtype=DOUBLE)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, q_heads, q_len))).tolist():
        g = h // group
        scores = {}
        for j in range(k.shape[2]):
            if allowed(b, h, i, j):
                products = (q[b, h, i, d].item() * k[b, g, j, d].item() for d in range(dim))
                scores[j] = scale * math.fsum(products) + bias(b, h, i, j)
        if scores:
            largest = max(scores.values())
            weights = {j: math.exp(s - largest) for j, s in scores.items()}
            total = math.fsum(weights.values())
            lse[b, h, i] = largest + math.log(total)
            for d in range(v.shape[3]):
                out[b, h, i, d] = math.fsum(w * v[b, g, j, d].item() for j, w in weights.items()) / total
    return out, lse


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("q_offset", [None, 0, -2, (3, -1)], ids=["bottom_right", "top_left", "negative", "per_entry"])
def test_definition_written_out_by_hand(heads, q_offset):
    q, k, v = make_qkv("cpu", (5, 7), dims=(3, 4), heads=heads, batch=2, dtype=DOUBLE)
    mask, bias = make_mask("cpu", (2, 1, 5, 7)), make_bias("cpu", (heads[0], 1, 7), DOUBLE)
    offsets = (2, 2) if q_offset is None else (q_offset,) * 2 if isinstance(q_offset, int) else q_offset

    def allowed(b, h, i, j):
        return mask[b, 0, i, j] and j <= i + offsets[b]

    expected = written_out(q, k, v, allowed, lambda b, h, i, j: bias[h, 0, j].item(), 0.7)
    if isinstance(q_offset, tuple):
        q_offset = torch.tensor(q_offset)
    actual = attention(
        q, k, v, mask=mask, bias=bias, causal=True, q_offset=q_offset, scale=0.7, return_lse=True, backend="reference"
    )
    for name, ours, exact in zip(("out", "lse"), actual, expected, strict=True):
        assert_parity(ours, exact, exact, name, intermediate=16.0)  # scores of a few units, sums of seven terms


def test_default_scale_and_no_options():
    q, k, v = make_qkv("cpu", (5, 7), dims=(3, 4), dtype=DOUBLE)
    expected = written_out(q, k, v, lambda *_: True, lambda *_: 0.0, 3**-0.5)
    for ours, exact in zip(attention(q, k, v, return_lse=True, backend="reference"), expected, strict=True):
        assert_parity(ours, exact, exact, intermediate=16.0)


def test_dropout_written_out_by_hand():
    """Weights after the softmax are dropped or divided by 1 - p; lse knows nothing of it."""
    q, k, v = make_qkv("cpu", (5, 7), dtype=DOUBLE)
    torch.manual_seed(11)
    out, lse = attention(q, k, v, dropout_p=0.4, return_lse=True, backend="reference")
    torch.manual_seed(11)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64)
    keep = reference.dropout_keep(seed, 0.4, 1, 2, (0, 5), (0, 7))
    s = q @ k.mT / 4.0
    expected = (torch.softmax(s, -1) * keep / 0.6) @ v
    assert 0 < keep.sum() < keep.numel()
    assert_parity(out, expected, expected, intermediate=16.0)
    assert_parity(lse, torch.logsumexp(s, -1), torch.logsumexp(s, -1), intermediate=16.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}, {"scale": 0.2}, {"enable_gqa": True}],
    ids=str,
)
def test_agrees_with_pytorch_where_pytorch_defines_it(options):
    """PyTorch's unfused kernel in float64."""
    q, k, v = make_qkv("cpu", (33, 50), heads=(4, 2) if "enable_gqa" in options else (2, 2), dtype=DOUBLE)
    ours = {"scale": options.get("scale"), "causal": "is_causal" in options, "q_offset": 0}
    if "attn_mask" in options:
        boolean = options["attn_mask"] == "bool"
        x = make_mask("cpu", (33, 50)) if boolean else make_bias("cpu", (33, 50), DOUBLE)
        ours["mask" if boolean else "bias"], options = x, {"attn_mask": x}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    assert_parity(attention(q, k, v, backend="reference", **ours), expected, expected, intermediate=64.0)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("elements", [1, 500, 1 << 22], ids=["one_row", "some_rows", "all_rows"])
def test_blocks_agree_with_the_definition(monkeypatch, elements, dtype):
    """out, lse and all gradients, whatever the block: down to one query row at a time."""
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", elements)
    q, k, v = make_qkv("cpu", (19, 31), dims=(8, 12), heads=(4, 2), batch=2, dtype=dtype)
    check_attention(
        q, k, v, backend="reference", causal=True, q_offset=torch.tensor([12, -5]), dropout_p=0.3,
        mask=make_mask("cpu", (2, 1, 19, 31)), bias=make_bias("cpu", (4, 19, 1), requires_grad=True),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 19, 31), (2, 1, 1, 31), (1, 4, 19, 1)], ids=str)
def test_blocks_sum_the_gradient_of_a_broadcast_bias(monkeypatch, shape):
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 1000)
    q, k, v = make_qkv("cpu", (19, 31), heads=(4, 2), batch=2, dtype=SINGLE)
    check_attention(q, k, v, backend="reference", bias=make_bias("cpu", shape, requires_grad=True))


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 7)], ids=["Lq=0", "Lk=0", "L=0", "B=0"])
def test_empty_tensors(sizes):
    batch, *lengths = sizes
    q, k, v = make_qkv("cpu", lengths, batch=batch, dtype=DOUBLE)
    for causal in (False, True):
        check_attention(q, k, v, backend="reference", causal=causal, dropout_p=0.5)


def differentiable(device="cpu", lengths=(4, 5), heads=(2, 1), batch=2):
    q, k, v = make_qkv(device, lengths, dims=(3, 2), heads=heads, batch=batch, dtype=DOUBLE)
    return tuple(x.requires_grad_() for x in (q, k, v))


GRADCHECK_CASES = {
    "plain": {},
    "causal": {"causal": True},
    "empty_rows": {"causal": True, "q_offset": -2},
    "per_entry_offsets": {"causal": True, "q_offset": (1, -2)},
    "mask": {"mask": True},
    "mask_causal_scale": {"mask": True, "causal": True, "scale": -0.4},
    "dropout": {"dropout_p": 0.4},
}


def gradcheck_options(case):
    options = dict(GRADCHECK_CASES[case])
    if "mask" in options:
        options["mask"] = make_mask("cpu", (2, 1, 4, 5))
    if isinstance(options.get("q_offset"), tuple):
        options["q_offset"] = torch.tensor(options["q_offset"])
    return options


def finite_lse(lse):
    """Rows with nothing allowed have lse -inf: finite differences of a constant stand in."""
    return torch.where(lse == -INF, 0.0, lse)


BIAS_SHAPES = ((2, 2, 4, 5), (1, 2, 1, 5), (1, 1, 4, 1))


@pytest.mark.parametrize(
    ("case", "bias_shape"),
    [
        *((case, None) for case in GRADCHECK_CASES),
        *itertools.product(("empty_rows", "mask_causal_scale", "dropout"), BIAS_SHAPES),
    ],
    ids=str,
)
def test_gradcheck_of_the_operator(case, bias_shape):
    """Finite differences of out and lse in float64, by q, k, v and bias, with grouped heads."""
    options = gradcheck_options(case)
    bias = () if bias_shape is None else (make_bias("cpu", bias_shape, DOUBLE, requires_grad=True),)

    def call(q, k, v, *bias):
        torch.manual_seed(3)  # the same weights are dropped every time
        out, lse = attention(q, k, v, bias=bias[0] if bias else None, return_lse=True, backend="reference", **options)
        return out, finite_lse(lse)

    assert torch.autograd.gradcheck(call, (*differentiable(), *bias))


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty_rows"])
def test_gradcheck_and_gradgradcheck_of_the_definition(empty):
    """`reference.attention` is differentiable to any order, unlike the operator."""
    bias = make_bias("cpu", (1, 2, 4, 5), DOUBLE, requires_grad=True)

    def call(q, k, v, bias):
        out, lse = reference.attention(q, k, v, bias=bias, right=0, q_offset=-1 if empty else 1, scale=0.6)
        return out, finite_lse(lse)

    leaves = (*differentiable(batch=1), bias)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradcheck_of_the_torch_backend():
    leaves = differentiable(heads=(2, 2))
    mask = make_mask("cpu", (2, 1, 1, 5))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask, backend="torch"), leaves)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_single(dtype):
    """The blocks round once, at the end: bit-equal to rounding the float32 result."""
    q, k, v = make_qkv("cpu", (9, 21), dtype=dtype)
    out, lse = attention(q, k, v, return_lse=True, backend="reference")
    single, single_lse = attention(q.float(), k.float(), v.float(), return_lse=True, backend="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, single.to(dtype)) and torch.equal(lse, single_lse)


def test_the_most_negative_finite_bias_is_not_minus_infinity():
    """A row that has nothing but the lowest finite number added attends to all keys alike: weights sum to 1."""
    q, k, v = make_qkv("cpu", (3, 9), dtype=SINGLE)
    bias = torch.full((1, 1, 1, 9), torch.finfo(SINGLE).min)
    out = reference.attention(q, k, v, bias=bias, scale=0.25)[0]
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    assert_parity(out, mean, mean.float())
