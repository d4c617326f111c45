"""vmap over attention: what one call after the other gives, in one call where no operand forbids it."""

import pytest
import torch

from fastattn import attention, backends

B, H, L, K, D, N = 2, 4, 5, 7, 8, 3


def one_by_one(function, in_dims, args):
    results = [
        function(*(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))
        for n in range(N)
    ]
    return [torch.stack(x) for x in zip(*results, strict=True)]


@pytest.fixture
def calls(monkeypatch):
    """How often the reference ran forward."""
    found = []
    run = backends.reference.forward
    monkeypatch.setattr(backends.reference, "forward", lambda *args: found.append(1) or run(*args))
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


@pytest.mark.parametrize("k_heads", [H, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("case", OPERANDS)
def test_vmap_runs_once(case, k_heads, calls):
    operands, dims = OPERANDS[case]
    names = list(operands)

    def function(q, k, v, *values):
        options = dict(zip(names, values, strict=True))
        return attention(q, k, v, causal=True, softcap=3.0, return_lse=True, backend="reference", **options)

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
    torch.testing.assert_close(list(actual), one_by_one(function, in_dims, args))
    actual = torch.func.vmap(gradients, in_dims=in_dims)(*args)
    torch.testing.assert_close(list(actual), one_by_one(gradients, in_dims, args))


def test_vmap_over_sinks_runs_one_call_after_the_other(calls):
    q, k, sinks = torch.randn(B, H, L, D), torch.randn(B, H, K, D), torch.randn(N, H)

    def function(sinks):
        return (attention(q, k, k, sinks=sinks, backend="reference"),)

    (actual,) = torch.func.vmap(function)(sinks)
    assert len(calls) == N
    torch.testing.assert_close([actual], one_by_one(function, (0,), [sinks]))


@pytest.mark.parametrize("options", [{}, {"bias": torch.randn(1, H, L, K, requires_grad=True)}], ids=["plain", "bias"])
def test_batched_gradients(options):
    """`is_grads_batched` and vectorised Jacobians."""
    q, k, v = (torch.randn(B, H, n, D, requires_grad=True) for n in (L, K, K))
    out = attention(q, k, v, causal=True, backend="reference", **options)
    leaves = [q, k, v, *options.values()]
    dout = torch.randn(N, *out.shape)
    actual = torch.autograd.grad(out, leaves, dout, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, leaves, x, retain_graph=True) for x in dout]
    torch.testing.assert_close(list(actual), [torch.stack(x) for x in zip(*expected, strict=True)])


def test_vectorised_jacobian():
    x = torch.randn(1, 1, 3, 4)

    def function(x):
        return attention(x, x, x, backend="reference")

    plain, vectorised = (
        torch.autograd.functional.jacobian(function, x, vectorize=vectorize) for vectorize in (False, True)
    )
    torch.testing.assert_close(vectorised, plain)
