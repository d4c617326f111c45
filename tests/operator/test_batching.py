"""vmap over attention: what one call after the other gives, in one call where no operand forbids it."""

import pytest
import torch

from fastattn import attention, backends
from fastattn.backends.cpu import library
from fastattn.testing import assert_parity

B, H, L, K, D, N = 2, 4, 5, 7, 8, 3
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(library.problem() is not None, reason="no cpu"))]


def one_by_one(function, in_dims, args):
    results = [
        function(*(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))
        for n in range(N)
    ]
    return [torch.stack(x) for x in zip(*results, strict=True)]


def assert_one_by_one(actual, function, in_dims, args):
    wide = [x.double() if x.is_floating_point() else x for x in args]
    results = actual, one_by_one(function, in_dims, wide), one_by_one(function, in_dims, args)
    for number, (ours, exact, eager) in enumerate(zip(*results, strict=True)):
        assert_parity(ours, exact, eager, f"result {number}")


@pytest.fixture
def calls(monkeypatch):
    """How often a backend ran forward."""
    found = []
    for backend in (backends.reference, backends.cpu):
        run = backend.forward
        monkeypatch.setattr(backend, "forward", lambda *args, run=run: found.append(1) or run(*args))
    return found


# operand -> (itself, its vmapped dimension)
OPERANDS = {
    "none": ({}, {}),
    "bias of every call": ({"bias": torch.randn(N, B, H, L, K)}, {"bias": 0}),
    "bias of every call, one entry": ({"bias": torch.randn(1, H, L, N, K)}, {"bias": 3}),
    "bias of all calls": ({"bias": torch.randn(1, H, L, K)}, {}),
    "bias of all calls, per entry": ({"bias": torch.randn(B, 1, 1, K)}, {}),
    "mask and slopes per entry": ({"mask": torch.rand(B, 1, L, K) > 0.3, "alibi_slopes": torch.rand(B, H)}, {}),
    "offsets": ({"q_offset": torch.tensor([1, 4])}, {}),
    "sinks": ({"sinks": torch.randn(H)}, {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k_heads", [H, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("case", OPERANDS)
def test_vmap_runs_once(case, k_heads, backend, calls):
    operands, dims = OPERANDS[case]
    names = list(operands)

    def function(q, k, v, *values):
        options = dict(zip(names, values, strict=True))
        return attention(q, k, v, causal=True, softcap=3.0, return_lse=True, backend=backend, **options)

    def gradients(*args):
        def loss(q, k, v):
            out, lse = function(q, k, v, *args[3:])
            return (out.square().sum() + lse.nan_to_num(neginf=0.0).sum()) * 0.1

        return torch.func.grad(loss, argnums=(0, 1, 2))(*args[:3])

    args = [torch.randn(N, B, H, L, D), torch.randn(B, N, k_heads, K, D), torch.randn(B, k_heads, K, D)]
    args += operands.values()
    in_dims = (0, 1, None, *(dims.get(name) for name in names))
    actual = torch.func.vmap(function, in_dims=in_dims)(*args)
    assert len(calls) == 1
    assert_one_by_one(actual, function, in_dims, args)
    actual = torch.func.vmap(gradients, in_dims=in_dims)(*args)
    assert_one_by_one(actual, gradients, in_dims, args)


def test_vmap_over_sinks_runs_one_call_after_the_other(calls):
    q, k, sinks = torch.randn(B, H, L, D), torch.randn(B, H, K, D), torch.randn(N, H)

    def function(sinks, q, k):
        return (attention(q, k, k, sinks=sinks, backend="reference"),)

    (actual,) = torch.func.vmap(function, in_dims=(0, None, None))(sinks, q, k)
    assert len(calls) == N
    assert_one_by_one([actual], function, (0, None, None), [sinks, q, k])


@pytest.mark.parametrize("options", [{}, {"bias": torch.randn(1, H, L, K, requires_grad=True)}], ids=["plain", "bias"])
def test_batched_gradients(options):
    """`is_grads_batched` and vectorised Jacobians."""
    inputs = [torch.randn(B, H, n, D) for n in (L, K, K)]
    dout = torch.randn(N, B, H, L, D)

    def gradients(dtype, batched):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs, *options.values())]
        bias = dict(zip(options, leaves[3:], strict=True))
        out = attention(*leaves[:3], causal=True, backend="reference", **bias)
        if batched:
            return torch.autograd.grad(out, leaves, dout.to(dtype), is_grads_batched=True)
        each = [torch.autograd.grad(out, leaves, x, retain_graph=True) for x in dout.to(dtype)]
        return [torch.stack(x) for x in zip(*each, strict=True)]

    exact, eager = gradients(torch.float64, False), gradients(torch.float32, False)
    for name, *results in zip("qkvb", gradients(torch.float32, True), exact, eager, strict=False):
        assert_parity(*results, name)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_vectorised_jacobian(backend):
    """Of one batch entry: what the forward pass has stored is the same memory for every row."""
    x = torch.randn(1, 1, 3, 16)

    def function(x):
        return attention(x, x, x, backend=backend if x.dtype == torch.float32 else "reference")

    jacobian = torch.autograd.functional.jacobian
    assert_parity(jacobian(function, x, vectorize=True), jacobian(function, x.double()), jacobian(function, x))
