"""Hooks on modules: one keeps torch.nn from bypassing attention; `is_hooked` finds the others."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["block_fast_path", "is_hooked", "unblock_fast_path"]


def block_fast_path(module: nn.MultiheadAttention) -> None:
    """Make every torch.nn.TransformerEncoderLayer that holds `module` call it, in evaluation too.

    In evaluation that layer runs one fused operator, which reads the weights of `self_attn` and never calls it. It does
    not if a module inside it has a hook, which must be called. So this sets a hook that does nothing.
    """
    module.register_forward_pre_hook(_inert)


def unblock_fast_path(module: nn.MultiheadAttention) -> None:
    """Undo `block_fast_path`."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _inert:
            del module._forward_pre_hooks[key]


def _inert(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing. At module level, so that it is pickled by name."""


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook, or an override of `forward`, sees what the module takes or returns."""
    return bool(
        module._forward_hooks
        or any(hook is not _inert for hook in module._forward_pre_hooks.values())
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
