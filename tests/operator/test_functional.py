"""The public functions: `attention`, and `scaled_dot_product_attention` as a stand-in for PyTorch's."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import attention, explain, scaled_dot_product_attention
from fastattn.testing import assert_parity
from tests.support.attention_cases import (
    BFLOAT,
    DOUBLE,
    DTYPE_NAMES,
    HALF,
    INF,
    SINGLE,
    make_bias,
    make_mask,
    make_qkv,
)

DTYPES = [HALF, BFLOAT, SINGLE, DOUBLE]


def unfused(*args, dtype=None, **kwargs):
    """PyTorch's unfused kernel, in `dtype`."""
    args = [x.to(dtype) if dtype and x is not None and x.is_floating_point() else x for x in args]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def fused(query, key, value, attn_mask=None, scale=None, **kwargs):
    """PyTorch's fused kernel, which it has for 4-D tensors of one head dim alone."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = max(query.shape[-1], value.shape[-1])
    wide = [F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)]
    if not kwargs.get("enable_gqa"):
        lead = torch.broadcast_shapes(*(x.shape[:-2] for x in wide))
        wide = [x.expand(*lead, *x.shape[-2:]) for x in wide]
    lift = wide[0].ndim == 3
    if lift:
        wide = [x[None] for x in wide]
        attn_mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
    out = F.scaled_dot_product_attention(*wide, attn_mask, scale=scale, **kwargs)[..., : value.shape[-1]]
    return out[0] if lift else out


def assert_as_pytorch(query, key, value, attn_mask=None, **kwargs):
    """Output and gradients of ours against PyTorch's: the truth in float64, the peer in the inputs' dtype.

    What is PyTorch's result to the bit, because the call went to its kernel, has PyTorch's rounding: that is not ours.
    """
    dout = None
    results = {}
    for name, function, dtype in (
        ("ours", scaled_dot_product_attention, query.dtype),
        ("exact", unfused, DOUBLE),
        ("eager", unfused, query.dtype),
        ("PyTorch", fused, query.dtype),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        mask = attn_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.detach().to(dtype)
            if attn_mask.requires_grad:
                leaves.append(mask.requires_grad_())
        out = function(*leaves[:3], mask, **kwargs)
        if dout is None:
            dout = torch.randn(out.shape).to(out.device, out.dtype)
        results[name] = [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]
    # What is summed on the way, at most: products of dout with v and out, weighted over all rows, times q or k.
    rows = out[..., 0].numel()
    products = 2.0 * (dout.abs().sum(-1).max() * value.abs().max()).item()
    factor = max(1.0, query.abs().max().item(), key.abs().max().item())
    for name, ours, *others, pytorch in zip(("out", "dq", "dk", "dv", "dmask"), *results.values(), strict=False):
        if not torch.equal(ours, pytorch):
            exact, eager = others
            worse = (pytorch - exact).abs().max() > (eager - exact).abs().max()
            size = 1.0 if name == "out" else products * factor * rows
            assert_parity(ours, exact, pytorch if worse else eager, name, intermediate=size)


def test_signature_is_pytorchs():
    """PyTorch's is in the docstring alone."""
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    text = F.scaled_dot_product_attention.__doc__.partition("scaled_dot_product_attention(")[2].partition(")")[0]
    names = [part.partition("=")[0].strip() for part in text.replace("\n", " ").split(",")]
    assert list(parameters) == names
    defaults = [p.default for p in parameters.values()]
    assert defaults == [inspect.Parameter.empty] * 3 + [None, 0.0, False, None, False]


@pytest.fixture(scope="module")
def samples():
    """The argument sets with which PyTorch tests its own function, in the wheel."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return op


def test_pytorchs_own_samples(samples):
    count = 0
    for sample in samples.sample_inputs("cpu", SINGLE, requires_grad=True):
        tensors, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
        mask = kwargs.pop("attn_mask", None)
        if kwargs["dropout_p"] == 0.0:
            assert_as_pytorch(*tensors, mask, **kwargs)
        else:  # other random bits by design: the shape, and determinism
            runs = []
            for _ in range(2):
                torch.manual_seed(0)
                runs.append(scaled_dot_product_attention(*tensors, mask, **kwargs))
            assert runs[0].shape == unfused(*tensors, mask, **kwargs).shape and torch.equal(*runs)
        count += 1
    assert count >= 25


LEADING = [
    ((), (), ()),
    ((3,), (3,), (3,)),
    ((2, 3), (2, 3), (2, 3)),
    ((2, 1, 3), (2, 1, 3), (2, 1, 3)),
    ((2, 2, 1, 3), (2, 2, 1, 3), (2, 2, 1, 3)),
    # What stands before (length, head_dim) broadcasts.
    ((3,), (2, 3), (2, 3)),
    ((2, 3), (3,), (3,)),
    ((2, 3), (1, 3), (1, 3)),
    ((1, 3), (2, 3), (2, 3)),
    ((2, 3), (2, 1), (2, 1)),
    ((2, 3), (2, 3), (1, 1)),
    ((3,), (1,), ()),
    ((5, 1, 3), (2, 3), (2, 3)),
]


@pytest.mark.parametrize("leads", LEADING, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_leading_dimensions(leads, is_causal):
    shapes = [(*lead, *tail) for lead, tail in zip(leads, ((7, 8), (9, 8), (9, 6)), strict=True)]
    assert_as_pytorch(*(torch.randn(shape) for shape in shapes), is_causal=is_causal)


MASKS_BY_RANK = [
    ((), (7, 9)),
    ((), (1, 9)),
    ((3,), (9,)),
    ((3,), (7, 9)),
    ((3,), (3, 7, 9)),
    ((2, 3), (7, 9)),
    ((2, 3), (3, 7, 9)),
    ((2, 3), (2, 1, 1, 9)),
    ((2, 3), (1, 3, 7, 1)),
    ((2, 2, 3), (7, 9)),
    ((2, 2, 3), (3, 1, 9)),
    ((2, 2, 3), (2, 1, 7, 9)),
    ((2, 2, 3), (2, 1, 1, 7, 9)),
    ((2, 2, 3), (1, 1, 1, 1, 1)),
]


@pytest.mark.parametrize(("lead", "shape"), MASKS_BY_RANK, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "learned"])
def test_attn_mask_of_any_rank(lead, shape, kind):
    query, key, value = torch.randn(*lead, 7, 8), torch.randn(*lead, 9, 8), torch.randn(*lead, 9, 6)
    mask = torch.rand(shape) < 0.8 if kind == "bool" else torch.randn(shape)
    if kind == "bool":
        mask[..., 0] = True  # PyTorch's empty rows are another matter
    assert_as_pytorch(query, key, value, mask.requires_grad_(kind == "learned"))


@pytest.mark.parametrize("leads", [((4,), (2,)), ((2, 4), (2, 2)), ((2, 4), (2, 1)), ((2, 2, 4), (2, 2, 2))], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_grouped_heads(leads, is_causal):
    query, key, value = (torch.randn(*leads[i], *tail) for i, tail in ((0, (7, 8)), (1, (9, 8)), (1, (9, 8))))
    assert_as_pytorch(query, key, value, is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.3, 1.0, -0.2, 0.0], ids=str)
def test_scale(scale):
    """A scale of 0 or below is one that PyTorch's own fused kernel gets wrong with a causal mask."""
    query, key, value = make_qkv("cpu", (7, 9), dtype=SINGLE)
    mask = torch.ones(7, 9, dtype=torch.bool).tril()
    ours = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    exact = unfused(query, key, value, mask, dtype=DOUBLE, scale=scale)
    assert_parity(ours, exact, unfused(query, key, value, mask, scale=scale))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_and_is_causal_combine(kind):
    """PyTorch refuses the pair, or worse; here it means both."""
    query, key, value = make_qkv("cpu", (9, 9), dtype=SINGLE)
    padding = (torch.rand(1, 1, 1, 9) < 0.7).index_fill(-1, torch.tensor([0]), True)
    mask = padding if kind == "bool" else torch.zeros(padding.shape).masked_fill(~padding, -INF)
    ours = scaled_dot_product_attention(query, key, value, mask, is_causal=True)
    both = padding & torch.ones(9, 9, dtype=torch.bool).tril()
    assert_parity(ours, unfused(query, key, value, both, dtype=DOUBLE), unfused(query, key, value, both))


def test_is_causal_is_top_left():
    query, key, value = make_qkv("cpu", (5, 9), dtype=SINGLE)
    ours = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(ours, attention(query, key, value, causal=True, q_offset=0))
    cut = scaled_dot_product_attention(query, key[:, :, :5], value[:, :, :5], is_causal=True)
    assert_parity(ours, cut, cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_fully_masked_rows_are_zero(dtype, mask):
    query, key, value = (x.requires_grad_() for x in make_qkv("cpu", (7, 9), batch=2, dtype=dtype))
    allowed = torch.tensor([True, False])[:, None, None, None]
    attn_mask = allowed if mask == "bool" else torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -INF)
    out = scaled_dot_product_attention(query, key, value, attn_mask)
    out.sum().backward()
    assert not out[1].any() and out[0].any()
    for leaf in (query, key, value):
        assert leaf.grad.isfinite().all() and not leaf.grad[1].any()


def test_dropout_is_applied_as_given():
    """Also outside of training, as in PyTorch; seeded by the default generator."""
    query, key, value = make_qkv("cpu", (33, 40), dtype=SINGLE)
    torch.manual_seed(1)
    first, second = (scaled_dot_product_attention(query, key, value, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()
    plain = scaled_dot_product_attention(query, key, value)
    assert torch.equal(scaled_dot_product_attention(query, key, value, dropout_p=0.0), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_result_shapes_and_dtypes(device, dtype, backend):
    q, k, v = make_qkv(device, (5, 9), dims=(8, 12), heads=(4, 2), batch=3, dtype=dtype)
    if backend == "triton" and dtype == DOUBLE:
        pytest.skip("no float64 kernels: test_backends.py has the refusal")
    out = attention(q, k, v, backend=backend)
    assert out.shape == (3, 4, 5, 12) and out.dtype == dtype and out.device == q.device
    if backend != "torch":
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        assert lse.shape == (3, 4, 5) and lse.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)
        assert out.shape == (3, 4, 5, 12) and out.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_merging_the_heads_of_the_output_is_a_view(device, backend):
    """From inputs stored as (B, L, H, D), as projections make them."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(device, (5, 9)))
    out = attention(q, k, v, backend=backend).transpose(1, 2)
    assert out.is_contiguous() and out.flatten(2).data_ptr() == out.data_ptr()


def test_default_q_offset_lines_up_the_ends(device):
    """One query at the end of a cache sees all of it; the same call with q_offset=0 sees one key."""
    q, k, v = make_qkv(device, (1, 9), dtype=SINGLE)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v))
    first = attention(q, k, v, causal=True, q_offset=0)
    assert_parity(first, v[:, :, :1], v[:, :, :1])


def test_chunks_of_queries_by_offset_are_the_whole(device):
    q, k, v = make_qkv(device, (64, 64), dtype=SINGLE)
    whole = attention(q, k, v, causal=True, backend="triton")
    for start in (0, 32):
        chunk = attention(q[:, :, start : start + 32], k, v, causal=True, q_offset=start, backend="triton")
        assert torch.equal(chunk, whole[:, :, start : start + 32])


@pytest.mark.parametrize("function", ["attention", "scaled_dot_product_attention"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_inputs_are_never_modified(function, grad):
    tensors = [*make_qkv("cpu", (7, 9), dtype=SINGLE), make_bias("cpu", (2, 7, 9))]
    copies = [x.clone() for x in tensors]
    versions = [x._version for x in tensors]
    leaves = [x.requires_grad_(grad) for x in tensors]
    if function == "attention":
        mask = make_mask("cpu", (7, 9))
        kept = mask.clone()
        outs = [attention(*leaves[:3], bias=leaves[3], mask=mask, causal=True, backend=b, dropout_p=p) for b, p in (
            ("reference", 0.0), ("reference", 0.3), ("triton", 0.0))]  # fmt: skip
        outs.append(attention(*leaves[:3], mask=mask, causal=True, q_offset=0, backend="torch"))
        assert torch.equal(mask, kept)
    else:
        outs = [scaled_dot_product_attention(*leaves, is_causal=True)]
    if grad:
        sum(out.sum() for out in outs).backward()
    for x, copy, version in zip(tensors, copies, versions, strict=True):
        assert torch.equal(x, copy) and x._version == version


@pytest.mark.parametrize("function", [attention, scaled_dot_product_attention], ids=lambda f: f.__name__)
def test_outputs_are_fresh(function):
    """Not views of an input, which an in-place operation would then change."""
    q, k, v = make_qkv("cpu", (7, 1), dtype=SINGLE)
    kept = v.clone()
    function(q, k, v).add_(1.0)
    assert torch.equal(v, kept)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_autocast_casts_q_k_v_and_leaves_the_bias(device, backend):
    q, k, v = (x.requires_grad_() for x in make_qkv(device, (33, 40), dtype=SINGLE))
    k = k.to(BFLOAT)  # mixed, as a cache in half precision beside float32 activations
    bias = make_bias(device, (2, 33, 40))
    with torch.autocast(device, dtype=BFLOAT):
        out = attention(q, k, v, bias=bias, backend=backend)
    assert out.dtype == BFLOAT
    assert torch.equal(out, attention(*(x.to(BFLOAT) for x in (q, k, v)), bias=bias, backend=backend))
    assert not torch.equal(out, attention(*(x.to(BFLOAT) for x in (q, k, v)), bias=bias.to(BFLOAT), backend=backend))
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.dtype == SINGLE and dq.isfinite().all()
    assert bias.dtype == SINGLE


def test_autocast_reaches_scaled_dot_product_attention(device):
    q, k, v = make_qkv(device, (7, 9), dtype=SINGLE)
    with torch.autocast(device, dtype=BFLOAT):
        assert scaled_dot_product_attention(q, k, v).dtype == BFLOAT
        assert scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == DOUBLE
    assert scaled_dot_product_attention(q, k, v).dtype == SINGLE


def test_meta_tensors_give_shapes():
    q, k, v = make_qkv("meta", (5, 9), dims=(8, 12), heads=(4, 2))
    assert attention(q, k, v, causal=True).shape == (1, 4, 5, 12)
    out, lse = attention(q, k, v, return_lse=True, dropout_p=0.1)
    assert out.is_meta and lse.shape == (1, 4, 5)
    assert scaled_dot_product_attention(q, k, v, enable_gqa=True).shape == (1, 4, 5, 12)


def test_explain_takes_the_arguments_of_attention():
    ours, theirs = (inspect.signature(f).parameters for f in (explain, attention))
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {n: (p.kind, p.default) for n, p in theirs.items()}


def test_everything_but_q_k_v_is_by_keyword():
    kinds = [p.kind for p in inspect.signature(attention).parameters.values()]
    assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}  # the latter is refused


def test_public_names():
    for name in ("attention", "explain", "scaled_dot_product_attention"):
        assert name in fastattn.__all__ and getattr(fastattn, name).__doc__
