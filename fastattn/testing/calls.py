"""Calls of `fastattn.attention` and `fastattn.attention_varlen`, held to the rule."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.backends.reference import definition
from fastattn.functional import Backend, attention, attention_varlen, explain
from fastattn.spec import make_spec
from fastattn.testing import rounding
from fastattn.testing.orders import OtherOrders
from fastattn.testing.rounding import learned_operands
from fastattn.testing.rule import assert_parity

ORDERS = 8
"""How often eager PyTorch computes a call of attention, each time with the head dim in another order."""


def run_specification(
    inputs: dict[str, Any], options: dict[str, Any], seed: int, dtype: torch.dtype, order: Tensor | None = None,
    sums: contextlib.AbstractContextManager[Any] | None = None, gradients: bool = True,
) -> list[Tensor]:  # fmt: skip
    """[out, lse, dq, dk, dv, ...] of `reference.attention` in ``dtype``; the head dim in this order on the way.

    ``sums``: within which the forward pass runs. Without ``gradients`` out and lse alone.
    """
    q, k, v = (inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v"))
    # Operands are promoted for float64; otherwise left in their own dtype, as eager code would.
    operands = {
        name: (x.detach().double() if dtype == torch.float64 else x.detach()).requires_grad_(x.requires_grad)
        for name, x in learned_operands(options).items()
    }
    leaves = [q, k, v, *(x for x in operands.values() if x.requires_grad)]
    spec = make_spec(q, k, v, **{**options, **operands})
    seed_tensor = None
    if spec.dropout_p > 0.0:
        torch.manual_seed(seed)
        seed_tensor = ops.draw_seed(q.device)
    in_order = (q, k) if order is None else (q[..., order], k[..., order])
    with sums or contextlib.nullcontext():
        out, lse = definition.attention(*in_order, v, spec.operands(seed_tensor), spec.options)
    found = [out, lse, *(_gradients(out, lse, leaves, inputs) if gradients else ())]
    return [x.detach() for x in found]


def specified(
    inputs: dict[str, Any], options: dict[str, Any], seed: int
) -> tuple[list[Tensor], list[list[Tensor]]]:  # fmt: skip
    """What results are held to: [out, lse, dq, dk, dv, ...] in float64, and those of eager PyTorch in each order.

    In float64 the specification is rounded as much as what it judges. Eager PyTorch that adds up in its order repeats
    its error, which then does not show; so there eager PyTorch adds up rows and keys in other orders, too.
    """
    q = inputs["q"]
    orders = orders_of(q.shape[-1], q.device)
    others = OtherOrders(torch.Generator().manual_seed(seed)) if q.dtype == torch.float64 else None
    eager = [run_specification(inputs, options, seed, q.dtype, order, others) for order in orders]
    if q.dtype.itemsize < 4:  # lse is never kept in half precision
        for one, order in zip(eager, orders, strict=True):
            one[1] = run_specification(inputs, options, seed, torch.float32, order, gradients=False)[1]
    return run_specification(inputs, options, seed, torch.float64), eager


def orders_of(head_dim: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    return [torch.randperm(head_dim, generator=generator).to(device) for _ in range(ORDERS)]


def _gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    dout, dlse = inputs["dout"].to(out.dtype), inputs.get("dlse")
    outputs, grads = [out], [dout]
    if dlse is not None:  # where a row is empty lse is -inf and has no gradient
        outputs, grads = [out, lse], [dout, dlse.to(lse.dtype).masked_fill(lse.detach() == -torch.inf, 0.0)]
    return list(torch.autograd.grad(outputs, leaves, grads))


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: Backend | None = None, seed: int = 0, lse_gradient: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """Hold `fastattn.attention` on ``backend`` to the rule: out, lse and every gradient, from one call.

    With ``cu_seqlens_q`` and ``cu_seqlens_k`` among the options, and ``seqused_k``, the same for
    `fastattn.attention_varlen`.

    Args:
        q, k, v: inputs as for the function, in the dtype under test.
        backend: as there.
        seed: seeds the gradients that flow in, and dropout.
        lse_gradient: also return lse and send a gradient through it.
        options: further arguments of `fastattn.attention`; the gradients of ``bias``, ``alibi_slopes`` and ``sinks``
            are checked where they require one.

    Raises:
        AssertionError: as `assert_parity`.
    """
    packed = "cu_seqlens_q" in options
    if packed:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    chosen = explain(q, k, v, return_lse=lse_gradient, **options).backend if not packed and backend is None else backend
    # PyTorch's sums are PyTorch's, and those of float64 have no better truth.
    sums = chosen != "torch" and v.dtype != torch.float64 and v.shape[3] > 1 and v.stride(3) != 0
    if sums:
        v = with_ones(v).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v}
    shape = (*q.shape[:3], v.shape[3])
    inputs["dout"] = torch.randn(shape, generator=generator).to(q.device, q.dtype)
    if sums:
        inputs["dout"][..., -1] = 1.0
    if lse_gradient:
        inputs["dlse"] = torch.randn(shape[:3], generator=generator).to(q.device)
    learned = {name: x for name, x in learned_operands(options).items() if x.requires_grad}
    leaves = [q, k, v, *learned.values()]

    torch.manual_seed(seed)
    function: Any = attention
    given = (q, k, v)
    if packed:
        function, given = attention_varlen, tuple(t[0].transpose(0, 1) for t in (q, k, v))
    results = function(*given, backend=backend, return_lse=lse_gradient, **options)
    out, lse = results if lse_gradient else (results, q.new_empty(0))
    if packed:
        out, lse = out.transpose(0, 1)[None], lse[None]
    gradients = _gradients(out, lse, leaves, inputs)
    actual = [out, lse, *gradients]
    hold_to_the_rule(actual, inputs, options, seed, lse_gradient, lse_alone=chosen == "torch", sums=sums)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in learned)]
    for name, leaf, gradient in zip(names, leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype, f"{name}: shape or dtype of its input"


def with_ones(v: Tensor) -> Tensor:
    """A copy of ``v`` with its strides, gaps between elements included, whose last column is 1."""
    storage = v.detach().untyped_storage().clone()
    copy = v.new_empty(0).set_(storage, v.storage_offset(), v.shape, v.stride())  # pyright: ignore[reportArgumentType]
    once = copy  # what is expanded has each element once
    for dim, stride in enumerate(v.stride()):
        once = once[(slice(None),) * dim + (slice(1),)] if stride == 0 else once
    once[..., -1] = 1.0
    return copy


def hold_to_the_rule(
    actual: list[Tensor], inputs: dict[str, Any], options: dict[str, Any], seed: int, lse_gradient: bool = True,
    lse_alone: bool = False, sums: bool = False,
) -> None:  # fmt: skip
    """Compare [out, lse, dq, dk, dv, ...], computed by whatever means, with the specification.

    ``sums``: the last column of v and of the gradient of out is 1, and the sums of the weights there are checked.
    """
    out = actual[0]
    learned = [name for name, x in learned_operands(options).items() if x.requires_grad]
    expected, eager = specified(inputs, options, seed)
    names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in learned)]
    if "cu_seqlens_q" in options:
        effects = rounding.packed_effects(inputs, options, seed, expected[0], expected[1], out)
    else:
        effects = rounding.effects(inputs, options, seed, expected[0], expected[1], out, lse_alone=lse_alone)
    for name, ours, exact, *plain in zip(names, actual, expected, *eager, strict=False):
        if name[1:] in learned and ours.dtype == torch.float64 != inputs["q"].dtype:
            ours = ours.float()  # computed in float32, whatever it is kept in
        if name != "lse" or lse_gradient:
            assert_parity(ours, exact, plain, name, *effects.get(name, ()))
    if sums:
        found = [_weight_sums(x) for x in (actual, expected, *eager)]
        for index, name in enumerate(("sums of the weights", "sums of the weights in the backward pass")):
            ours, exact, *plain = (x[index] for x in found)
            assert_parity(ours, exact, plain, name, exact)


def _weight_sums(results: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each row's weights (B, Hq, Lq), from out; of all weights of a key head (B, Hk), from dv."""
    out, dv = results[0], results[4]
    return out[..., -1], dv[..., -1].double().sum(-1).to(dv.dtype)
