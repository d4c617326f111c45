"""The KV cache in eager PyTorch: new entries written in place, and attention over what a cache holds."""

import itertools

import torch
from torch import Tensor

from fastattn.backends.reference.blockwise import forward
from fastattn.spec.cache import CacheSpec, cache_capacity
from fastattn.spec.operands import Operands, Options


def cached(cache: Tensor, block_table: Tensor | None, entries: slice, length: int) -> Tensor:
    """The first ``length`` positions (B, H, length, D) of some batch entries; of one, if there is a block table."""
    if block_table is None:
        return cache[entries, :length].transpose(1, 2)
    pages = block_table[entries.start, : -(-length // cache.shape[1])].long().clamp(0, max(cache.shape[0] - 1, 0))
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None]


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``k`` and ``v`` (B, H, L, D) into the caches from position ``lens[b]`` on, where the cache has a place.

    With ``cu_seqlens_q`` they are (1, H, total, D), one entry after the other.
    """
    if cu_seqlens_q is not None:
        for entry, (first, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
            own = slice(entry, entry + 1)
            kv_cache_append(
                *((k_cache, v_cache) if block_table is not None else (k_cache[own], v_cache[own])), k[:, :, first:end],
                v[:, :, first:end], lens[own], None if block_table is None else block_table[own],
            )  # fmt: skip
        return
    if block_table is None and lens.device.type == "cpu" and len(starts := set(lens.tolist())) == 1:
        start = starts.pop()
        if 0 <= start <= k_cache.shape[1] - k.shape[2]:  # all at one place: a copy takes a fifth of the time
            k_cache[:, start : start + k.shape[2]] = k.transpose(1, 2)
            v_cache[:, start : start + k.shape[2]] = v.transpose(1, 2)
            return
    position = lens.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    inside = (position >= 0) & (position < cache_capacity(k_cache, block_table))
    if block_table is None:
        page, slot = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(position), position
    else:
        size = k_cache.shape[1]
        page = block_table.long().gather(1, position.masked_fill(~inside, 0) // size)
        slot = position % size
        inside &= (page >= 0) & (page < k_cache.shape[0])
    at = page[inside], slot[inside]
    k_cache[at] = k.transpose(1, 2)[inside]
    v_cache[at] = v.transpose(1, 2)[inside]


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Fill ``out`` and ``lse``: `forward` over the ``lens[b] + added`` cached keys of each batch entry.

    All of them at once where they have the same ``length``, known to the host, and no block table. Otherwise the
    lengths are read on the host, which on a GPU waits for them. ``num_splits`` means nothing here.
    """
    capacity, slopes, length = spec.capacity, spec.alibi_slopes, spec.length
    packed = None if spec.cu_seqlens_q is None else list(itertools.pairwise(spec.cu_seqlens_q.tolist()))
    if length is not None and spec.block_table is None:
        parts = [(slice(0, spec.entries), min(max(length, 0), capacity))]
    else:
        added = spec.added if packed is None else [end - first if spec.added is None else 0 for first, end in packed]
        lengths = (spec.lens.long().cpu() + torch.as_tensor(added)).clamp(0, capacity).tolist()
        parts = [(slice(b, b + 1), n) for b, n in enumerate(lengths)]
    statistics = lse.new_empty((2, *lse.shape))
    for entries, n in parts:
        k, v = (cached(cache, spec.block_table, entries, n) for cache in (spec.k_cache, spec.v_cache))
        own_slopes = slopes if slopes is None or slopes.shape[0] == 1 else slopes[entries]
        in_memory, rows = (entries, slice(None)) if packed is None else (slice(None), slice(*packed[entries.start]))
        own_q = spec.q[in_memory, :, rows]
        forward(
            out[in_memory, :, rows], lse[in_memory, :, rows], statistics[:, in_memory, :, rows], own_q, k, v,
            Operands(alibi_slopes=own_slopes, sinks=spec.sinks),
            Options(spec.left, spec.right, n - own_q.shape[2], spec.scale, spec.softcap),
        )  # fmt: skip
