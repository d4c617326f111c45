"""Continuous batching of transformers: queries of many requests in one row, over its paged cache.

Its manager accepts only implementations whose names it knows, so `admit` adds one. For each layer the cache gives the
place of every key of a request. These places form the table of pages, so attention reads keys in place.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention_varlen, attention_with_kvcache


def admit(name: str) -> Callable[[], None]:
    """Let transformers' ``generate_batch`` accept models with this attention. Returns a function that undoes it."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

    theirs = Manager.switch_to_cb_friendly_attn

    @wraps(theirs)
    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != name:
            theirs(self, model, *args, **kwargs)

    def undo() -> None:
        if Manager.switch_to_cb_friendly_attn is switch:
            Manager.switch_to_cb_friendly_attn = theirs

    Manager.switch_to_cb_friendly_attn = switch
    return undo


def paged_attention(
    cache: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, passed: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """Write the new keys and values of every request into the cache, then attend from its queries to the cache.

    Args:
        cache: transformers' ``PagedAttentionCache``.
        module: the layer; ``layer_idx`` is its number in the model.
        query: (1, Hq, total_q, D), the requests one after the other, the last query of each at its last key.
        key: (1, Hk, total_q, D), the new keys.
        value: (1, Hk, total_q, Dv).
        passed: ``cu_seq_lens_q`` (requests + 1,); ``cu_seq_lens_k`` and ``max_length_k``, cached keys included, by the
            kind of layer; ``read_index`` and ``write_index``, by the number of the kind.
        options: ``window``, ``softcap``, ``sinks`` and ``scale`` of `fastattn.attention`; order is causal.

    Returns:
        (1, total_q, Hq, Dv).
    """
    layer = module.layer_idx
    kind = cache.layer_to_allocator[layer]
    ends, reads = passed["cu_seq_lens_q"], passed["read_index"][kind.index]
    options = {**options, "causal": True}
    if reads.numel() and kind.supports_block_table:
        row_q, row_k, row_v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = attention_with_kvcache(
            row_q, *_pages(kind, layer), row_k, row_v, cu_seqlens_q=ends, **_table(kind, passed, reads), **options
        )
    else:  # nothing is cached yet, or the slots are a ring: read its old keys before new ones replace them
        passed = dict(passed)
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=passed)
        row_q, row_k, row_v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = attention_varlen(row_q, row_k, row_v, ends, passed["cu_seq_lens_k"], **options)
    return out[None].contiguous()


def _pages(kind: Any, layer: int) -> tuple[Tensor, Tensor]:
    """The keys and values of one layer as pages (blocks, tokens, Hk, D): views of the cache that do not overlap."""
    slots = kind.cache_tensor
    blocks = slots.view(-1, len(kind.layer_indices), 2, kind.tokens_per_page, *slots.shape[2:])
    return tuple(blocks[:, kind.layer_indices.index(layer)].unbind(1))  # pyright: ignore[reportReturnType]


def _table(kind: Any, passed: dict[str, Any], reads: Tensor) -> dict[str, Tensor]:
    """The pages of each request, from the slots of all its keys, and the number of keys before this step."""
    size, ends = kind.tokens_per_page, passed["cu_seq_lens_k"][kind.layer_type]
    pages = -(-passed["max_length_k"][kind.layer_type] // size)
    first = ends[:-1, None] + size * torch.arange(pages, device=ends.device)  # of each page, among the slots
    blocks = reads[first.clamp(max=reads.numel() - 1)] // kind.block_physical_stride
    table = torch.where(first < ends[1:, None], blocks, 0)
    return {"block_table": table.int(), "cache_lens": ends.diff() - passed["cu_seq_lens_q"].diff()}
