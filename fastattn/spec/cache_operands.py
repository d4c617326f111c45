"""Operands that only calls over a KV cache have: masks and biases that begin at a key, scales of quantised caches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec.checks import (
    FLOAT_DTYPES,
    MAX_POSITION,
    check_per_entry,
    check_plain,
    check_scores,
    readable,
)

QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes of quantised caches, and the largest magnitude that each uses; int8 leaves out -128, to be symmetric."""


def check_cache_scores(
    mask: Tensor | None, bias: Tensor | None, mask_start: int | Tensor | None, q: Tensor, cu_seqlens_q: Tensor | None,
    capacity: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(mask, bias) as 4-D views, and ``mask_start`` as a tensor, or None.

    Their last axis keeps its length. A single column without ``mask_start`` applies to every key.
    """
    checked = []
    for name, x, dtypes in (("mask", mask, (torch.bool,)), ("bias", bias, FLOAT_DTYPES)):
        if x is not None and cu_seqlens_q is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens_q, got a tensor; pass q as (B, Hq, Lq, D)")
        if isinstance(x, Tensor) and x.ndim == 0:
            raise ValueError(f"{name}.shape: expected at least 1 dimension, the last one for keys, got ()")
        columns = x.shape[-1] if isinstance(x, Tensor) else 1
        view = None if x is None else check_scores(name, x, q, columns, dtypes)
        if view is not None and columns == 1 and mask_start is None:
            view = view.expand(-1, -1, -1, capacity)
        checked.append(view)
    if mask_start is None:
        return checked[0], checked[1], None
    if mask is None and bias is None:
        raise ValueError("mask_start: expected None without mask and bias, got one")
    return checked[0], checked[1], _mask_start(mask_start, q)


def _mask_start(mask_start: int | Tensor, q: Tensor) -> Tensor:
    batch = q.shape[0]
    if not isinstance(mask_start, Tensor):
        if isinstance(mask_start, bool) or not isinstance(mask_start, (int, torch.SymInt)):
            raise TypeError(f"mask_start: expected an int or an integer tensor, got {type(mask_start).__name__}")
        if not -MAX_POSITION <= mask_start <= MAX_POSITION:
            raise ValueError(f"mask_start: expected at most 2**30 in size, got {mask_start}")
        return torch.full((batch,), mask_start, dtype=torch.int32, device=q.device)
    mask_start = check_per_entry("mask_start", mask_start, batch, q)
    if readable(mask_start) and any(abs(first) > MAX_POSITION for first in mask_start.tolist()):
        raise ValueError(f"mask_start: expected at most 2**30 in size, got {mask_start.tolist()}")
    return mask_start


def over_keys(x: Tensor | None, first: int, length: int, outside: bool | float) -> Tensor | None:
    """Extend a mask or bias, whose first column is for key ``first``, to the keys ``0 .. length``.

    Keys without a column get ``outside``. The result is a view if every key has a column.
    """
    if x is None:
        return None
    begin, end = min(max(first, 0), length), max(min(first + x.shape[3], length), 0)
    if begin == 0 and end == length:
        return x[..., -first : length - first]
    whole = x.new_full((*x.shape[:3], length), outside)
    if begin < end:
        whole[..., begin:end] = x[..., begin - first : end - first]
    return whole


def check_scales(
    k_scale: Tensor | None, v_scale: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, appends: bool
) -> None:  # fmt: skip
    """Check that quantised caches have scales and others have none."""
    for name, scale, cache in (("k", k_scale, k_cache), ("v", v_scale, v_cache)):
        if cache.dtype not in QUANTISED:
            if scale is not None:
                kind = type(scale).__name__
                raise ValueError(f"{name}_scale: expected None for a cache of {cache.dtype}, got a {kind}")
            continue
        if cache.dtype != k_cache.dtype:
            raise TypeError(f"v_cache.dtype: expected k_cache.dtype == {k_cache.dtype}, got {cache.dtype}")
        if not isinstance(scale, Tensor):
            raise TypeError(f"{name}_scale: expected a Tensor for a cache of {cache.dtype}, got {type(scale).__name__}")
        _check_scale(f"{name}_scale", scale, q, cache, appends)


def _check_scale(name: str, scale: Tensor, q: Tensor, cache: Tensor, appends: bool) -> None:
    check_plain(name, scale, q)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}.dtype: expected float32, got {scale.dtype}")
    if scale.device != q.device:
        raise ValueError(f"{name}.device: expected q.device == {q.device}, got {scale.device}")
    heads, positions = cache.shape[2], tuple(cache.shape[:3])
    if scale.ndim not in (0, 1, 3) or scale.shape != ((), (heads,), (), positions)[scale.ndim]:
        raise ValueError(
            f"{name}.shape: expected () for the whole cache, (Hk,) == ({heads},) for each head, or {positions} for "
            f"each token and head, got {tuple(scale.shape)}"
        )
    if appends and scale.requires_grad:
        raise ValueError(f"{name}.requires_grad: expected False, since the call writes to the cache")


def scale_rows(scale: Tensor, cache: Tensor) -> Tensor:
    """The scale of every row of a cache: (pages, slots, Hk), a view."""
    return scale.expand(cache.shape[:3])


def cached(cache: Tensor, block_table: Tensor | None, entries: slice, length: int) -> Tensor:
    """The first ``length`` positions (B, H, length, D) of some batch entries; of one entry with a block table."""
    if block_table is None:
        return cache[entries, :length].transpose(1, 2)
    pages = block_table[entries.start, : -(-length // cache.shape[1])].long().clamp(0, max(cache.shape[0] - 1, 0))
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None]


def dequantised(
    cache: Tensor, scale: Tensor | None, block_table: Tensor | None, entries: slice, length: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """`cached`, times the scales of a quantised cache: of ``dtype``, at least float32."""
    rows = cached(cache, block_table, entries, length)
    if scale is None:
        return rows
    dtype = torch.promote_types(dtype, torch.float32)
    scales = cached(scale_rows(scale, cache)[..., None], block_table, entries, length)
    return rows.to(dtype) * scales.to(dtype)
