"""The KV cache in eager PyTorch: new entries written in place, and attention over what a cache holds."""

import itertools

import torch
from torch import Tensor

from fastattn.backends.reference.blockwise import forward
from fastattn.spec.cache import UNDIVIDED, CacheSpec, cache_capacity
from fastattn.spec.cache_operands import QUANTISED, dequantised, over_keys
from fastattn.spec.operands import Operands, Options


def quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in a dtype of `QUANTISED`, cut to its range; the scale (..., 1)), from rows x (..., D).

    Without a given scale it is measured: it maps the largest number of a row to the largest of the dtype. NaN or
    infinity makes a measured scale NaN, and with it the whole row. Under a given scale, int8 stores NaN as 0 and both
    dtypes cut infinity.
    """
    largest = QUANTISED[dtype]
    x = x.float()
    if scale is None:
        scale = (x.abs().amax(-1, keepdim=True) + (x * 0.0).sum(-1, keepdim=True)) / largest
    y = (x / scale.masked_fill(scale == 0.0, 1.0)).clamp(-largest, largest)
    return (y.nan_to_num(0.0).round() if dtype == torch.int8 else y).to(dtype), scale


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``k`` and ``v`` (B, H, L, D) into the caches from position ``lens[b]`` on, where the cache has a place.

    With ``cu_seqlens_q`` they are (1, H, total, D), one entry after the other. With scales they are quantised, and
    the scales of tokens and heads are written too.
    """
    if k_scale is not None and v_scale is not None:
        _append_quantised(k_cache, k_scale, k, lens, block_table, cu_seqlens_q)
        _append_quantised(v_cache, v_scale, v, lens, block_table, cu_seqlens_q)
        return
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


def _append_quantised(
    cache: Tensor, scale: Tensor, x: Tensor, lens: Tensor, block_table: Tensor | None, cu_seqlens_q: Tensor | None
) -> None:  # fmt: skip
    """`kv_cache_append` into a quantised cache, as bytes, and into its scales."""
    measured = scale.ndim == 3
    values, scales = quantise(x, None if measured else scale.reshape(1, -1, 1, 1), cache.dtype)
    into, of = (t.view(torch.uint8) for t in (cache, values))
    scale_cache, scales = (scale[..., None], scales) if measured else (into[..., :0], of[..., :0])
    kv_cache_append(into, scale_cache, of, scales, lens, block_table, cu_seqlens_q)


def attention_kvcache(out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
    """Fill ``out`` and ``lse``: `forward` over the ``lens[b] + added`` cached keys of each batch entry.

    One pass serves all entries if the host knows one ``length`` for them and there is no block table. Otherwise the
    host reads the lengths, and on a GPU waits for them. The only ``num_splits`` with a meaning here is `UNDIVIDED`:
    entries and rows are then computed one by one, because PyTorch's products of several rows may add up in another
    order.
    """
    capacity, slopes, length = spec.capacity, spec.alibi_slopes, spec.length
    packed = None if spec.cu_seqlens_q is None else list(itertools.pairwise(spec.cu_seqlens_q.tolist()))
    undivided = spec.num_splits == UNDIVIDED
    if length is not None and spec.block_table is None and spec.mask_start is None and not undivided:
        parts = [(slice(0, spec.entries), min(max(length, 0), capacity))]
    else:
        added = spec.added if packed is None else [end - first if spec.added is None else 0 for first, end in packed]
        lengths = (spec.lens.long().cpu() + torch.as_tensor(added)).clamp(0, capacity).tolist()
        parts = [(slice(b, b + 1), n) for b, n in enumerate(lengths)]
    statistics = lse.new_empty((2, *lse.shape))
    starts = None if spec.mask_start is None else spec.mask_start.tolist()
    for entries, n in parts:
        k, v = (
            dequantised(cache, scale, spec.block_table, entries, n, spec.q.dtype)
            for cache, scale in ((spec.k_cache, spec.k_scale), (spec.v_cache, spec.v_scale))
        )
        start = 0 if starts is None else starts[entries.start]
        mask, bias = (
            over_keys(x if x is None or x.shape[0] == 1 else x[entries], start, n, outside)
            for x, outside in ((spec.mask, True), (spec.bias, 0.0))
        )
        own_start = None if spec.kv_start is None else spec.kv_start[entries]
        own_slopes = slopes if slopes is None or slopes.shape[0] == 1 else slopes[entries]
        in_memory = entries if packed is None else slice(None)
        first, end = (0, spec.q.shape[2]) if packed is None else packed[entries.start]
        step = 1 if undivided else max(end - first, 1)
        for row in range(first, end, step):
            rows = slice(row, row + step)
            own_mask, own_bias = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (mask, bias))
            forward(
                out[in_memory, :, rows], lse[in_memory, :, rows], statistics[:, in_memory, :, rows],
                spec.q[in_memory, :, rows], k, v,
                Operands(own_mask, own_bias, own_slopes, spec.sinks, kv_start=own_start),
                Options(spec.left, spec.right, n - (end - row), spec.scale, spec.softcap),
            )  # fmt: skip
