"""The implementations of the attention operators: they allocate the results and let a backend fill them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.direct import without_autocast
from fastattn.ops.schema import (
    Backward,
    DoubleBackward,
    Forward,
    call_gradients,
    double_backward_results,
    forward_results,
    unflatten,
)
from fastattn.spec import Gradients, Inputs
from fastattn.spec.checks import check_scale_value


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run(unflatten(Forward, args))


def run(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    check_scale_value(call.options.scale)
    out, lse, statistics = forward_results(call.q, call.v)
    if call.operands.cu_seqlens_q is not None:
        rows = unwritten(call.operands.cu_seqlens_q, call.backend)
        if rows.start < call.q.shape[2]:
            out[:, :, rows].zero_()
            lse[..., rows].fill_(-torch.inf)
            statistics[..., rows].zero_()
    with without_autocast(call.q.device):
        backends.module(call.backend).forward(
            out, lse, statistics, call.q, call.k, call.v, call.operands, call.options
        )  # fmt: skip
    return out, lse, statistics


def repeated(call: Forward) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` on the cpu backend without operands but a mask, for tensors of the sizes, dtypes and strides of ``call``'s.

    It takes q, k, v and a mask or None, outside of autocast, and gives out and lse.
    """
    check_scale_value(call.options.scale)
    forward = backends.cpu.repeated_forward(call.options)

    def run_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, statistics = forward_results(q, v)
        forward(out, lse, statistics, q, k, v, mask)
        return out, lse

    return run_again


def backward(*args: Any) -> tuple[Tensor, ...]:
    call = unflatten(Backward, args)
    return tuple(call.q.new_empty(0) if x is None else x for x in differentiate(call))


def unwritten(starts: Tensor, backend: str) -> slice:
    """The packed rows that a backend may leave unwritten: those after the last sequence, or between sequences too."""
    return slice(int(starts[-1]) if backend == "cpu" else 0, None)


def differentiate(call: Backward) -> Gradients:
    gradients = call_gradients(call)
    starts_q, starts_k = call.operands.cu_seqlens_q, call.operands.cu_seqlens_k
    if starts_q is not None and starts_k is not None:
        rows, keys = unwritten(starts_q, call.backend), unwritten(starts_k, call.backend)
        if call.operands.seqused_k is not None:  # rows between sequences too
            keys = slice(0, None)
        for gradient, own in ((gradients.dq, rows), (gradients.dk, keys), (gradients.dv, keys)):
            if own.start < gradient.shape[2]:
                gradient[:, :, own].zero_()
    statistics = call.statistics.contiguous()  # vmap expands tensors that all entries share
    with without_autocast(call.q.device):
        backends.module(call.backend).backward(
            gradients, call.dout, call.dlse, call.q, call.k, call.v, call.out, statistics, call.operands, call.options
        )  # fmt: skip
    return gradients


def double_backward(*args: Any) -> tuple[Tensor, ...]:
    call = unflatten(DoubleBackward, args)
    given = call.direction
    q, k, v = (
        torch.zeros_like(x) if t is None else t
        for t, x in zip((given.q, given.k, given.v), (call.q, call.k, call.v), strict=True)
    )
    tout, tlse, *gradients = results = double_backward_results(call)
    if call.operands.cu_seqlens_q is not None:
        for x in results:
            x.zero_()
    fill = (g if want and call.dout is not None else None for g, want in zip(gradients, call.wanted, strict=True))
    with without_autocast(call.q.device):
        backends.module("reference").double_backward(
            tout, tlse, Inputs(*fill), given._replace(q=q, k=k, v=v), call.dout, call.dlse, call.q, call.k, call.v,
            call.operands, call.options,
        )  # fmt: skip
    return results
