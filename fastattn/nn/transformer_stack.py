"""Code that `TransformerEncoder` and `TransformerDecoder` share: the causal hint, and decoding steps with a cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import _check as check
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.model_cache import allocate, check_cache


def is_causal_mask(mask: Tensor | None, hint: bool | None, x: Tensor, layers: nn.ModuleList) -> bool:
    """The hint if there is one, else whether `mask` is the causal mask for the sequence `x`."""
    if hint is not None:
        return hint
    if mask is None or x.is_nested or torch.compiler.is_compiling():  # a compiled graph cannot branch on the mask
        return False
    seq_dim = 1 if x.dim() == 3 and is_batch_first(layers) else 0
    L = x.shape[seq_dim]
    if mask.shape != (L, L):
        return False
    causal_mask = nn.Transformer.generate_square_subsequent_mask(L, mask.device, mask.dtype)
    return bool((mask == causal_mask).all())


def is_batch_first(layers: nn.ModuleList) -> bool:
    return layers[0].self_attn.batch_first  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def empty_cache(
    layers: nn.ModuleList, kind_of_layer: type[nn.Module], batch: int, capacity: int, kind: Callable[..., KVCache],
    options: dict[str, Any],
) -> KVCache:  # fmt: skip
    """A cache for `next_step`. Every layer must be a ``kind_of_layer`` with that class's own methods."""
    for i, layer in enumerate(layers):
        changed = [
            name
            for name in ("forward", "_sa_block", "_mha_block")
            if getattr(type(layer), name, None) is not getattr(kind_of_layer, name, None)
        ]
        if not isinstance(layer, kind_of_layer) or changed:
            what = f"overrides {changed[0]}" if isinstance(layer, kind_of_layer) else f"is a {type(layer).__name__}"
            raise TypeError(f"make_cache: expected every layer to be a {kind_of_layer.__name__}, layer {i} {what}")
    attn = layers[0].self_attn
    assert isinstance(attn, MultiheadAttention)
    weight = attn.out_proj.weight
    heads = attn.num_heads if attn.own_heads is None else attn.own_heads.stop - attn.own_heads.start
    sizes = (len(layers), batch, capacity, heads, attn.head_dim)
    return allocate(kind, sizes, like=weight, model_window=None, **options)


def next_step(
    stack: nn.TransformerEncoder | nn.TransformerDecoder, x: Tensor, cache: KVCache, lengths: Tensor | None
) -> Tensor:
    """The ``step`` of both stacks: pass new elements through the layers and keep their keys and values in ``cache``."""
    first: Any = stack.layers[0]
    if stack.training and first.dropout.p > 0:
        raise RuntimeError("step: expected evaluation mode, since a cache has no dropout: call eval() first")
    if x.dim() != 3:
        raise ValueError(f"step: expected 3 dimensions, got shape {tuple(x.shape)}")
    rows = x if first.self_attn.batch_first else x.transpose(0, 1)  # (N, L, E)
    length = rows.shape[1]
    check_cache(cache, len(stack.layers), rows)
    if lengths is not None:
        check.lengths("lengths", lengths, rows, length)
    cache.settle(x.device)
    cache.reserve(length)
    for i, layer in enumerate(stack.layers):
        x = layer.step(x, cache, i)  # pyright: ignore[reportCallIssue]
    cache.advance(length, lengths)
    return x if stack.norm is None else stack.norm(x)
