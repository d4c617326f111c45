"""What a CUDA graph does, on a CPU: operations are recorded without effect, and replayed on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graphs:
    """Makes them; ``captures`` counts those that succeeded, ``replays`` how often one ran."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """In place of `fastattn.inference.graphs.capture`."""
        recorder = _Recorder()
        try:
            with recorder:
                out = call()
        finally:
            for tensor, before in reversed(recorder.changed):
                tensor.copy_(before)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for operation, args, kwargs, results in recorder.operations:
                for old, new in zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay, out


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.changed: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        kwargs = kwargs or {}
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and (tensor := named[argument.name]) is not None:  # scales may be None
                self.changed.append((tensor, tensor.clone()))
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results
