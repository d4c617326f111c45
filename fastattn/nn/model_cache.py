"""A model allocates a cache of its own shape and refuses one of another shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import _check as check
from fastattn.nn.cache import KVCache
from fastattn.nn.paged_cache import SlidingWindowCache


def allocate(
    kind: Callable[..., KVCache],
    sizes: tuple[int, int, int, int, int],
    *,
    like: Tensor,
    model_window: int | None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> KVCache:
    """A cache of `kind`, which is a class or a `functools.partial` of one.

    Args:
        sizes: num_layers, batch, capacity, num_kv_heads, head_dim.
        like: a parameter. Unless the caller chooses them, its dtype and device apply until the first keys arrive.
        model_window: the left side of the model's window, for a `SlidingWindowCache` without a window of its own.
        dtype, options: arguments of `kind`; they override those of a partial.
    """
    given: dict[str, Any] = {}
    cls: Any = kind
    while isinstance(cls, functools.partial):
        cls, given = cls.func, cls.keywords | given
    if not callable(cls) or (isinstance(cls, type) and not issubclass(cls, KVCache)):
        got = f"the class {cls.__name__}" if isinstance(cls, type) else type(cls).__name__
        raise TypeError(f"kind: expected KVCache, a subclass of it, or functools.partial of one, got {got}")
    if dtype is not None:
        options["dtype"] = dtype
    given = given | options
    if isinstance(cls, type) and issubclass(cls, SlidingWindowCache) and given.get("window") is None:
        if model_window is None:
            raise ValueError("window: expected one, since the model has none, for a SlidingWindowCache, got None")
        options["window"] = model_window
    chosen = given.get("dtype") is not None
    if not chosen:
        device = like.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        guess = torch.get_autocast_dtype(device) if autocast else like.dtype
        options["dtype"] = guess if guess.is_floating_point else None
    if given.get("device") is None:
        options["device"] = like.device if like.device.type != "meta" else None
    cache = kind(*sizes, **options)
    cache.provisional = not chosen
    return cache


def check_cache(cache: KVCache, num_layers: int, x: Tensor) -> None:
    """Refuse a cache that does not fit a stack of this many layers and x (N, L, E)."""
    check.instance("cache", cache, KVCache)
    if len(cache.k) != num_layers:
        raise ValueError(f"cache: expected one of {num_layers} layers, as the model has, got {len(cache.k)}")
    if cache.batch != x.shape[0]:
        raise ValueError(f"cache.batch: expected {x.shape[0]} as the input has, got {cache.batch}")


def escaped(x: Tensor) -> Tensor:
    """x, or a copy that works outside `torch.inference_mode` too."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
