"""Decide whether a call of an operator needs the dispatcher; if not, call its implementation directly.

On a small input, going through the dispatcher and back into Python costs more than the kernel itself.

PyTorch has no public names for what this asks of it. Tested with PyTorch 2.11 and 2.13.
"""

import contextlib
from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,  # pyright: ignore[reportAttributeAccessIssue]
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

_dispatch_keys = torch._C._dispatch_keys


DIRECT = ("triton", "cpu", "cuda")
"""Backends whose kernels may be so quick that the dispatcher's time matters."""


class Way(Enum):
    """How a call reaches the implementation of its operator."""

    AT_ONCE = 0
    """directly: nobody records or transforms it"""
    AUTOGRAD = 1
    """through autograd only: nobody else records or transforms it"""
    DISPATCHER = 2


_plain: set[int] = set()
"""The sets of dispatch keys that plain tensors have, also in inference mode, on every device seen so far. A tensor that
something wraps or views in a special way has other keys."""
_devices: set[str] = set()


def _is_plain(x: Tensor) -> bool:
    keys = _dispatch_keys(x).raw_repr()
    if keys in _plain:
        return True
    device = x.device.type
    if device in _devices:
        return False
    _devices.add(device)
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain.add(_dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return keys in _plain


def watched() -> bool:
    """Whether somebody wants to see the operators that are called; the dispatch keys do not show it."""
    return _profiler_enabled() or _len_torch_function_stack() > 0


def way(operands: Iterable[object]) -> Way:
    """The way for a call with these operands; an operand may be a tensor, a list of tensors or anything else."""
    if (
        torch.compiler.is_compiling()
        or watched()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    ):
        return Way.DISPATCHER
    recorded = False
    for x in operands:
        if x is None:
            continue
        if isinstance(x, Tensor):
            if _dispatch_keys(x).raw_repr() not in _plain and not _is_plain(x):  # usually decided without a call
                return Way.DISPATCHER
            recorded = recorded or x.requires_grad
        elif x and isinstance(x, list) and not all(_is_plain(item) for item in x if isinstance(item, Tensor)):
            return Way.DISPATCHER
    return Way.AUTOGRAD if recorded and torch.is_grad_enabled() else Way.AT_ONCE


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turn autocast off: the spec has cast the inputs already, and a backend's float32 results must stay float32."""
    # The first test covers all devices in a fraction of the time. PyTorch refuses the second one for meta tensors.
    if _is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
