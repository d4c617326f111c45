"""What is particular to gradients: their shapes, what flows in, what is asked for, and that repeats are bit-equal.

That every gradient is right over shapes, masks, biases, strides and dropout stands in test_forward.py, whose checks
hold out, lse and all gradients of one call to the rule at once.
"""

import itertools

import pytest
import torch

from fastattn import BlockMask, attention, attention_varlen
from fastattn.testing import assert_parity, check_attention
from tests.support.attention_cases import (
    DTYPE_NAMES,
    HALF,
    KERNEL_DTYPES,
    LAYOUTS,
    LENGTHS,
    SINGLE,
    make_bias,
    make_mask,
    make_qkv,
    relayout,
)

INPUTS = ("q", "k", "v", "bias")


def leaves_for(device, **options):
    return tuple(x.requires_grad_() for x in make_qkv(device, **options))


def gradients(leaves, dout, backend, dlse=None, **options):
    """Gradients of `leaves` = (q, k, v) or (q, k, v, bias)."""
    names = dict(zip(INPUTS, leaves, strict=False))
    out = attention(*leaves[:3], bias=names.get("bias"), return_lse=dlse is not None, backend=backend, **options)
    if dlse is None:
        return torch.autograd.grad(out, leaves, dout)
    return torch.autograd.grad(out, leaves, (dout, dlse))


def by_hand(leaves, dout, dtype):
    """The same without mask or grouping, by eager PyTorch in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves)
    out = torch.softmax(q @ k.mT * q.shape[3] ** -0.5, -1) @ v
    return torch.autograd.grad(out, (q, k, v), dout.to(dtype))


# What flows in, under strides that autograd produces: a sum gives an expanded gradient, a transposition others.
INCOMING = {
    "all_expanded": lambda shape: torch.ones(()).expand(shape),
    "rows_expanded": lambda shape: torch.randn(*shape[:2], 1, shape[3]).expand(shape),
    "heads_expanded": lambda shape: torch.randn(shape[0], 1, *shape[2:]).expand(shape),
    "every_second_batch_entry": lambda shape: torch.randn(2 * shape[0], *shape[1:])[::2],
    **{layout: lambda shape, layout=layout: relayout(torch.randn(shape), layout) for layout in LAYOUTS[1:]},
}


@pytest.mark.parametrize("incoming", INCOMING)
def test_incoming_gradient_of_any_strides(device, backend, incoming):
    leaves = leaves_for(device, lengths=(33, 70))
    dout = INCOMING[incoming]((1, 2, 33, 16)).to(HALF).to(device)
    exact, eager = by_hand(leaves, dout, torch.float64), by_hand(leaves, dout, HALF)
    for name, *results in zip(("dq", "dk", "dv"), gradients(leaves, dout, backend), exact, eager, strict=True):
        assert_parity(*results, name)


def test_the_same_values_under_other_strides_give_the_same_bits(device, backend):
    leaves = leaves_for(device, lengths=(33, 70))
    dout = torch.randn(1, 2, 33, 16).to(device, HALF)
    expected = gradients(leaves, dout, backend)
    for layout in LAYOUTS[1:]:
        for ours, theirs in zip(gradients(leaves, relayout(dout, layout), backend), expected, strict=True):
            assert torch.equal(ours, theirs), layout


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "qk", "vb"])
def test_any_subset_of_the_inputs_may_want_a_gradient(device, backend, wanted):
    q, k, v = make_qkv(device, (33, 70))
    leaves = (q, k, v, make_bias(device, (2, 33, 70)))
    dout = torch.randn(q.shape).to(device, HALF)
    expected = gradients(tuple(x.clone().requires_grad_() for x in leaves), dout, backend)
    asked = tuple(x.clone().requires_grad_(name[0] in wanted) for name, x in zip(INPUTS, leaves, strict=True))
    out = attention(*asked[:3], bias=asked[3], backend=backend)
    out.backward(dout)
    for name, leaf, gradient in zip(INPUTS, asked, expected, strict=True):
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, gradient), name
        else:
            assert leaf.grad is None, name


def test_nothing_is_saved_without_a_gradient(device, backend):
    leaves = leaves_for(device)
    assert attention(*(x.detach() for x in leaves), backend=backend).grad_fn is None
    with torch.no_grad():
        assert attention(*leaves, backend=backend).grad_fn is None
    with torch.inference_mode():
        assert not attention(*leaves, backend=backend).requires_grad


def test_a_gradient_through_lse_alone(device, backend):
    """d lse / dv is exactly 0; d lse / ds is the softmax."""
    leaves = leaves_for(device, lengths=(33, 70), dtype=SINGLE)
    dlse = torch.randn(1, 2, 33).to(device)

    def by_hand(dtype):
        q, k = (x.detach().to(dtype).requires_grad_() for x in leaves[:2])
        return torch.autograd.grad(torch.logsumexp(q @ k.mT / 4.0, -1), (q, k), dlse.to(dtype))

    _, lse = attention(*leaves, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(lse, leaves, dlse)
    assert not dv.any()
    for name, *results in zip(("dq", "dk"), (dq, dk), by_hand(torch.float64), by_hand(SINGLE), strict=True):
        assert_parity(*results, name)


@pytest.mark.parametrize("case", ["plain", "grouped", "dropout", "softcap", "alibi", "bias", "block_mask", "packed"])
def test_dk_and_dv_from_a_pass_each_have_the_same_bits(device, case, monkeypatch):
    """Large head dims take two passes over the queries, smaller ones take one."""
    from fastattn.kernels import config, launch

    architecture = launch.architecture(torch.device(device))
    if config.key_passes(architecture, 256) == ("dkdv",):
        pytest.skip(f"{architecture} has one pass for all head dims")
    q, k, v = leaves_for(device, lengths=(150, 150), heads=(4, 2) if case == "grouped" else (2, 2))
    dout = torch.randn(q.shape).to(device, HALF)
    options = {
        "dropout": {"dropout_p": 0.3}, "softcap": {"softcap": 5.0, "causal": True},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1]).to(device)}, "bias": {"bias": make_bias(device, (150, 150))},
        "block_mask": {"block_mask": BlockMask.from_mask(torch.ones(150, 150).tril().bool().to(device))},
    }.get(case, {"causal": True})  # fmt: skip

    def run():
        torch.manual_seed(3)
        if case == "packed":
            cu = torch.tensor([0, 40, 150], dtype=torch.int32, device=device)
            tokens = (x[0].transpose(0, 1) for x in (q, k, v))
            out = attention_varlen(*tokens, cu, cu, causal=True, backend="triton")
            return torch.autograd.grad(out, (k, v), dout[0].transpose(0, 1))
        return torch.autograd.grad(attention(q, k, v, backend="triton", **options), (k, v), dout)

    apart, together = ("dk", "dv"), ("dkdv",)
    results = []
    for passes in (apart, together):
        monkeypatch.setattr(config, "key_passes", lambda *_, passes=passes: passes)
        results.append(run())
    for name, ours, theirs in zip(("dk", "dv"), *results, strict=True):
        assert torch.equal(ours, theirs), name


def test_an_unused_lse_changes_no_bit(device, backend):
    leaves = leaves_for(device)
    dout = torch.randn(1, 2, LENGTHS[0], 16).to(device, HALF)
    without = gradients(leaves, dout, backend, causal=True)
    out, _ = attention(*leaves, causal=True, return_lse=True, backend=backend)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, dout), without, strict=True):
        assert torch.equal(ours, theirs)
    zero = torch.zeros(1, 2, LENGTHS[0], device=device)
    for ours, theirs in zip(gradients(leaves, dout, backend, dlse=zero, causal=True), without, strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_of_a_bias_that_was_broadcast_by_the_caller(device, backend):
    """A (heads,) parameter, viewed and expanded: autograd reduces what the kernel returns."""
    q, k, v = make_qkv(device, (33, 70))
    slope = torch.randn(2).to(device).requires_grad_()
    distance = torch.arange(70, device=device) - torch.arange(33, device=device)[:, None]
    bias = slope[:, None, None] * distance
    check_attention(q, k, v, backend=backend, bias=bias)
    attention(q, k, v, bias=bias, backend=backend).float().square().sum().backward()
    assert slope.grad.shape == (2,) and slope.grad.isfinite().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=DTYPE_NAMES.get)
def test_backward_repeats_bit_for_bit(device, backend, dtype):
    bias = make_bias(device, (2, 1, 70), requires_grad=True)
    leaves = (*leaves_for(device, lengths=(33, 70), dtype=dtype), bias)
    dout = torch.randn(1, 2, 33, 16).to(device, dtype)
    options = {"causal": True, "mask": make_mask(device, (1, 1, 1, 70)), "dropout_p": 0.2}

    def run():
        torch.manual_seed(7)
        return gradients(leaves, dout, backend, **options)

    for name, ours, theirs in zip(INPUTS, run(), run(), strict=True):
        assert torch.equal(ours, theirs), name


def test_backward_of_a_batch_entry_does_not_depend_on_the_others(device, backend):
    q, k, v = (x.detach() for x in leaves_for(device, batch=3))
    dout = torch.randn(3, 2, LENGTHS[0], 16).to(device, HALF)

    def run(q, k, v, dout):
        return gradients(tuple(x.clone().requires_grad_() for x in (q, k, v)), dout, backend, causal=True)

    together, alone = run(q, k, v, dout), run(*(x[1:2] for x in (q, k, v, dout)))
    poisoned = [x.clone() for x in (q, k, v, dout)]
    for x in poisoned:
        x[0] = torch.nan
        x[2] = torch.inf
    for ours, single, beside_nan in zip(together, alone, run(*poisoned), strict=True):
        assert torch.equal(ours[1:2], single)
        assert torch.equal(ours[1:2], beside_nan[1:2])


def test_gradients_accumulate_over_calls(device, backend):
    """Two calls on the same leaves, as a layer that is used twice."""
    leaves = leaves_for(device, lengths=(33, 33))
    dout = torch.randn(1, 2, 33, 16).to(device, HALF)
    single = gradients(leaves, dout, backend)
    for _ in range(2):
        attention(*leaves, backend=backend).backward(dout)
    for leaf, gradient in zip(leaves, single, strict=True):
        assert torch.equal(leaf.grad, gradient + gradient)


def test_self_attention_on_one_tensor(device, backend):
    """q, k and v are the same tensor; its gradient is the sum of three, in whichever order autograd adds them."""
    x = torch.randn(1, 2, LENGTHS[0], 16).to(device, SINGLE).requires_grad_()
    dout = torch.randn(x.shape).to(device)
    parts = gradients(tuple(x.detach().clone().requires_grad_() for _ in range(3)), dout, backend)
    attention(x, x, x, backend=backend).backward(dout)
    assert any(torch.equal(x.grad, a + b + c) for a, b, c in itertools.permutations(parts))


def test_retained_graph_gives_the_same_again(device, backend):
    leaves = leaves_for(device, lengths=(33, 70))
    out = attention(*leaves, dropout_p=0.3, backend=backend)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    torch.rand(10, device=device)  # dropout must not be drawn anew
    for ours, theirs in zip(torch.autograd.grad(out, leaves, dout), first, strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointing_draws_the_same_dropout(device, backend):
    leaves = leaves_for(device, lengths=(33, 70))
    dout = torch.randn(1, 2, 33, 16).to(device, HALF)

    def call(*leaves):
        return attention(*leaves, dropout_p=0.3, backend=backend)

    torch.manual_seed(3)
    plain = torch.autograd.grad(call(*leaves), leaves, dout)
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, dout), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_saved_tensors_do_not_include_the_scores(device, backend):
    """Memory for backward is linear in the lengths: inputs, out and statistics."""
    saved = []
    leaves = leaves_for(device, lengths=(200, 300), heads=(1, 1), dims=(8, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(*leaves, causal=True, dropout_p=0.1, backend=backend)
    assert sum(x.numel() for x in saved) <= 2 * 200 * 8 + 2 * 300 * 8 + 2 * 200 + 1


def test_inputs_and_incoming_gradient_stay_as_they_are(device, backend):
    tensors = {
        **dict(zip("qkv", make_qkv(device, (33, 70)), strict=True)),
        "bias": make_bias(device, (2, 33, 70)),
        "mask": make_mask(device, (33, 70)),
        "q_offset": torch.tensor([3], device=device),
        "dout": torch.randn(1, 2, 33, 16).to(device, HALF),
        "dlse": torch.randn(1, 2, 33).to(device),
    }
    before = {name: x.clone() for name, x in tensors.items()}
    leaves = tuple(tensors[name].requires_grad_() for name in INPUTS)
    for scale in (0.3, -0.3):
        gradients(
            leaves, tensors["dout"], backend, dlse=tensors["dlse"], causal=True, mask=tensors["mask"], dropout_p=0.2,
            q_offset=tensors["q_offset"], scale=scale,
        )  # fmt: skip
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("length", [1, 2, 5, 17, 128])
@pytest.mark.parametrize("dim", [16, 32, 64])
def test_large_inputs_do_not_overflow(device, backend, dim, length):
    """Rows past the end of a sequence once overflowed in a published kernel (inputs 5q, 3k, 3v in fp16)."""
    heads = (1, 1) if length == 128 else (2, 2)
    q, k, v = make_qkv(device, (length, length), dims=(dim, dim), heads=heads, batch=1)
    check_attention(q * 5, k * 3, v * 3, backend=backend)


def test_hooks_see_each_gradient_once(device, backend):
    leaves, seen = leaves_for(device, lengths=(33, 70)), []
    for name, leaf in zip("qkv", leaves, strict=True):
        leaf.register_hook(lambda gradient, name=name: seen.append((name, gradient.shape)))
    attention(*leaves, backend=backend).sum().backward()
    assert sorted(seen) == [(name, leaf.shape) for name, leaf in sorted(zip("qkv", leaves, strict=True))]
