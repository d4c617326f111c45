"""Very large scores, and NaN or infinity where a row may not look: probabilities sum to 1, nothing leaks."""

import math

import pytest
import torch

from fastattn import attention, backends
from fastattn.spec import make_spec
from fastattn.testing import assert_parity, calls, check_attention

INF = math.inf
BACKENDS = ["reference", "cpu"]
LOWEST = torch.finfo(torch.float32).min


def only_where_it_runs(backend, **options):
    """Skip a backend that is not there on this machine."""
    x = torch.zeros(1, 1, 1, 16)
    if backend not in backends.BACKENDS:
        pytest.skip(f"no backend {backend!r}")
    if reasons := backends.reasons_against(backend, make_spec(x, x, x, **options)):
        pytest.skip(f"{backend}: {reasons[0]}")


def weights_of(out):
    return torch.arange(out.numel()).view_as(out) % 3 + 1.0


def inputs_of(q, k, v):
    """With the gradients that `with_gradients` sends in, for the specification."""
    return {"q": q, "k": k, "v": v, "dout": weights_of(q), "dlse": torch.ones(q.shape[:3])}


def with_gradients(backend, q, k, v, seed=0, **options):
    """out, lse, and the gradients of q, k and v for weights that come into out, and ones into lse."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(seed)
    out, lse = attention(*leaves, backend=backend, return_lse=True, **options)
    weights = weights_of(out)
    finite = lse.masked_fill(lse == -INF, 0.0)
    return [out, lse, *torch.autograd.grad((out * weights).sum() + finite.sum(), leaves)]


def ones_for_values(kv_len, dim=16):
    return torch.ones(1, 2, kv_len, dim)


LARGE = {
    "a bias of -1e9 in every place, softcap": (0.0, {"bias": torch.full((8, 8), -1e9), "softcap": 5.0}),
    "a bias of the lowest number in every place": (0.0, {"bias": torch.full((8, 8), LOWEST)}),
    "a row of the lowest number": (1.0, {"bias": torch.zeros(8, 8).index_fill(0, torch.tensor([3]), LOWEST)}),
    "constant 30": (30.0, {}),
    "constant 500": (500.0, {}),
    "constant 1000, causal": (1000.0, {"causal": True}),
    "ALiBi at a distance of a million": (1.0, {"alibi_slopes": torch.tensor([0.5, 0.25]), "q_offset": 10**6}),
}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("deviation", [10.0, 50.0])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_large_scores(backend, deviation, options):
    """With a standard deviation as given; the allowance does not grow with it, but by what eager PyTorch loses."""
    only_where_it_runs(backend)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 32, generator=generator) for _ in "qkv")
    check_attention(q * math.sqrt(deviation), k * math.sqrt(deviation), v, backend=backend, **options)


def test_scores_near_the_end_of_float32():
    only_where_it_runs("triton")
    q, k = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)
    q[..., 0], k[..., 0] = 1e19, torch.tensor([2.0e19, 2.3e19, 2.1e19])
    v = torch.eye(3, 16)[None, None]
    out, lse = attention(q, k, v, scale=1.0, backend="triton", return_lse=True)
    assert torch.equal(out, v[:, :, [1, 1, 1]])
    torch.testing.assert_close(lse, (q @ k.mT)[..., 1])
    out, lse = attention(q, -k * 100.0, v, scale=1.0, backend="triton", return_lse=True)
    assert (out == 0.0).all() and (lse == -INF).all()


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_probabilities_sum_to_one(backend, case):
    """out of values 1 is the sum of a row; dv for ones that come in adds up to the number of rows."""
    only_where_it_runs(backend)
    size, options = LARGE[case]
    q = k = torch.full((1, 2, 8, 16), size)
    v = ones_for_values(8).requires_grad_()
    out = attention(q, k, v, backend=backend, **options)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    eager = attention(q, k, v, backend="reference", **options)
    (eager_dv,) = torch.autograd.grad(eager, v, torch.ones_like(out))
    assert_parity(out, torch.ones_like(out).double(), eager)
    sums, eager_sums = (x.double().sum(2).float() for x in (dv, eager_dv))
    assert_parity(sums, torch.full((1, 2, 16), 8.0).double(), eager_sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_the_lowest_bias_weighs_its_keys_alike(backend):
    only_where_it_runs(backend)
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    bias = torch.full((4, 9), LOWEST)
    out = attention(q, k, v, bias=bias, backend=backend)
    exact, eager = (x.mean(2, keepdim=True).expand_as(out) for x in (v.double(), v))
    assert_parity(out, exact, eager)
    if backend != "torch":  # which has no lse
        _, lse = attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        lowest = -2.3586574e38 if backend == "cpu" else LOWEST  # scores in base 2 end there, as documented
        assert torch.equal(lse, torch.full_like(lse, lowest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_far_away(backend):
    """Only differences of distances count: as if all keys were near."""
    only_where_it_runs(backend)
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    slopes = torch.tensor([0.5, 0.03])
    far = with_gradients(backend, q, k, v, alibi_slopes=slopes, q_offset=10**6)
    exact, near = (
        with_gradients("reference", *(x.to(dtype) for x in (q, k, v)), alibi_slopes=slopes.to(dtype), q_offset=40)
        for dtype in (torch.float64, torch.float32)
    )
    for index, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        assert_parity(far[index], exact[index], near[index], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_minus_infinity(backend):
    """As no sink: also for a row that sees no key."""
    only_where_it_runs(backend)
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    mask = torch.ones(4, 9, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)
    sinks = torch.tensor([-INF, -INF]).requires_grad_()
    actual = with_gradients(backend, q, k, v, mask=mask, sinks=sinks)
    calls.hold_to_the_rule(actual, inputs_of(q, k, v), {"mask": mask}, seed=0)
    out = attention(q, k, v, mask=mask, sinks=sinks, backend=backend)
    assert torch.equal(torch.autograd.grad(out.sum(), sinks)[0], torch.zeros(2))


TERMS = {
    "mask": {},
    "softcap": {"softcap": 3.0},
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.3},
    "window": {"window": (20, 3)},
    "everything": {"softcap": 2.0, "causal": True, "dropout_p": 0.1, "alibi_slopes": torch.tensor([0.1, 0.2])},
}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("which", ["k", "v", "both"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_key_reaches_nothing(backend, terms, which, bad):
    """Not out, lse or a gradient, whatever it holds."""
    only_where_it_runs(backend)
    mask = torch.rand(24, 40) > 0.4
    mask[:, 33:] = False
    q, k, v = torch.randn(1, 2, 24, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    given = [k.clone(), v.clone()]
    for name, x in zip("kv", given, strict=True):
        if which in (name, "both"):
            x[:, :, 33:] = bad
    actual = with_gradients(backend, q, *given, mask=mask, **TERMS[terms])
    calls.hold_to_the_rule(actual, inputs_of(q, k, v), {"mask": mask, **TERMS[terms]}, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_some_rows_see_spoils_these_alone(backend):
    only_where_it_runs(backend)
    q, k, v = torch.randn(1, 1, 24, 16), torch.randn(1, 1, 24, 16), torch.randn(1, 1, 24, 16)
    v[:, :, 10] = math.nan
    out = attention(q, k, v, causal=True, backend=backend)
    assert out[:, :, :10].isfinite().all() and out[:, :, 10:].isnan().all()
