"""Calls without tensors besides q, k, v and a mask: checked once, and from then on handed straight over.

On a tiny input, checks and choice cost more than attention itself. For such a call they depend only on the numbers and
shapes of its key, and on what PyTorch's own guard compares of a tensor: type, dtype, device, sizes, whether it needs a
gradient, and the dispatch keys, which autocast, modes, transforms and traces change. So a call with an equal key and
equal guards passes the same checks and goes to the same backend.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from fastattn import backends, ops
from fastattn.spec import AttentionSpec, Operands, Options
from fastattn.spec.checks import check_scale

try:  # private to PyTorch, tested with 2.11 and 2.13; without it no call is remembered
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_Key = tuple[Any, ...]
_Guard = Callable[[object], bool]
_MOST = 1024  # then all are forgotten, so that lengths that change with every call do not fill the memory
_MOST_ALIKE = 4  # calls with one key, whose guards differ


class _Call(NamedTuple):
    """What the kernel takes besides q, k, v and the mask."""

    backend: str
    way: ops.Way
    options: Options
    repeat: Callable[..., tuple[Tensor, Tensor]] | None
    """(out, lse) from q, k, v and the mask, where nobody watches or records"""
    mask_index: tuple[None, ...]
    """gives the mask the dimensions of size 1 that it lacks"""
    torch_options: dict[str, Any]
    """what PyTorch's kernel would not do unasked: to pass an option costs it as much as a few checks here"""


_calls: dict[_Key, tuple[tuple[_Guard, _Guard, _Guard, _Guard | None, _Call], ...]] = {}
"""The guards are those of q, k, v and the mask."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, q_offset: int | Tensor | None,
    scale: float | None, grouped: bool, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, return_lse: bool = False,
) -> tuple[_Key | None, Any]:  # fmt: skip
    """(key of the call, to be given to `remember`, or None where it has none; its result if the call is known).

    The result is out, with ``return_lse`` (out, lse).
    """
    if is_compiling() or forward_ad._current_level >= 0:
        return None, None
    try:
        # Types too: True and 1 are equal keys, and 1 is refused where a bool belongs.
        if not (
            type(causal) is type(grouped) is type(return_lse) is bool
            and type(q_offset) in _INT
            and type(scale) in _FLOAT
            and type(softcap) in _FLOAT
            and (window is None or all(type(x) in _INT for x in window))
        ):
            return None, None
        # A nested tensor has no shape. This keeps it from the guards, which end the process for it.
        key = (
            q.shape, k.shape, v.shape, None if mask is None else mask.shape, causal, q_offset, scale, grouped, window,
            softcap, return_lse, is_grad_enabled(),
        )  # fmt: skip
        alike = _calls.get(key, ())
    except (AttributeError, RuntimeError, TypeError):  # the checks say what is wrong; symbolic sizes have no hash
        return None, None
    for guard_q, guard_k, guard_v, guard_mask, call in alike:
        if guard_q(q) and guard_k(k) and guard_v(v) and (guard_mask is None or guard_mask(mask)):
            backend, way, options, repeat, mask_index, torch_options = call
            if repeat is not None and not ops.watched():
                out, lse = repeat(q, k, v, mask)
                return key, (out, lse) if return_lse else out
            if mask is not None and mask_index:
                mask = mask[mask_index]
            if backend == "torch":
                if mask is None:
                    out = torch_sdpa(q, k, v, **torch_options)
                else:
                    out = torch_sdpa(q, k, v, mask, **torch_options)
                if out.requires_grad:
                    ops.add_second_derivative(out)
                return key, out
            out, lse = ops.attend(ops.Forward(q, k, v, Operands(mask), options, backend), way)
            return key, (out, lse) if return_lse else out
    return key, None


_INT = (int, type(None))
_FLOAT = (float, type(None))


def remember(key: _Key | None, spec: AttentionSpec, backend: str) -> None:
    """Remember the choice for a call, if the kernel takes its tensors unchanged and the layout alone decided."""
    if key is None or TensorGuards is None or torch._C._is_any_autocast_enabled():
        return
    q, k, v, mask = spec.q, spec.k, spec.v, spec.mask
    given = key[3]
    # A call of another kind would have other guards, but whoever observes it must see the full way.
    if (way := ops.way((q, k, v, mask))) is ops.Way.DISPATCHER or not type(q) is type(k) is type(v) is Tensor:
        return
    if spec.bias is not None or (mask is None) != (given is None) or (mask is not None and type(mask) is not Tensor):
        return
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return
    if backend == "torch":
        # PyTorch's function does not join a mask and causal order.
        plain = q.is_cpu and q.shape[3] == v.shape[3] and (mask is None or spec.right is None)
    else:
        plain = backend == "cpu" or (backend == "triton" and not backends.cuda_may_serve_unasked())
    if not plain:
        return
    missing = 0
    if mask is not None:
        # PyTorch's kernel takes a mask (Lq, Lk) as it is; others need all four dimensions.
        as_it_is = backend == "torch" and given == (q.shape[2], k.shape[2])
        missing = 0 if as_it_is else 4 - len(given)
    torch_options: dict[str, Any] = {}
    if spec.right is not None:
        torch_options["is_causal"] = True
    if spec.options.scale != check_scale(None, q.shape[3]):
        torch_options["scale"] = spec.options.scale
    if q.shape[1] != k.shape[1]:
        torch_options["enable_gqa"] = True
    repeat = None
    if backend == "cpu" and way is ops.Way.AT_ONCE:
        repeat = ops.repeated(ops.Forward(q, k, v, Operands(mask), spec.options, backend))
    guard_q, guard_k, guard_v = (
        _guard(x, x.shape, [None, None, None, 1] if repeat is None else x.stride()) for x in (q, k, v)
    )
    guard_mask = None
    if mask is not None:
        free = [None] * len(given)
        guard_mask = _guard(mask, given, free if repeat is None else mask.stride()[4 - len(given) :])
    if len(_calls) >= _MOST:
        _calls.clear()
    call = _Call(backend, way, spec.options, repeat, (None,) * missing, torch_options)
    others = _calls.get(key, ())[: _MOST_ALIKE - 1]
    _calls[key] = ((guard_q, guard_k, guard_v, guard_mask, call), *others)


def _guard(x: Tensor, sizes: Sequence[int], strides: Sequence[int | None]) -> _Guard:
    """Whether another object is a tensor of the same kind as x, of these sizes and strides; None allows any."""
    assert TensorGuards is not None
    guards: Any = TensorGuards  # its types leave the arguments out
    return guards(x, dynamic_dims_sizes=[list(sizes)], dynamic_dims_strides=[list(strides)]).check
