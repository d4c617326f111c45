"""flash-attention 2's functions, with its signatures and conventions.

``import fastattn.compat.flash_attn as flash_attn`` is the whole migration.

The layout is (B, L, H, D). Causal order and windows align the last query with the last key. A negative side of
``window_size`` is open, ``softcap=0.0`` is off, and dropout applies as given. The differences extend flash-attention:

- It takes every dtype and head dim of `fastattn.attention`, on every device; ``alibi_slopes`` have a gradient.
- lse has a gradient, and is -inf for a row that sees nothing; flash-attention gives +inf there.
- ``return_attn_probs=True`` gives ``(out, lse, None)``: weights are never stored.
- ``deterministic`` has no effect, because the backward pass always is deterministic.
- Kernels read ``cu_seqlens`` on the device; nothing reads ``max_seqlen``.
- Pages have any size, and kernels always read the cache in place.
"""

from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention, attention_varlen, attention_with_kvcache
from fastattn.functional.rotary import turn

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, None]
Window = tuple[int, int]


def _window(window_size: Window) -> tuple[int | None, int | None] | None:
    """Convert a window. None is an open side; two open sides give no window, so that kernels without windows may
    serve."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), -1 for an open side, got {window_size!r}")
    left, right = (None if side < 0 else side for side in window_size)
    return None if left is None and right is None else (left, right)


def _options(
    softmax_scale: float | None, causal: bool, window_size: Window, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """Convert the arguments that all functions share to those of `fastattn.attention`."""
    return {
        "scale": softmax_scale, "causal": causal, "window": _window(window_size), "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip


def _parts(name: str, packed: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    """Views of q, k and v, or k and v, in one tensor."""
    if packed.ndim != dim + 3 or packed.shape[dim] != count:
        shape = f"({'B, L' if dim == 2 else 'total'}, {count}, H, D)"
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(packed.shape)}")
    return packed.unbind(dim)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """flash_attn.flash_attn_func on `fastattn.attention`.

    Args:
        q: (B, Lq, Hq, D).
        k: (B, Lk, Hk, D), Hq a multiple of Hk.
        v: (B, Lk, Hk, Dv).
        dropout_p: applies as given: pass 0.0 in evaluation.
        softmax_scale: default ``1 / sqrt(D)``.
        causal, window_size: they align the last query with the last key.
        softcap: 0.0 is off.
        alibi_slopes: (Hq,) or (B, Hq).
        deterministic: ignored.
        return_attn_probs: also return lse, and None in place of the weights.

    Returns:
        out (B, Lq, Hq, Dv), or (out, lse, None) with lse (B, Hq, Lq) in float32.

    Raises:
        TypeError, ValueError: as `fastattn.attention`, under its names.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options["dropout_p"] = dropout_p
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if not return_attn_probs:
        return attention(q, k, v, **options).transpose(1, 2)
    out, lse = attention(q, k, v, return_lse=True, **options)
    return out.transpose(1, 2), lse, None


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` with keys and values in one tensor, ``kv`` (B, Lk, 2, Hk, D), without a copy."""
    k, v = _parts("kv", kv, 2, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` with everything in one tensor, ``qkv`` (B, L, 3, H, D), without a copy."""
    q, k, v = _parts("qkv", qkv, 2, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Result:  # fmt: skip
    """flash_attn.flash_attn_varlen_func on `fastattn.attention_varlen`.

    With a ``block_table`` it calls `fastattn.attention_with_kvcache`, which reads the pages in place and has neither
    dropout nor gradients.

    Args:
        q: (total_q, Hq, D).
        k: (total_k, Hk, D), or with a ``block_table`` (pages, page_size, Hk, D), pages of any size.
        v: like k, with head dim Dv.
        cu_seqlens_q, cu_seqlens_k: int (sequences + 1,), rising from 0.
        max_seqlen_q, max_seqlen_k: ignored.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in `flash_attn_func`.
        alibi_slopes: (Hq,) or (sequences, Hq).
        return_attn_probs: also return lse, and None in place of the weights.
        block_table: int (sequences, max_pages): position p of sequence s is in page
            ``block_table[s, p // page_size]``, at ``p % page_size``.

    Returns:
        out (total_q, Hq, Dv), or (out, lse, None) with lse (Hq, total_q) in float32.

    Raises:
        NotImplementedError: dropout with a ``block_table``.
        TypeError, ValueError: as `fastattn.attention_varlen` or `fastattn.attention_with_kvcache`, under their names.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        if dropout_p:
            raise NotImplementedError(f"dropout_p: expected 0.0 beside block_table, got {dropout_p}")
        options |= {"cache_lens": cu_seqlens_k.diff(), "block_table": block_table.to(torch.int32)}
        result: Any = attention_with_kvcache(
            q, k, v, cu_seqlens_q=cu_seqlens_q, return_lse=return_attn_probs, **options
        )
        return (*result, None) if return_attn_probs else result
    options["dropout_p"] = dropout_p
    if not return_attn_probs:
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)
    return out, lse, None


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` with keys and values in one tensor, ``kv`` (total_k, 2, Hk, D)."""
    k, v = _parts("kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` with everything in one tensor, ``qkv`` (total, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """flash_attn.flash_attn_with_kvcache on `fastattn.attention_with_kvcache`: it writes ``k`` and ``v`` into the
    cache in place, then attends from ``q`` to the cache.

    It reads the cache in place.

    Args:
        q: (B, Lq, Hq, D).
        k_cache: (rows, Lmax, Hk, D), rows being B without ``cache_batch_idx``; or (pages, page_size, Hk, D) with a
            ``block_table``.
        v_cache: like k_cache, with head dim Dv.
        k: (B, Lnew, Hk, D) new keys, or None.
        v: (B, Lnew, Hk, Dv) new values.
        rotary_cos, rotary_sin: (positions, R / 2): the call rotates the first R numbers of each head of q and k.
            Positions of k start at ``cache_seqlens``; so do those of q if ``causal`` or in a window, else all of q has
            position ``cache_seqlens``.
        cache_seqlens: number of keys in the cache before appending: an int or int (B,). None means a full cache.
        cache_batch_idx: int (B,), the row of the cache for each entry; rows must differ when the call appends.
        cache_leftpad: int (B,), where the keys of each entry begin; queries do not see keys before it.
        block_table: int (B, max_pages).
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: rotate numbers 2 i and 2 i + 1 together, as in GPT-J; False: i and i + R / 2, as in
            GPT-NeoX.
        num_splits: 0 chooses.
        return_softmax_lse: also return lse.

    Returns:
        out (B, Lq, Hq, Dv), or (out, lse) with lse (B, Hq, Lq) in float32.

    Raises:
        NotImplementedError: a combination has no meaning; the text names the argument and the cure.
        TypeError, ValueError: as `fastattn.attention_with_kvcache`, under its names.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one")
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens: expected the length of the cache, since the call appends k and v, got None")
    if cache_batch_idx is not None and block_table is not None:
        raise NotImplementedError(
            "cache_batch_idx: expected None beside block_table, got both; choose block_table[cache_batch_idx] instead"
        )
    lens: int | Tensor = capacity if cache_seqlens is None else cache_seqlens
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None:
            raise ValueError("rotary_cos, rotary_sin: expected both or neither, got one")
        if k is None:
            raise NotImplementedError("rotary_cos: expected k and v to append, got none; turn q before the call")
        still = not causal and options["window"] is None and q.shape[1] > 1
        if still or q.shape[1] != k.shape[1]:
            q = _rotate(q, rotary_cos, rotary_sin, lens, rotary_interleaved, still)
            k = _rotate(k, rotary_cos, rotary_sin, lens, rotary_interleaved, still=False)
        else:  # as in `attention_with_kvcache`, where the last query stands at the last key
            turning = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved}
            options |= turning
    options["return_lse"] = return_softmax_lse
    if cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # each row of the cache is one page
    result: Any = attention_with_kvcache(
        q.transpose(1, 2), k_cache, v_cache, None if k is None else k.transpose(1, 2),
        None if v is None else v.transpose(1, 2), cache_lens=lens, num_splits=num_splits or None,
        kv_start=cache_leftpad,
        block_table=None if block_table is None else block_table.to(torch.int32), **options,
    )  # fmt: skip
    return (result[0].transpose(1, 2), result[1]) if return_softmax_lse else result.transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, first: int | Tensor, interleaved: bool, still: bool) -> Tensor:
    """Rotate ``x`` (B, L, H, D) by its positions: from ``first`` on, or ``first`` for all.

    `attention_with_kvcache` differs: there a query always has its own position.
    """
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"rotary_cos, rotary_sin: expected one shape (positions, R / 2), R at most D == {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    batch, length = x.shape[:2]
    first = first.long() if isinstance(first, Tensor) else torch.full((batch,), first, device=x.device)
    steps = torch.arange(length, device=x.device)
    position = first[:, None] + (torch.zeros_like(steps) if still else steps)
    return turn(x.transpose(1, 2), cos, sin, position, interleaved).transpose(1, 2)
