"""Attention as an operator with first and second derivatives; `implementations` has the code that it runs.

``fastattn::attention_forward`` and ``fastattn::attention_backward`` allocate the results and let a backend fill them.
The Autograd key of the forward operator has the derivatives; torch.compile does not look below it.
``fastattn::attention_double_backward`` computes second derivatives and derivatives along a direction (forward mode).
Every backend uses the reference's implementation of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from fastattn.ops import batching, implementations
from fastattn.ops.direct import DIRECT, Way, watched, way
from fastattn.ops.schema import (
    LIBRARY,
    Backward,
    DoubleBackward,
    Forward,
    arguments,
    backward_results,
    define,
    double_backward_results,
    flatten,
    forward_results,
    unflatten,
)
from fastattn.spec import Inputs, Learned, Operands, Options

FORWARD = define(f"attention_forward({arguments(Forward)}) -> (Tensor, Tensor, Tensor)")
BACKWARD = define(f"attention_backward({arguments(Backward)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
DOUBLE_BACKWARD = define(
    f"attention_double_backward({arguments(DoubleBackward)}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def draw_seed(device: torch.device) -> Tensor:
    """Draw one int64 from the device's default generator: no synchronisation, safe under CUDA graphs and
    checkpointing."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def seed_of_part(
    seed: Tensor, *, batch: int = 0, head: int = 0, rows: tuple[int, int] = (0, 1), keys: tuple[int, int] = (0, 1)
) -> Tensor:
    """The seed for a part of a larger call, made from `draw_seed`'s: dropout then keeps the same entries in both.

    ``batch`` and ``head`` are the first of the part; ``rows`` and ``keys`` are the first and the step to the next.
    """
    return torch.cat([seed, seed.new_tensor([batch, head, *rows, *keys])])


def attend(call: Forward, known: Way | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``call``, on any backend but torch's, with as little dispatching as possible.

    ``known``: the way of an earlier call whose tensors were of the same kinds, if nobody transforms this one.
    """
    direct = Way.DISPATCHER
    if call.backend in DIRECT:
        direct = way((call.q, call.k, call.v, *call.operands)) if known is None or watched() else known
    if direct is not Way.DISPATCHER:
        if direct is Way.AUTOGRAD:
            learned = (call.operands.bias, call.operands.alibi_slopes, call.operands.sinks)
            return _record(_AttentionAtOnce, call, call.q, call.k, call.v, *learned)
        out, lse, _ = implementations.run(call)
        return out, lse
    # torch.compile and dispatch modes must see the operator. torch.func must see an autograd Function, because it can
    # transform that but not an operator.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    out, lse, _ = (_Attention.apply if transformed else FORWARD)(*flatten(call))  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


# Autograd


def _forward_mode() -> bool:
    """Whether a tensor may carry a tangent."""
    return forward_ad._current_level >= 0


def _differentiating() -> bool:
    """Whether autograd may differentiate through the result of a derivative."""
    return torch.is_grad_enabled() or _forward_mode() or torch._C._are_functorch_transforms_active()


def below_autograd(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def call_backward(call: Backward, at_once: bool = False) -> tuple[Tensor, ...]:
    """Call `BACKWARD`, and record it only if there may be a graph (create_graph=True).

    ``at_once``: the tensors that the forward pass saved need no dispatcher.
    """
    if _differentiating():
        return _AttentionBackward.apply(*flatten(call))  # pyright: ignore[reportReturnType]
    asked = (call.dout, call.dlse) if at_once else (*call.tensors, *call.operands)
    if way(asked) is Way.AT_ONCE:
        return implementations.differentiate(call)  # pyright: ignore[reportReturnType]  (None where nobody looks)
    return _run_backward(*flatten(call))


def _call_double_backward(call: DoubleBackward) -> tuple[Tensor, ...]:
    """Call `DOUBLE_BACKWARD`, and record it only if there may be a graph."""
    return (_AttentionDoubleBackward.apply if _differentiating() else _run_double_backward)(*flatten(call))


def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    return below_autograd(FORWARD, *args)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return below_autograd(BACKWARD, *args)


def _run_double_backward(*args: Any) -> tuple[Tensor, ...]:
    return below_autograd(DOUBLE_BACKWARD, *args)


def _save(ctx: Any, operands: Operands, options: Options, *tensors: Tensor | None) -> None:
    """Save what a derivative needs. The tensors of a block mask are saved too, so that hooks see them and autograd
    notices changes."""
    *single, block_mask = operands
    ctx.save_for_backward(*tensors, *single, *block_mask)
    if _forward_mode():
        ctx.save_for_forward(*tensors, *single, *block_mask)
    ctx.options, ctx.count = options, len(tensors)
    ctx.set_materialize_grads(False)  # without a gradient of lse, none is computed


def _saved(ctx: Any) -> tuple[Any, ...]:
    """(*tensors, operands), as `_save` stored them."""
    saved = ctx.saved_tensors
    rest = ctx.count + len(Operands._fields) - 1  # the last one is block_mask
    return *saved[: ctx.count], Operands._make([*saved[ctx.count : rest], list(saved[rest:])])


_NO_OPERANDS = Operands(block_mask=None)  # pyright: ignore[reportArgumentType]  (gradients of operands: None for each)
_NO_OPTIONS = Options._make(None for _ in Options._fields)


def _operand_gradients(gradients: Any, wanted: Any) -> Operands:
    """Spread the gradients (bias, alibi_slopes, sinks) over all operands; None if not wanted."""
    bias, slopes, sinks = (x if want else None for x, want in zip(gradients, wanted, strict=True))
    return _NO_OPERANDS._replace(bias=bias, alibi_slopes=slopes, sinks=sinks)


def _learned(operands: Operands) -> Learned:
    """The fields of the operands that have gradients."""
    return Learned(operands.bias, operands.alibi_slopes, operands.sinks)


_LEARNED = _learned(unflatten(Forward, range(99)).operands)  # their places among the arguments


def _keep(ctx: Any, call: Forward, out: Tensor, statistics: Tensor) -> None:
    """Save what the derivatives of the forward operator need."""
    _save(ctx, call.operands, call.options, call.q, call.k, call.v, out, statistics)
    ctx.backend = call.backend


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, wanted: Sequence[bool], at_once: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and of the ``wanted`` fields of Learned, from a context that `_keep` filled.

    ``at_once`` as in `call_backward`.
    """
    if dout is None and dlse is None:
        return (None,) * 6
    q, k, v, out, statistics, operands = _saved(ctx)
    if dout is None:
        dout = torch.zeros_like(out)
    if _differentiating():  # out and statistics count as constants
        out, statistics = out.detach(), statistics.detach()
    dq, dk, dv, *learned = call_backward(
        Backward(dout, dlse, q, k, v, out, statistics, operands, ctx.options, ctx.backend, list(wanted)), at_once
    )
    if not any(wanted):
        return dq, dk, dv, None, None, None
    return dq, dk, dv, *(x if want else None for x, want in zip(learned, wanted, strict=True))


class _Attention(batching.Batched):
    """The derivatives of the forward operator, outputs (out, lse, statistics)."""

    operator_call = Forward
    forward = staticmethod(_run_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        out, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        _keep(ctx, unflatten(Forward, inputs), out, statistics)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        wanted = Learned(*(ctx.needs_input_grad[index] for index in _LEARNED))
        dq, dk, dv, *learned = _gradients(ctx, dout, dlse, wanted, at_once=False)
        if not any(wanted):
            return dq, dk, dv, *(None,) * (len(ctx.needs_input_grad) - 3)
        return flatten(Forward(dq, dk, dv, _operand_gradients(learned, wanted), _NO_OPTIONS, None))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, _, _, operands = _saved(ctx)
        t = unflatten(Forward, tangents)
        direction = Inputs(t.q, t.k, t.v, *_learned(t.operands))
        tout, tlse, *_ = _call_double_backward(
            DoubleBackward(direction, None, None, q, k, v, operands, ctx.options, [False] * 6)
        )
        return tout, tlse, None


class _AttentionAtOnce(torch.autograd.Function):
    """The forward operator without the dispatcher, for calls that only autograd records.

    The arguments are the call and its tensors that may have gradients; the results are out and lse.
    """

    @staticmethod
    def forward(ctx: Any, call: Forward, *_: Tensor | None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, lse, statistics = implementations.run(call)
        _keep(ctx, call, out, statistics)
        ctx.kept_as_is = _top_saved_tensors_default_hooks(False) is None
        return out, lse

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _call, _q, _k, _v, *wanted = ctx.needs_input_grad
        return None, *_gradients(ctx, dout, dlse, wanted, ctx.kept_as_is)


class _AttentionBackward(batching.Batched):
    """The derivatives of the backward operator, outputs (dq, dk, dv, dbias, dalibi_slopes, dsinks).

    out and statistics, which the forward pass stored, count as constants: the formulas include their dependence on the
    inputs.
    """

    operator_call = Backward
    forward = staticmethod(_run_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = unflatten(Backward, inputs)
        _save(ctx, call.operands, call.options, *call.tensors)
        ctx.backend, ctx.wanted = call.backend, call.wanted

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *direction: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = unflatten(Backward, ctx.needs_input_grad)
        if all(x is None for x in direction):
            return (None,) * len(ctx.needs_input_grad)
        dout, dlse, q, k, v, _, _, operands = _saved(ctx)
        tq, tk, tv, *learned = direction
        # A gradient that nobody asked for is an empty tensor; its own incoming gradient means nothing.
        given = Inputs(tq, tk, tv, *(x if w else None for x, w in zip(learned, ctx.wanted, strict=True)))
        wanted = Inputs(needed.q, needed.k, needed.v, *_learned(needed.operands))
        tout, tlse, *results = _call_double_backward(
            DoubleBackward(given, dout, dlse, q, k, v, operands, ctx.options, list(wanted))
        )
        dq, dk, dv, *others = (x if want else None for x, want in zip(results, wanted, strict=True))
        return flatten(
            Backward(
                tout, None if dlse is None else tlse, dq, dk, dv, None, None,  # pyright: ignore[reportArgumentType]
                _operand_gradients(others, _learned(needed.operands)), _NO_OPTIONS, None, None,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The symmetric Hessian times the direction, plus the gradients for the tangents of dout and dlse."""
        dout, dlse, q, k, v, out, statistics, operands = _saved(ctx)
        t = unflatten(Backward, tangents)
        direction = Inputs(t.q, t.k, t.v, *_learned(t.operands))
        wanted = [True, True, True, *ctx.wanted]
        _, _, *results = _call_double_backward(
            DoubleBackward(direction, dout, dlse, q, k, v, operands, ctx.options, wanted)
        )
        if t.dout is not None or t.dlse is not None:
            tdout = torch.zeros_like(out) if t.dout is None else t.dout
            more = call_backward(
                Backward(
                    tdout, t.dlse, q, k, v, out, statistics, operands, ctx.options, ctx.backend, list(ctx.wanted)
                )
            )  # fmt: skip
            results = [x + y for x, y in zip(results, more, strict=True)]
        return tuple(results)


class _AttentionDoubleBackward(batching.Batched):
    """The derivative of a derivative along a direction; a third derivative is an error.

    It raises when asked. Results off the graph would be wrong: a further derivative would take them for constants.
    """

    operator_call = DoubleBackward
    forward = staticmethod(_run_double_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = unflatten(DoubleBackward, inputs)
        _save(ctx, call.operands, call.options, *call.direction, call.dout, call.q, call.k, call.v)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, tout: Tensor | None, tlse: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *direction, dout, q, k, v, operands = _saved(ctx)
        needed = unflatten(DoubleBackward, ctx.needs_input_grad)
        if dout is not None:
            raise RuntimeError(_THRICE)
        if tout is None and tlse is None:
            return (None,) * len(ctx.needs_input_grad)
        if tout is None:
            tout = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        out, statistics = constants(Forward(q, k, v, operands, ctx.options, "reference"))
        directed = needed.direction
        direct = call_backward(
            Backward(
                tout, tlse, q, k, v, out, statistics, operands, ctx.options, "reference",
                [directed.bias, directed.alibi_slopes, directed.sinks],
            )
        )  # fmt: skip
        wanted = Inputs(needed.q, needed.k, needed.v, *_learned(needed.operands))
        _, _, *results = _call_double_backward(
            DoubleBackward(Inputs(*direction), tout, tlse, q, k, v, operands, ctx.options, list(wanted))
        )
        dq, dk, dv, *learned = (x if want else None for x, want in zip(results, wanted, strict=True))
        through = Inputs(*(x if need else None for x, need in zip(direct, directed, strict=True)))
        return flatten(
            DoubleBackward(
                through, None, None, dq, dk, dv, _operand_gradients(learned, _learned(needed.operands)),  # pyright: ignore[reportArgumentType]
                _NO_OPTIONS, None,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(_FORWARD_TWICE)


_THRICE = "fastattn: attention can be differentiated twice, not three times; fastattn.reference.attention can"
_FORWARD_TWICE = (
    "fastattn: forward mode cannot differentiate a forward-mode derivative of attention again; "
    "use fastattn.reference.attention, or differentiate backward (torch.autograd.grad, torch.func.grad) instead"
)


def constants(call: Forward) -> tuple[Tensor, Tensor]:
    """out and statistics for a derivative, computed outside its graph."""
    with torch.no_grad():
        out, _, statistics = _Attention.apply(*flatten(call))
    return out, statistics


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _forward_mode() or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)):
        return _record(_Attention, *args)
    return below_autograd(FORWARD, *args)


def _record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without its checks, which cost as much as a small call. The caller has ruled out torch.func.

    The call is private to PyTorch: it skips `torch.autograd.Function.apply`. Tested with PyTorch 2.11 and 2.13.
    """
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


LIBRARY.impl("attention_forward", implementations.forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", implementations.backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_double_backward", implementations.double_backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_forward", _forward_autograd, "Autograd")
LIBRARY.impl("attention_backward", batching.legacy_rule(Backward, BACKWARD), "Batched")
LIBRARY.impl("attention_double_backward", batching.legacy_rule(DoubleBackward, DOUBLE_BACKWARD), "Batched")
torch.library.register_fake("fastattn::attention_forward", lambda q, k, v, *_: forward_results(q, v), lib=LIBRARY)
torch.library.register_fake(
    "fastattn::attention_backward", lambda *args: backward_results(unflatten(Backward, args)), lib=LIBRARY
)
torch.library.register_fake(
    "fastattn::attention_double_backward",
    lambda *args: double_backward_results(unflatten(DoubleBackward, args)),
    lib=LIBRARY,
)
