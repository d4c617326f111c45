"""vmap over the attention operators: one call on a larger batch unless an operand forbids it, else one call per entry.

`torch.func.vmap` uses the rule of an autograd Function. `torch.autograd.grad(..., is_grads_batched=True)` uses an older
vmap, which calls the dispatcher; `legacy_rule` serves it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastattn.ops.schema import Backward, DoubleBackward, Forward, flatten, unflatten
from fastattn.spec import Operands

# PyTorch has no public names for these. Tested with PyTorch 2.11 and 2.13.
_C: Any = torch._C
_is_batched = _C._functorch.is_legacy_batchedtensor
_add_batch_dim, _remove_batch_dim = _C._VariableFunctions._add_batch_dim, _C._VariableFunctions._remove_batch_dim

_Run = Callable[..., tuple[Tensor, ...]]
_STATISTICS = 1  # the batch dimension of the statistics; all other tensors have 0


def batched(kind: Any, run: _Run, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """(results of ``run``, the batch dimension of each); ``in_dims`` are the batch dimensions of the arguments."""
    if kind is not DoubleBackward:
        dims, call = unflatten(kind, in_dims), unflatten(kind, args)
        if _folds(dims, call):
            return _fold(run, size, dims, call)
    calls = [
        run(
            *(
                x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(size)
    ]
    results = tuple(torch.stack(x) for x in zip(*calls, strict=True))
    return results, (0,) * len(results)


def _folds(dims: Any, call: Any) -> bool:
    """Whether the vmapped dimension can become part of the batch.

    It cannot if every entry has its own sinks, nor with packed sequences, nor with dropout, whose bits depend on the
    batch entry, nor if a backward pass sums gradients of operands over the batch.
    """
    operands = call.operands
    return (
        operands.seed is None
        and operands.cu_seqlens_q is None
        and dims.operands.sinks is None
        and (not operands.block_mask or operands.block_mask[0].shape[0] == 1)
        and not (isinstance(call, Backward) and any(call.wanted))
    )


def _fold(run: _Run, size: int, dims: Any, call: Any) -> tuple[Any, Any]:
    batch = call.q.shape[0 if dims.q is None or dims.q > 0 else 1]

    def merged(x: Tensor | None, dim: int | None, place: int = 0, full: int | None = None) -> Tensor | None:
        """Merge the vmapped dimension of ``x`` into its batch dimension ``place``; repeat ``x`` if it has no vmapped
        dimension."""
        if x is None or (dim is None and full is None):
            return x
        x = x.unsqueeze(place) if dim is None else x.movedim(dim, place)
        shape = list(x.shape)
        shape[place] = size
        shape[place + 1] = shape[place + 1] if full is None else full
        return x.expand(shape).flatten(place, place + 1)

    def operand(x: Tensor | None, dim: int | None) -> Tensor | None:
        """Merge a tensor that is shared by all entries, or has one slice per entry."""
        if x is None or (dim is None and x.shape[0] == 1):
            return x
        return merged(x, dim, full=batch)

    old, where = call.operands, dims.operands
    changes = {
        name: operand(getattr(old, name), getattr(where, name)) for name in ("mask", "bias", "alibi_slopes")
    }  # fmt: skip
    for name in ("q_offset_tensor", "kv_start"):
        if getattr(old, name) is not None:
            changes[name] = merged(getattr(old, name), getattr(where, name), full=batch)
    operands: Operands = old._replace(**changes)
    tensors = {}
    for name in call._fields:
        value = getattr(call, name)
        if isinstance(value, Tensor):
            place = _STATISTICS if name == "statistics" else 0
            tensors[name] = merged(value, getattr(dims, name), place, full=batch)
    results = run(*flatten(call._replace(operands=operands, **tensors)))
    places = (0, 0, _STATISTICS) if isinstance(call, Forward) else (0, 0, 0, None, None, None)
    unfolded = tuple(
        x if place is None else x.unflatten(place, (size, batch)) for x, place in zip(results, places, strict=True)
    )
    return unfolded, places


class Batched(torch.autograd.Function):
    """A Function over the arguments of an operator, with a rule for `torch.func.vmap`."""

    operator_call: ClassVar[type[Forward] | type[Backward] | type[DoubleBackward]]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return batched(cls.operator_call, cls.apply, info.batch_size, in_dims, args)


def one_by_one(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call ``run`` on each entry of ``x`` that the older vmap has batched; on ``x`` itself if there is none."""
    if not _is_batched(x):
        return run(x)
    level = _legacy_level()
    return _add_batch_dim(torch.stack([run(one) for one in _remove_batch_dim(x, level, 1, 0)]), 0, level)


def _legacy_level() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def legacy_rule(kind: Any, operator: Any) -> _Run:
    """The implementation of ``operator`` for tensors that the older vmap has batched."""

    def rule(*args: Any) -> tuple[Tensor, ...]:
        level = _legacy_level()
        is_batched = [isinstance(x, Tensor) and _is_batched(x) for x in args]
        plain = tuple(_remove_batch_dim(x, level, 1, 0) if own else x for x, own in zip(args, is_batched, strict=True))
        size = next(x.shape[0] for x, own in zip(plain, is_batched, strict=True) if own)
        in_dims = tuple(
            [None] * len(x) if isinstance(x, list) and x and isinstance(x[0], Tensor) else 0 if own else None
            for x, own in zip(args, is_batched, strict=True)
        )
        results, out_dims = batched(kind, operator, size, in_dims, plain)
        return tuple(
            x if dim is None else _add_batch_dim(x, dim, level) for x, dim in zip(results, out_dims, strict=True)
        )

    return rule
