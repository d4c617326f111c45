"""The operators for PyTorch's dispatcher: flat argument lists, results, and the shapes that tracing needs.

A schema has no structures, so a call's named groups are flattened. Only `flatten` and `unflatten` know the order: it is
the order of the fields of the NamedTuples below, from which `arguments` also makes the schema strings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.library import Library

from fastattn.spec import CacheSpec, Gradients, Inputs, Operands, Options

LIBRARY = Library("fastattn", "DEF")


class Forward(NamedTuple):
    """The arguments of ``fastattn::attention_forward``, whose results are (out, lse, statistics)."""

    q: Tensor
    k: Tensor
    v: Tensor
    operands: Operands
    options: Options
    backend: str


class Backward(NamedTuple):
    """The arguments of ``fastattn::attention_backward``, whose results are the fields of `fastattn.spec.Gradients`."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    statistics: Tensor
    operands: Operands
    options: Options
    backend: str
    wanted: list[bool]
    """one flag for each field of `fastattn.spec.Learned`"""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that are no operands."""
        return self.dout, self.dlse, self.q, self.k, self.v, self.out, self.statistics


class DoubleBackward(NamedTuple):
    """The arguments of ``fastattn::attention_double_backward``.

    Its results are the derivatives of out and lse along ``direction``, and, if ``dout`` is given, the ``wanted``
    gradients for the fields of `fastattn.spec.Inputs`.
    """

    direction: Inputs
    dout: Tensor | None
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    operands: Operands
    options: Options
    wanted: list[bool]


class CacheCall(NamedTuple):
    """The arguments of ``fastattn::attention_kvcache``, whose results are (out, lse)."""

    spec: CacheSpec
    backend: str


_GROUPS = (Operands, Options, Inputs, CacheSpec)
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[bool]: "bool[]",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    Any: "Tensor?",  # the fields of Inputs, here the direction of a derivative
}
_FIELDS: dict[Any, dict[str, Any]] = {
    kind: get_type_hints(kind) for kind in (Forward, Backward, DoubleBackward, CacheCall, *_GROUPS)
}


def _places(kind: type) -> list[tuple[Any, Any]]:
    """For each field of a call: the class of its group, or None, and its place among the arguments of the operator."""
    places, start = [], 0
    for hint in _FIELDS[kind].values():
        size = len(_FIELDS[hint]) if hint in _GROUPS else 1
        places.append((hint._make, slice(start, start + size)) if hint in _GROUPS else (None, start))
        start += size
    return places


_PLACES = {kind: _places(kind) for kind in (Forward, Backward, DoubleBackward, CacheCall)}
_Call = TypeVar("_Call", Forward, Backward, DoubleBackward, CacheCall)


def flatten(call: Forward | Backward | DoubleBackward | CacheCall) -> tuple[Any, ...]:
    """The arguments of the operator."""
    flat: list[Any] = []
    for value in call:
        if isinstance(value, _GROUPS):
            flat.extend(value)
        else:
            flat.append(value)
    return tuple(flat)


def unflatten(kind: type[_Call], flat: Sequence[Any]) -> _Call:
    """The call that has these arguments. It also takes other data per argument, such as whether it needs a gradient."""
    return kind(*[flat[place] if make is None else make(flat[place]) for make, place in _PLACES[kind]])


def arguments(kind: type) -> str:
    """The argument list of a schema."""
    parts = []
    for name, hint in _FIELDS[kind].items():
        if hint in _GROUPS:
            prefix = "t" if hint is Inputs else ""  # tq is the direction for q
            parts += [f"{_TYPES[of]} {prefix}{field}" for field, of in _FIELDS[hint].items()]
        else:
            parts.append(f"{_TYPES[hint]} {name}")
    return ", ".join(parts)


def define(schema: str) -> Any:
    """Add an operator to the library and return it."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.fastattn, schema.partition("(")[0]).default


# Results. Kernels fill them; tracing asks only for their shapes.


def empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (B, H, L, D), stored as (B, L, H, D) if ``like`` is, so that merging heads stays a view."""
    if shape == like.shape and like.is_contiguous():
        return torch.empty_like(like)  # half the cost of the calls below
    if heads_last(like):
        return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)
    return like.new_empty(shape)


def heads_last(x: Tensor) -> bool:
    """Whether (B, H, L, D) is stored as (B, L, H, D)."""
    return x.shape[1] > 1 and x.stride(1) < x.stride(2)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def out_and_lse(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv), and lse (B, Hq, Lq) in float32, or float64 for float64 inputs."""
    batch, heads, length, _ = q.shape
    out = empty_heads(q, (batch, heads, length, v_dim))
    return out, q.new_empty((batch, heads, length), dtype=lse_dtype(q.dtype))


def forward_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and statistics (2, B, Hq, Lq) of the softmax, which the backward pass of the same backend needs."""
    out, lse = out_and_lse(q, v.shape[3])
    return out, lse, lse.new_empty((2, *lse.shape))


def call_gradients(call: Backward) -> Gradients:
    """The gradients, None where not wanted."""
    dq, dk, dv = empty_heads(call.q, call.q.shape), empty_heads(call.k, call.k.shape), empty_heads(call.v, call.v.shape)
    if not any(call.wanted):
        return Gradients(dq, dk, dv)
    learned = (call.operands.bias, call.operands.alibi_slopes, call.operands.sinks)
    wanted = zip(learned, call.wanted, strict=True)
    return Gradients(dq, dk, dv, *(x.new_empty(x.shape) if x is not None and want else None for x, want in wanted))


def backward_results(call: Backward) -> tuple[Tensor, ...]:
    """The gradients; an unwanted one is empty, because an operator cannot return None."""
    return tuple(call.q.new_empty(0) if x is None else x for x in call_gradients(call))


def double_backward_results(call: DoubleBackward) -> tuple[Tensor, ...]:
    """tout, tlse and gradients; unwanted ones are empty."""
    inputs = Inputs(
        call.q, call.k, call.v, call.operands.bias, call.operands.alibi_slopes, call.operands.sinks
    )  # fmt: skip
    empties = Inputs(*(empty_heads,) * 3, *(Tensor.new_empty,) * 3)
    gradients = (
        call.q.new_empty(0) if x is None or call.dout is None or not want else empty(x, x.shape)
        for x, want, empty in zip(inputs, call.wanted, empties, strict=True)
    )
    return *out_and_lse(call.q, call.v.shape[3]), *gradients


def cache_results(spec: CacheSpec, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse; lse is empty for the torch backend, which has none."""
    out, lse = out_and_lse(spec.q, spec.v_cache.shape[3])
    return out, lse.new_empty(0) if backend == "torch" else lse
