"""Second derivatives, derivatives along a direction, torch.func: held to differences and to the definition."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastattn import BlockMask, attention, attention_varlen, explain, ops, reference
from fastattn.backends.reference import blockwise
from fastattn.backends.reference.blockwise import BLOCK_ELEMENTS
from fastattn.ops import torch_kernel
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from fastattn.testing.calls import orders_of
from fastattn.testing.rounding import effects
from tests.support.attention_cases import DOUBLE, INF, SINGLE

Q_LEN, KV_LEN, HEADS = 4, 5, 2


def leaf(*shape, dtype=DOUBLE, device="cpu"):
    return torch.randn(shape).to(device, dtype).requires_grad_()


def leaves(kv_heads=HEADS, batch=1):
    return leaf(batch, HEADS, Q_LEN, 3), leaf(batch, kv_heads, KV_LEN, 3), leaf(batch, kv_heads, KV_LEN, 2)


def random_mask():
    mask = torch.rand(1, 1, Q_LEN, KV_LEN) > 0.4
    mask[:, :, 1] = False  # a row with nothing allowed
    return mask


# Name -> (fixed arguments, learned ones).
CASES = {
    "plain": lambda: ({}, {}),
    "causal with offset": lambda: ({"causal": True, "q_offset": 2}, {}),
    "offsets": lambda: ({"causal": True, "q_offset": torch.tensor([1])}, {}),
    "window": lambda: ({"window": (1, 1), "q_offset": 1}, {}),
    "rows with nothing allowed": lambda: ({"window": (0, 0), "q_offset": -2}, {}),
    "mask": lambda: ({"mask": random_mask()}, {}),
    "block mask": lambda: ({"block_mask": BlockMask.from_mask(random_mask()), "causal": True, "q_offset": 2}, {}),
    "bias": lambda: ({}, {"bias": leaf(1, HEADS, Q_LEN, KV_LEN)}),
    "broadcast bias": lambda: ({"causal": True}, {"bias": leaf(HEADS, 1, KV_LEN)}),
    "softcap": lambda: ({"softcap": 0.8}, {}),
    "slopes": lambda: ({"causal": True}, {"alibi_slopes": leaf(HEADS)}),
    "sinks": lambda: ({"mask": random_mask()}, {"sinks": leaf(HEADS)}),
    "dropout": lambda: ({"dropout_p": 0.4}, {}),
    "scale": lambda: ({"scale": -0.7}, {}),
    "everything": lambda: (
        {"mask": random_mask(), "softcap": 1.5, "dropout_p": 0.3, "window": (3, 1)},
        {"bias": leaf(1, 1, Q_LEN, KV_LEN), "alibi_slopes": leaf(1, HEADS), "sinks": leaf(HEADS)},
    ),
}


def function_of_leaves(case, return_lse=True):
    """(function of q, k, v and what is learned, names of what is learned, its values); dropout as by a fixed seed."""
    fixed, learned = CASES[case]()

    def function(q, k, v, *values):
        torch.manual_seed(3)
        options = fixed | dict(zip(learned, values, strict=True))
        results = attention(q, k, v, return_lse=return_lse, backend="reference", **options)
        if not return_lse:
            return results
        out, lse = results
        return out, lse.masked_fill(lse.detach() == -INF, 0.0)

    return function, tuple(learned.values())


def inside(case):
    return leaves(kv_heads=1 if case in ("plain", "everything") else HEADS)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_and_directions(case):
    """gradgradcheck, directions against differences, and directions of gradients; all through lse also.

    One random direction for each input shows a wrong derivative; all of them, for one case, also show where.
    """
    function, learned = function_of_leaves(case)
    inputs = (*inside(case), *learned)
    fast = case != "plain"
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=fast)


@pytest.mark.parametrize("case", ["plain", "dropout"])
def test_second_derivatives_without_lse(case):
    function, learned = function_of_leaves(case, return_lse=False)
    assert gradgradcheck(function, (*inside(case), *learned), fast_mode=True)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_packed_sequences(per_sequence):
    """One is empty, one has no keys, and rows are left behind the last."""
    cu_q, cu_k = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([0, 3, 4, 4, 6])
    slopes = leaf(4, HEADS) if per_sequence else leaf(HEADS)

    def function(q, k, v, slopes, sinks):
        torch.manual_seed(3)
        options = {"alibi_slopes": slopes, "sinks": sinks} if per_sequence else {"alibi_slopes": slopes}
        out, lse = attention_varlen(
            q, k, v, cu_q, cu_k, causal=True, dropout_p=0.2, return_lse=True, backend="reference", **options
        )
        return out, lse.masked_fill(lse.detach() == -INF, 0.0)

    inputs = (leaf(6, HEADS, 3), leaf(7, 1, 3), leaf(7, 1, 2), slopes, leaf(HEADS).requires_grad_(per_sequence))
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


def test_rows_with_nothing_allowed_stay_zero():
    q, k, v = leaves()
    mask = torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)
    mask[0] = True
    out = attention(q, k, v, mask=mask, backend="reference")
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in second)
    assert not second[0][:, :, 1:].any()


def second_gradients(function, inputs, dout, dlse, directions):
    """Gradients of the product of the first gradients with ``directions``."""
    out, lse = function(*inputs)
    dout = dout.to(out.dtype)
    first = torch.autograd.grad((out, lse), inputs, (dout, dlse.to(lse.dtype)), create_graph=True)
    return torch.autograd.grad(first, inputs, [x.to(y.dtype) for x, y in zip(directions, first, strict=True)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["plain", "terms"])
def test_second_derivatives_of_every_backend(backend, dtype, case, device, monkeypatch):
    """In blocks of few rows. The peer is the definition in the same dtype."""
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 4000)
    shapes = ((1, 4, 33, 16), (1, 2, 70, 16), (1, 2, 70, 16))
    values = [torch.randn(shape).to(device, dtype) for shape in shapes]
    fixed, names = {"causal": True}, ()
    if case == "terms":
        fixed = {"window": (20, 3), "softcap": 2.0, "dropout_p": 0.2}
        names = ("bias", "alibi_slopes", "sinks")
        values += [torch.randn(x).to(device) for x in ((4, 1, 70), (4,), (4,))]
    dout, dlse = (torch.randn(x).to(device) for x in ((1, 4, 33, 16), (1, 4, 33)))

    def ours(q, k, v, *learned):
        torch.manual_seed(5)
        options = fixed | dict(zip(names, learned, strict=True))
        return attention(q, k, v, backend=backend, return_lse=True, **options)

    def definition(q, k, v, *learned):
        torch.manual_seed(5)
        spec = make_spec(q, k, v, **fixed, **dict(zip(names, learned, strict=True)))
        return reference.attention(
            q, k, v, None, spec.bias, spec.alibi_slopes, spec.sinks, None, ops.draw_seed(q.device), left=spec.left,
            right=spec.right, q_offset=spec.q_offset, scale=spec.scale, softcap=spec.softcap, dropout_p=spec.dropout_p,
        )  # fmt: skip

    directions = [torch.randn_like(x) for x in values]

    def run(function, convert):
        inputs = [convert(x.detach()).requires_grad_() for x in values]
        return second_gradients(function, inputs, dout, dlse, directions)

    actual, exact, eager = (
        run(f, to) for f, to in ((ours, torch.clone), (definition, torch.Tensor.double), (definition, torch.clone))
    )
    for name, x, expected, peer in zip("qkvbas", actual, exact, eager, strict=False):
        assert x.dtype == values["qkvbas".index(name)].dtype
        assert_parity(x, expected, peer, name)


def test_a_gradient_penalty_trains(device):
    """As for a critic whose gradient is to have norm 1."""
    start = leaf(2, 2, 9, 8, device=device), leaf(8, 8, device=device)

    def penalty(function, dtype):
        x, weight = (y.detach().to(dtype).requires_grad_() for y in start)
        out = function(x @ weight, x, x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(out.mean() + (gradient.norm(dim=-1) - 1.0).square().mean(), weight)[0]

    def definition(q, k, v):
        return reference.attention(q, k, v, right=0, scale=8**-0.5)[0]

    actual = penalty(lambda q, k, v: attention(q, k, v, causal=True, backend="reference"), SINGLE)
    assert_parity(actual, penalty(definition, DOUBLE), penalty(definition, SINGLE))


def test_a_second_derivative_needs_no_wanted_first():
    """Of the bias alone, of dout alone: what nobody asked for is not computed and does not matter."""
    q, k, v = (x.detach() for x in leaves())
    bias, dout = leaf(1, HEADS, Q_LEN, KV_LEN), leaf(1, HEADS, Q_LEN, 2)
    assert gradgradcheck(lambda b: attention(q, k, v, bias=b, backend="reference"), (bias,))

    def gradient_and_tangent(dtype):
        query, key, value, upstream = (x.detach().to(dtype).requires_grad_() for x in (q, k, v, dout))
        (dk,) = torch.autograd.grad(attention(query, key, value, backend="reference"), key, upstream, create_graph=True)
        (gradient,) = torch.autograd.grad(dk.sum(), upstream)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(key, torch.ones_like(key))
            tangent = forward_ad.unpack_dual(attention(query, dual, value, backend="reference")).tangent
        assert tangent is not None
        return gradient, tangent

    (gradient, tangent), (_, exact) = gradient_and_tangent(SINGLE), gradient_and_tangent(DOUBLE)
    assert_parity(gradient, exact, tangent)


def scalar(q, k, v, **options):
    return attention(q, k, v, causal=True, **options).square().sum()


def defined_scalar(q, k, v):
    return reference.attention(q, k, v, right=0, q_offset=1, scale=3**-0.5)[0].square().sum()


# What torch.func computes -> (batch, call). A batch of many is judged as one result, so that luck evens out.
TRANSFORMS = {
    "grad of grad": (16, lambda f, q, t: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(q)),
    "jvp of grad": (16, lambda f, q, t: torch.func.jvp(torch.func.grad(f), (q,), (t,))[1]),
    "grad of jvp": (16, lambda f, q, t: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (t,))[1])(q)),
    "jvp": (16, lambda f, q, t: torch.func.jvp(f, (q,), (t,))[1]),
    "hessian": (1, lambda f, q, t: torch.func.hessian(f)(q)),
    "jacobian of a jacobian": (1, lambda f, q, t: torch.func.jacrev(torch.func.jacrev(f))(q)),
}


BACKENDS = (None, "reference")


def results_of_transform(call, q, k, v):
    """Ours of each of BACKENDS, the exact one, and those of eager PyTorch."""
    direction = torch.randn_like(q)

    def ours(backend):
        return lambda q: scalar(q, k.to(q.dtype), v.to(q.dtype), backend=backend)

    def definition(order):
        return lambda q: defined_scalar(q[..., order], k.to(q.dtype)[..., order], v.to(q.dtype))

    exact = call(definition(slice(None)), q, direction)
    eager = [call(definition(order), q.float(), direction.float()) for order in orders_of(q.shape[-1], q.device)]
    return [call(ours(backend), q.float(), direction.float()) for backend in BACKENDS], exact, eager


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name):
    batch, call = TRANSFORMS[name]
    results, exact, eager = results_of_transform(call, *(x.detach() for x in leaves(batch=batch)))
    for backend, actual in zip(BACKENDS, results, strict=True):
        assert_parity(actual, exact, eager, f"{name}, {backend}", intermediate=exact)


def test_torch_func_grad():
    """With what the rule grants a backward pass, which reads an output that was rounded."""
    q, k, v = (x.detach() for x in leaves(batch=16))
    results, *held_to = results_of_transform(lambda f, q, t: torch.func.grad(f)(q), q, k, v)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="reference")
    for backend, actual in zip(BACKENDS, results, strict=True):
        stored = attention(q.float(), k.float(), v.float(), causal=True, backend=backend)
        effect = effects({"q": q, "k": k, "v": v, "dout": 2.0 * out}, {"causal": True}, 0, out, lse, stored)["dq"]
        assert_parity(actual, *held_to, "grad", intermediate=effect.summed, stored=effect.stored)


def test_vmap():
    q, k, v = (x.detach() for x in leaves())
    queries, sinks = torch.randn(3, *q.shape), torch.randn(3, HEADS)

    def ours(q, sinks):
        return attention(q, k.to(q.dtype), v.to(q.dtype), causal=True, sinks=sinks, backend="reference")

    def one_by_one(dtype):
        leaf_queries = queries.to(dtype).requires_grad_()
        out = torch.stack([ours(*x) for x in zip(leaf_queries, sinks.to(dtype), strict=True)])
        return out, torch.autograd.grad(out.square().sum(), leaf_queries)[0]

    per_sample = torch.func.grad(lambda q, s: ours(q, s).square().sum())
    actual = (torch.func.vmap(function)(queries, sinks) for function in (ours, per_sample))
    for results in zip(actual, one_by_one(DOUBLE), one_by_one(SINGLE), strict=True):
        assert_parity(*results)


def test_beyond_two_is_refused_not_wrong():
    q, k, v = (x.detach() for x in leaves())

    def function(q):
        return scalar(q, k, v, backend="reference")

    def penalty(function):
        return lambda x: torch.func.grad(function)(x).square().sum()

    with pytest.raises(RuntimeError, match="not three times"):
        torch.func.grad(penalty(penalty(function)))(q)
    with pytest.raises(RuntimeError, match="forward mode cannot differentiate a forward-mode derivative"):
        torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (q,))[1], (q,), (q,))


def test_the_torch_backend_refuses_directions_and_is_not_chosen():
    q, k, v = (x.detach() for x in leaves())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        tangent = forward_ad.unpack_dual(attention(dual, k, v)).tangent
        assert tangent is not None and tangent.any()
        with pytest.raises(ValueError, match="forward mode"):
            attention(dual, k, v, backend="torch")


TORCH_CASES = {
    "plain": {},
    "causal": {"causal": True, "q_offset": 0},
    "scale": {"scale": 0.7},
    "mask of rows and keys": {"mask": torch.tensor([[True] * 4 + [False]] * 3 + [[False] * 5])},
    "mask of entries": {"mask": torch.tensor([True] * 3 + [False] * 2).view(1, 1, 1, KV_LEN)},
    "bias": {"bias": torch.linspace(-2, 2, KV_LEN).index_fill(0, torch.tensor([1]), -INF)},
}


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("case", TORCH_CASES)
def test_second_derivatives_through_pytorchs_kernel(case, kv_heads):
    """The reference's, where PyTorch's kernel has none; Dv is less than D here."""

    def function(*inputs):
        return attention(*inputs, backend="torch", **TORCH_CASES[case])

    inputs = leaves(kv_heads=kv_heads)
    assert function(*inputs).grad_fn.next_functions[0][0].name().startswith("ScaledDotProductFlashAttentionForCpu")
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_second_derivatives_of_small_plain_calls():
    """Also of one that is known; the first derivatives alone keep no graph."""
    q, k, v = leaf(1, HEADS, Q_LEN, 8), leaf(1, HEADS, KV_LEN, 8), leaf(1, HEADS, KV_LEN, 8)
    for _ in range(2):
        assert explain(q, k, v).backend == "torch"
        assert gradgradcheck(attention, (q, k, v), fast_mode=True)
        assert not any(x.requires_grad for x in torch.autograd.grad(attention(q, k, v).sum(), (q, k, v)))


def test_saved_tensors_that_are_elsewhere_when_the_gradients_are_on_the_graph():
    """Offloaded: second derivatives. Recomputed: the first, and an error with the cure for the second."""
    q = leaf(1, HEADS, Q_LEN, 8)

    def first(run):
        return torch.autograd.grad(run().square().sum(), q, create_graph=True)[0]

    def offloaded():
        with torch.autograd.graph.save_on_cpu():
            return attention(q, q, q)

    expected = first(lambda: attention(q, q, q, backend="reference"))
    second = torch.autograd.grad(expected.square().sum(), q)[0]
    actual = first(offloaded)
    assert torch.allclose(actual, expected)
    assert torch.allclose(torch.autograd.grad(actual.square().sum(), q)[0], second)
    actual = first(lambda: checkpoint(attention, q, q, q, use_reentrant=False))
    assert torch.allclose(actual, expected)
    with pytest.raises(RuntimeError, match=r"inside torch.utils.checkpoint; pass backend='reference'"):
        torch.autograd.grad(actual.square().sum(), q)
    actual = first(lambda: checkpoint(attention, q, q, q, backend="reference", use_reentrant=False))
    assert torch.allclose(torch.autograd.grad(actual.square().sum(), q)[0], second)


@pytest.mark.parametrize("absent", ["node", "saved tensors"])
def test_a_pytorch_with_other_names_has_first_derivatives_and_a_clear_error(absent, monkeypatch):
    q = leaf(1, HEADS, Q_LEN, 8)
    expected = torch.autograd.grad(attention(q, q, q).sum(), q)[0]
    if absent == "node":
        monkeypatch.setattr(torch_kernel, "_NODE", "of an older version")
    else:
        monkeypatch.setattr(torch._C, "_current_autograd_node", object)
    (first,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    assert torch.equal(first, expected)
    with pytest.raises(RuntimeError, match=r"on the torch backend .*pass backend='reference'"):
        torch.autograd.grad(first.square().sum(), q)


MEMORY = """
    import resource, sys, torch
    import fastattn
    from fastattn.backends.reference import blockwise

    blockwise.BLOCK_ELEMENTS = {block}

    def peak():  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def call(length):
        q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
        out = fastattn.attention(q, k, v, causal=True, dropout_p=0.1, softcap=5.0, backend="reference")
        gradients = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
        sum(x.square().sum() for x in gradients).backward()

    call(256)
    before = peak()
    call({length})
    print(peak() - before)
"""


def test_a_second_derivative_needs_memory_for_some_blocks_only():
    pytest.importorskip("resource", reason="no getrusage on this platform")
    length, block = 4096, BLOCK_ELEMENTS // 4
    source = textwrap.dedent(MEMORY).format(length=length, block=block)
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 10 * 4 * block < length * length * 4


def test_the_first_derivative_keeps_its_graph_empty():
    """Without create_graph nothing new runs: the gradients are leaves, and the backward operator is called once."""
    q, k, v = leaves()
    out = attention(q, k, v, backend="reference")
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(x.requires_grad for x in gradients)
