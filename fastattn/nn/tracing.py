"""How torch.fx and TorchScript treat the layers that replace torch.nn's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from torch import nn
from torch.fx import Proxy

__all__ = ["fx_leaf", "refuse_torchscript"]

Forward = TypeVar("Forward", bound=Callable[..., Any])


def fx_leaf(forward: Forward) -> Forward:
    """A `forward` that `torch.fx.symbolic_trace` records as one call of the module.

    torch.fx does so for every module in the package torch.nn and traces into all others, but it cannot trace the checks
    of a layer.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Proxy):
            return first.tracer.create_proxy("call_module", _path(first.tracer, self), args, kwargs)
        return forward(self, *args, **kwargs)

    return cast(Forward, wrapped)


def _path(tracer: Any, module: nn.Module) -> str:
    if not hasattr(tracer, "path_of_module"):
        raise RuntimeError(f"{type(module).__name__}: expected a torch.fx.Tracer, got {type(tracer).__name__}")
    path = tracer.path_of_module(module)
    if not path:
        raise RuntimeError(
            f"{type(module).__name__}: expected a module that holds it, since torch.fx records it as one call, "
            "got the layer itself; wrap it in torch.nn.Sequential"
        )
    return path


def refuse_torchscript(module: nn.Module) -> NoReturn:
    """Raise the error for `torch.jit.script` of a layer."""
    raise RuntimeError(
        f"fastattn's {type(module).__name__} cannot be compiled by torch.jit.script: "
        "use torch.export or torch.compile, or fastattn.revert(model) first"
    )
