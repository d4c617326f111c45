"""What calls are held to, computed once for all backends and kernels that get the same call.

The specification and eager PyTorch's results in every order depend on the inputs alone, and take longer than most
kernels. They are looked up by every bit of every argument.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.testing import cache, calls

_MOST_BYTES = 200_000_000


def install() -> None:
    for module, name in ((calls, "specified"), (cache, "run_step")):
        setattr(module, name, _remembered(getattr(module, name)))


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    known: OrderedDict[bytes, Any] = OrderedDict()
    size = 0

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal size
        digest = hashlib.blake2b()
        if not _describe(args, digest.update):
            return function(*args)
        key = digest.digest()
        if key not in known:
            known[key] = function(*args)
            size += _bytes(known[key])
            while size > _MOST_BYTES:
                size -= _bytes(known.popitem(last=False)[1])
        return known[key]

    return call


def _bytes(results: Any) -> int:
    return results.nbytes if isinstance(results, Tensor) else sum(map(_bytes, results))


def _describe(x: Any, update: Callable[[bytes], None]) -> bool:
    """Whether ``x`` is made of tensors and plain values alone, which `update` gets then."""
    if isinstance(x, Tensor):
        update(repr((x.shape, x.stride(), x.dtype, x.device, x.requires_grad)).encode())
        update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return True
    if isinstance(x, dict):
        return _describe(tuple(x.items()), update)
    if isinstance(x, tuple | list):
        update(f"{type(x).__name__} {len(x)}".encode())
        return all(_describe(y, update) for y in x)
    update(repr(x).encode())
    return x is None or isinstance(x, bool | int | float | str)
