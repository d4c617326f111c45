"""The description of one call over a KV cache, validated and normalised once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.cache_memory import check_written
from fastattn.spec.cache_operands import QUANTISED, check_cache_scores, check_scales
from fastattn.spec.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    autocast,
    check_alibi_slopes,
    check_cu_seqlens,
    check_flag,
    check_kv_start,
    check_plain,
    check_scale,
    check_sinks,
    check_softcap,
    check_window,
    is_dtensor,
    known,
    readable,
)

MAX_SPLITS = 1024
UNDIVIDED = 0
"""A value of `num_splits`: the kernel does not divide keys, and computes each row like the rows of a prompt."""


class CacheSpec(NamedTuple):
    """One call, before or after it appends new entries. The fields have the order of the operator's arguments."""

    q: Tensor
    """(B, Hq, Lq, D); its last row is at the last key. Packed queries are one batch entry: (1, Hq, total, D)"""
    k_cache: Tensor
    """(B, Lmax, Hk, D), or (pages, page_size, Hk, D) with a block table; int8 or float8_e4m3fn with `k_scale`"""
    v_cache: Tensor
    k: Tensor | None
    """(B, Hk, Lnew, D) new keys; packed if the queries are"""
    v: Tensor | None
    alibi_slopes: Tensor | None
    """float (1 or B, Hq)"""
    sinks: Tensor | None
    """float (Hq,)"""
    lens: Tensor
    """int (B,): entries in the cache before the new ones"""
    block_table: Tensor | None
    """int32 (B, max_pages)"""
    added: int | None
    """Lnew, or 0; None if each entry adds as many keys as it has packed queries"""
    length: int | None
    """``lens + added`` if the host knows it and it is the same for all batch entries"""
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    num_splits: int | None
    return_lse: bool
    cu_seqlens_q: Tensor | None = None
    """int (B + 1,): where the packed queries of each batch entry begin"""
    mask: Tensor | None = None
    """bool, 4-D, broadcastable to (B, Hq, Lq, columns); True takes part"""
    bias: Tensor | None = None
    """float, 4-D, broadcastable to (B, Hq, Lq, columns) with its own number of columns"""
    mask_start: Tensor | None = None
    """int (B,): the key of the first column of mask and bias; None is key 0"""
    k_scale: Tensor | None = None
    """float32 (), (Hk,) or (pages, slots, Hk): the factor of the cached numbers; None: not quantised"""
    v_scale: Tensor | None = None
    kv_start: Tensor | None = None
    """int (B,): the first key of each entry that takes part; None is key 0"""

    @property
    def quantised(self) -> bool:
        """Whether the caches hold numbers that need scales."""
        return self.k_scale is not None

    @property
    def entries(self) -> int:
        """Batch entries."""
        return self.lens.shape[0]

    @property
    def capacity(self) -> int:
        """Positions per batch entry."""
        return cache_capacity(self.k_cache, self.block_table)


def cache_capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Positions per batch entry in a cache (B, Lmax, H, D), or (pages, page, H, D) with a block table."""
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]


def make_cache_spec(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_start: int | Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    kv_start: Tensor | None = None,
    *,
    cache_lens: int | Tensor,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> CacheSpec:
    """Validate the arguments of `fastattn.attention_with_kvcache`.

    Raises:
        TypeError, ValueError: the text names the argument, the expected and the given value.
    """
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]  (as many as went in)
    if cu_seqlens_q is not None:
        q = _as_one_entry("q", q)
        k, v = (x if x is None else _as_one_entry(name, x) for name, x in (("k", k), ("v", v)))
        cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    _check_caches(q, k_cache, v_cache, block_table, None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1)
    _check_new(q, k_cache, v_cache, k, v, packed=cu_seqlens_q is not None)
    if k_scale is not None or v_scale is not None or k_cache.dtype is not q.dtype:
        check_scales(k_scale, v_scale, q, k_cache, v_cache, appends=k is not None)
    if k is not None and v is not None:
        check_written(q, k, v, k_cache, v_cache, k_scale, v_scale)
    if mask is not None or bias is not None or mask_start is not None:
        mask, bias, mask_start = check_cache_scores(
            mask, bias, mask_start, q, cu_seqlens_q, cache_capacity(k_cache, block_table)
        )
    _, _, q_len, head_dim = q.shape
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    added = 0 if k is None else k.shape[2] if cu_seqlens_q is None else None
    capacity = cache_capacity(k_cache, block_table)
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    alibi_slopes = check_alibi_slopes(alibi_slopes, q, batch)
    check_sinks(sinks, q)
    check_softcap(softcap)
    scale = check_scale(scale, head_dim)
    if num_splits is not None:
        if isinstance(num_splits, bool) or not isinstance(num_splits, int):
            raise TypeError(f"num_splits: expected an int or None, got {type(num_splits).__name__}")
        if not 1 <= num_splits <= MAX_SPLITS:
            raise ValueError(f"num_splits: expected 1 to {MAX_SPLITS} or None, got {num_splits}")
    left, right = check_window(window, causal)
    if right is not None and known(right >= q_len - 1):  # open a side that forbids nothing at any length
        right = None
    if left is not None and known(left >= capacity - 1):
        left = None
    if kv_start is not None:
        kv_start = check_kv_start(kv_start, batch, q, capacity)
    lens, length = _lengths(
        cache_lens, q, cu_seqlens_q, added, left, kv_start, capacity, block_table, k_cache.shape[0]
    )  # fmt: skip
    return CacheSpec(
        q, k_cache, v_cache, k, v, alibi_slopes, sinks, lens, block_table, added, length, left, right, scale, softcap,
        num_splits, return_lse, cu_seqlens_q, mask, bias, mask_start, k_scale, v_scale, kv_start,
    )  # fmt: skip


def _as_one_entry(name: str, x: Tensor) -> Tensor:
    """View packed rows (total, heads, head_dim) as (1, heads, total, head_dim)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.ndim != 3:
        raise ValueError(
            f"{name}: expected 3 dimensions (total, heads, head_dim) with cu_seqlens_q, got shape {tuple(x.shape)}"
        )
    return x.transpose(0, 1)[None]


def _check_tensor(name: str, x: Tensor, q: Tensor, layout: str, cache: bool = False) -> None:
    """Check for a dense 4-D tensor with the dtype and device of ``q``; a ``cache`` may be quantised."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense strided tensor, got {kind}")
    check_plain(name, x, q)
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions {layout}, got shape {tuple(x.shape)}")
    if x.dtype != q.dtype and not (cache and x.dtype in QUANTISED):
        quantised = ", or int8 or float8_e4m3fn with scales" if cache else ""
        cast = not q.is_meta and torch.is_autocast_enabled(q.device.type)
        why = " (set by autocast)" if cast and cache else ""
        raise TypeError(f"{name}.dtype: expected q.dtype == {q.dtype}{why}{quantised}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected q.device == {q.device}, got {x.device}")


def _check_caches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, packed_entries: int | None
) -> None:  # fmt: skip
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a Tensor, got {type(q).__name__}")
    if is_dtensor(q):
        raise TypeError("q: expected a plain Tensor, got a DTensor; each rank attends over a cache of its own heads")
    _check_tensor("q", q, q, "(batch, heads, length, head_dim)")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q.dtype: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    layout = "(batch, length, heads, head_dim)" if block_table is None else "(pages, page_size, heads, head_dim)"
    _check_tensor("k_cache", k_cache, q, layout, cache=True)
    _check_tensor("v_cache", v_cache, q, layout, cache=True)
    if packed_entries is None and q.shape[2] < 1:
        raise ValueError(f"q.shape[2]: expected at least one query, got {q.shape[2]}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache.shape[:3]: expected k_cache.shape[:3] == {tuple(k_cache.shape[:3])}, "
            f"got {tuple(v_cache.shape[:3])}"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache.shape[3]: expected q.shape[3] == {q.shape[3]}, got {k_cache.shape[3]}")
    for name, tensor in (("q", q), ("v_cache", v_cache)):
        if tensor.shape[3] == 0:
            raise ValueError(f"{name}.shape[3]: expected at least 1, got 0")
    heads = k_cache.shape[2]
    if heads == 0 or q.shape[1] == 0 or q.shape[1] % heads != 0:
        raise ValueError(
            f"q.shape[1]: expected a positive multiple of k_cache.shape[2] == {heads} heads, got {q.shape[1]}"
        )
    batch, named = (q.shape[0], "q.shape[0]") if packed_entries is None else (packed_entries, "the batch entries")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"k_cache.shape[0]: expected {named} == {batch}, got {k_cache.shape[0]}")
        return
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table: expected a Tensor or None, got {type(block_table).__name__}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table.dtype: expected int32, got {block_table.dtype}")
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0:
        raise ValueError(
            f"block_table.shape: expected (B, max_pages) with B == {batch} and at least one page, got "
            f"{tuple(block_table.shape)}"
        )
    if block_table.device != q.device:
        raise ValueError(f"block_table.device: expected q.device == {q.device}, got {block_table.device}")
    if k_cache.shape[1] == 0:
        raise ValueError("k_cache.shape[1]: expected a page size of at least 1, got 0")


def _check_new(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, packed: bool
) -> None:  # fmt: skip
    if k is None and v is None:
        return
    if k is None or v is None:
        raise ValueError(f"{'k' if k is None else 'v'}: expected k and v together or neither, got None")
    for name, x in (("k", k), ("v", v)):
        _check_tensor(name, x, q, "(batch, heads, length, head_dim)")
    batch, heads, new = q.shape[0], k_cache.shape[2], k.shape[2]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (batch, heads, q.shape[2] if packed else new, cache.shape[3])
        if x.shape != expected:
            layout, wanted, got = "(B, Hk, Lnew, D)", expected, tuple(x.shape)
            if packed:
                layout, wanted, got = "(total_q, Hk, D)", (*expected[2:0:-1], expected[3]), (*got[2:0:-1], got[3])
            raise ValueError(f"{name}.shape: expected {layout} == {wanted}, got {got}")
        if cache.requires_grad:
            raise ValueError(f"{name}_cache.requires_grad: expected False, since the call writes {name} into it")


def _lengths(
    cache_lens: int | Tensor, q: Tensor, cu_seqlens_q: Tensor | None, added: int | None, left: int | None,
    kv_start: Tensor | None, capacity: int, block_table: Tensor | None, pages: int,
) -> tuple[Tensor, int | None]:  # fmt: skip
    """(cache_lens as a tensor, the common length of all batch entries after appending if the host knows it).

    Packed queries have no such length, because entries may add different numbers of keys.

    It checks what it can without waiting for a device.
    """
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if isinstance(cache_lens, Tensor):
        if cache_lens.dtype not in INTEGER_DTYPES:
            raise TypeError(f"cache_lens.dtype: expected int32 or int64, got {cache_lens.dtype}")
        if cache_lens.shape != (batch,):
            raise ValueError(f"cache_lens.shape: expected (B,) == ({batch},), got {tuple(cache_lens.shape)}")
        if cache_lens.device != q.device:
            raise ValueError(f"cache_lens.device: expected q.device == {q.device}, got {cache_lens.device}")
        lens, number = cache_lens, None
        values = cache_lens.tolist() if readable(cache_lens) else None
    else:
        if isinstance(cache_lens, bool) or not isinstance(cache_lens, (int, torch.SymInt)):
            raise TypeError(f"cache_lens: expected an int or an integer tensor, got {type(cache_lens).__name__}")
        lens, number = torch.full((batch,), cache_lens, dtype=torch.int32, device=q.device), cache_lens
        values = None if torch.compiler.is_compiling() else [int(cache_lens)] * batch
    if values is not None:  # only here: a traced batch size must not become the length of a list
        queries = [q.shape[2]] * batch
        if cu_seqlens_q is not None:
            queries = cu_seqlens_q.diff().tolist() if readable(cu_seqlens_q) else None
        news = queries if added is None else [added] * batch
        if queries is not None and news is not None:
            _check_range(values, news, capacity)
            ends = [value + new for value, new in zip(values, news, strict=True)]
            _check_pages(ends, news, queries, left, kv_start, block_table, pages, capacity)
    if cu_seqlens_q is not None or added is None:
        return lens, None
    if number is not None:
        return lens, number + added
    same = values is not None and len(set(values)) == 1
    return lens, values[0] + added if same and values is not None else None


def _check_range(values: Sequence[int], news: Sequence[int], capacity: int) -> None:
    for entry, (value, new) in enumerate(zip(values, news, strict=True)):
        if not 0 <= value <= capacity - new:
            raise ValueError(
                f"cache_lens: expected 0 to {capacity - new} (the cache holds {capacity}, {new} are appended), "
                f"got {value} for batch entry {entry}"
            )


def _check_pages(
    ends: Sequence[int], news: Sequence[int], queries: Sequence[int], left: int | None, kv_start: Tensor | None,
    block_table: Tensor | None, pages: int, capacity: int,
) -> None:  # fmt: skip
    """Check that every page in use exists and that no two entries write to the same page; other entries of the table
    are free."""
    if block_table is None or not readable(block_table) or not ends or capacity == 0:
        return
    page_size = capacity // block_table.shape[1]
    end, new, asking = (torch.tensor(x, device="cpu")[:, None] for x in (ends, news, queries))
    column = torch.arange(block_table.shape[1], device="cpu")
    written = (column >= (end - new).clamp(min=0) // page_size) & (column * page_size < end) & (new > 0)
    first_read = torch.zeros_like(end) if left is None else (end - asking - left).clamp(min=0)
    if kv_start is not None and readable(kv_start):
        first_read = torch.maximum(first_read, kv_start[:, None])
    used = written | ((column >= first_read // page_size) & (column * page_size < end) & (asking > 0))
    bad = used & ((block_table < 0) | (block_table >= pages))
    if bad.any():
        entry, place = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages from 0 to {pages - 1}, got {int(block_table[entry, place])} at "
            f"[{entry}, {place}]"
        )
    targets = block_table[written]
    if len(targets.unique()) != len(targets):
        page = next(page for page in targets.tolist() if int((targets == page).sum()) > 1)
        raise ValueError(f"block_table: expected one batch entry to write each page, got page {page} twice")
