"""Attention over a KV cache, as inference needs it."""

from typing import Any, Literal, overload

from torch import Tensor

from fastattn import backends, ops
from fastattn.backends import Explanation
from fastattn.functional import divided, keywords, rotary
from fastattn.functional.attention import Backend
from fastattn.spec import FLOAT_DTYPES as FLOAT_DTYPES
from fastattn.spec import QUANTISED as QUANTISED
from fastattn.spec import UNDIVIDED, CacheSpec, check_flag, make_cache_spec


@overload
def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_lens: int | Tensor, block_table: Tensor | None = ..., cu_seqlens_q: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., sinks: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[False] = ..., num_splits: int | None = ..., batch_invariant: bool | Literal["rows"] = ...,
    backend: Backend | None = ...,
    mask: Tensor | None = ..., bias: Tensor | None = ..., mask_start: int | Tensor | None = ...,
    rotary_cos: Tensor | None = ..., rotary_sin: Tensor | None = ..., rotary_interleaved: bool = ...,
    k_scale: Tensor | None = ..., v_scale: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_lens: int | Tensor, block_table: Tensor | None = ..., cu_seqlens_q: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., sinks: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True],
    num_splits: int | None = ..., batch_invariant: bool | Literal["rows"] = ..., backend: Backend | None = ...,
    mask: Tensor | None = ..., bias: Tensor | None = ..., mask_start: int | Tensor | None = ...,
    rotary_cos: Tensor | None = ..., rotary_sin: Tensor | None = ..., rotary_interleaved: bool = ...,
    k_scale: Tensor | None = ..., v_scale: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_lens: int | Tensor,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_start: int | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    batch_invariant: bool | Literal["rows"] = False,
    backend: Backend | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append ``k`` and ``v`` to a KV cache, then let ``q`` attend to what the cache holds. For inference.

    This is the one function of fastattn that modifies arguments: ``k`` and ``v`` are written into ``k_cache`` and
    ``v_cache`` in place, at positions ``cache_lens[b] .. cache_lens[b] + Lnew``. Batch entry b then has
    ``len_b = cache_lens[b] + Lnew`` keys; query i stands at position ``len_b - Lq + i`` and sees keys ``j < len_b`` as
    in `fastattn.attention`. A row that sees nothing gives output 0 and lse -inf (or the sink).

    Args:
        q: (B, Hq, Lq, D), Lq at least 1; float16, bfloat16, float32 or float64; any strides. ``"triton"`` does not take
            float64, and over a quantised cache only ``"reference"`` does.
        k_cache: (B, Lmax, Hk, D), or (pages, page_size, Hk, D) with a ``block_table``; on the device of q, any
            strides. Hq is a multiple of Hk. What lies beyond a length is never used and may be NaN. Its dtype is that
            of q; or, with scales, int8 or float8_e4m3fn.
        v_cache: the same with head dim Dv.
        k: (B, Hk, Lnew, D) new keys, or None to append nothing. Lnew may differ from Lq.
        v: (B, Hk, Lnew, Dv) new values; given where k is.
        cache_lens: tokens in the cache before appending: one int for all batch entries, or int32 or int64 (B,). It is
            not modified: the caller adds Lnew.
        block_table: int32 (B, max_pages): position p of entry b is in page ``block_table[b, p // page_size]``, at
            ``p % page_size``. Pages of any size; those that are written to must belong to one entry only.
        cu_seqlens_q: int32 or int64 (B + 1,), for entries with different numbers of queries, such as chunks of prompts
            beside single steps. Entry b then has rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` of q (total_q, Hq, D)
            and, if it appends, of k (total_q, Hk, D) and v; it may have none. Nothing is padded or copied.
        causal, window, softcap, alibi_slopes, sinks, scale, return_lse: as in `fastattn.attention`.
        kv_start: as in `fastattn.attention`, (B,): nothing before it in the cache is read. Positions, also in rotary
            tables, count from the beginning of the cache.
        mask: bool, broadcastable to (B, Hq, Lq, W), True takes part. Column c belongs to key ``mask_start[b] + c``.
            Keys without a column take part; columns without a key are not read. A single column broadcasts to all keys,
            as in `fastattn.attention`, unless ``mask_start`` is given.
        bias: float, likewise with a W of its own, added to the scaled scores. Keys without a column get 0.
        mask_start: the key of the first column of ``mask`` and ``bias``: one int for all batch entries, or int32 or
            int64 (B,), which may be negative. None is key 0. Pass ``cache_lens`` where columns begin at the first new
            key, as in the mask of a tree of draft tokens.
        rotary_cos, rotary_sin: float (positions, R / 2), R at most D: rotate the first R numbers of each head of q and
            k by position before appending k. New key i of entry b has position ``cache_lens[b] + i``; queries have the
            positions given above. The arithmetic is float32 at least. On a GPU positions are cut to those of the
            tables.
        rotary_interleaved: numbers 2 i and 2 i + 1 turn together, as in GPT-J; False: i and i + R / 2, as in GPT-NeoX.
        k_scale: float32 on the device of q, for a quantised cache: a key is the number in the cache times its scale.
            () for the whole cache, or (Hk,) for each head: new keys are divided by it, rounded and cut to what the
            dtype holds. (B, Lmax, Hk) or (pages, page_size, Hk) for each token and head: the scale of a new key is
            measured, its largest number over 127 (int8) or 448 (float8_e4m3fn), and written here in place.
        v_scale: likewise for the values.
        num_splits: into how many parts the Triton kernel divides the keys; None chooses from shapes and the number of
            multiprocessors. It changes rounding alone, and means nothing to other backends.
        batch_invariant: True gives an entry's result the same bits in every batch size and beside any other entries:
            how the keys are divided depends on their number alone. ``"triton"`` and ``"cpu"`` serve it; on a GPU a
            small batch may leave more of the device idle. Not with ``cu_seqlens_q``. ``"rows"`` also makes the bits
            independent of how many rows are computed together, so that decode has the bits of prefill, in one piece or
            in chunks: the kernel of `fastattn.attention` computes every row as in a prompt. ``"cpu"`` serves that,
            ``"reference"`` row by row, and ``"triton"`` over a contiguous cache without ``kv_start``, a window to the
            left, mask, bias or scales.
        backend: ``"triton"``, ``"cpu"``, ``"torch"``, ``"reference"``; None chooses: on a GPU Triton, on a CPU the
            fused kernels where they are compiled, elsewhere PyTorch's kernel where all lengths are one number known on
            the host and it computes exactly the same, else the reference.

    Returns:
        out (B, Hq, Lq, Dv) in the dtype of q; with ``return_lse`` also lse (B, Hq, Lq) in float32 (float64 for
        float64 inputs), natural logarithm. With ``cu_seqlens_q`` they are (total_q, Hq, Dv) and (Hq, total_q); rows
        after the last entry are 0, and lse -inf.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is written. Values
            of lengths and pages are checked where the host sees them (an int, tensors on the CPU), except under
            torch.compile. On a GPU they are not, since that would synchronise: new rows without a place in the cache
            are dropped, lengths and pages that are read are cut to what exists.
        RuntimeError: when a gradient is asked for through the result. There is none.

    Source: flash-decoding, Dao et al., 2023; PagedAttention, Kwon et al., 2023 (arXiv:2309.06180).
    """
    if unknown:
        keywords.refuse(attention_with_kvcache, unknown)
    divided.refuse("k_cache", "a KV cache")
    _check_invariant(batch_invariant, num_splits)
    spec = make_cache_spec(
        q, k_cache, v_cache, k, v, mask, bias, mask_start, k_scale, v_scale, kv_start, cache_lens=cache_lens,
        block_table=block_table, cu_seqlens_q=cu_seqlens_q, causal=causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, scale=scale, num_splits=num_splits, return_lse=return_lse,
    )  # fmt: skip
    tables = None
    if _turns(rotary_cos, rotary_sin, rotary_interleaved):
        tables = rotary.check(spec, rotary_cos, rotary_sin, rotary_interleaved)
    if batch_invariant:
        spec = _invariant(spec, batch_invariant)
    chosen = backends.choose(spec, backend, batch_invariant)
    if tables is not None and not ops.turns_in_append(spec, chosen, tables):
        spec, tables = rotary.turn_new(spec, tables, chosen), None
    out, lse = ops.attention_kvcache(spec, chosen, tables)
    if cu_seqlens_q is not None:
        out = out.squeeze(0).transpose(0, 1)
    if not return_lse:
        return out
    assert lse is not None  # the torch backend, which has none, has refused
    return out, lse if cu_seqlens_q is None else lse.squeeze(0)


def explain_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
    cache_lens: int | Tensor, block_table: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    causal: bool = True, window: tuple[int | None, int | None] | None = None, kv_start: Tensor | None = None,
    mask: Tensor | None = None, bias: Tensor | None = None, mask_start: int | Tensor | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
    scale: float | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    return_lse: bool = False, num_splits: int | None = None, batch_invariant: bool | Literal["rows"] = False,
    backend: Backend | None = None, **unknown: Any,
) -> Explanation:  # fmt: skip
    """`explain` for `attention_with_kvcache`, with its arguments. Nothing is written into the caches."""
    if unknown:
        keywords.refuse(explain_with_kvcache, unknown)
    _check_invariant(batch_invariant, num_splits)
    spec = make_cache_spec(
        q, k_cache, v_cache, k, v, mask, bias, mask_start, k_scale, v_scale, kv_start, cache_lens=cache_lens,
        block_table=block_table, cu_seqlens_q=cu_seqlens_q, causal=causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, scale=scale, num_splits=num_splits, return_lse=return_lse,
    )  # fmt: skip
    also = []
    if mask_start is not None:
        also.append(f"mask_start {'per batch entry' if isinstance(mask_start, Tensor) else mask_start}")
    if _turns(rotary_cos, rotary_sin, rotary_interleaved):
        tables = rotary.check(spec, rotary_cos, rotary_sin, rotary_interleaved)
        also.append(f"rotary_cos {tuple(tables.cos.shape)}{', interleaved' if rotary_interleaved else ''}")
    if batch_invariant:
        spec = _invariant(spec, batch_invariant)
    return backends.explain(spec, backend, batch_invariant, also)


def _turns(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> bool:
    """Whether the call asks for rotary positions."""
    check_flag("rotary_interleaved", interleaved)
    given = cos is not None or sin is not None
    if interleaved and not given:
        raise ValueError("rotary_interleaved: expected False without rotary_cos and rotary_sin, got True")
    return given


INVARIANT_SPLITS = 16
"""How many parts an entry's keys have where the number may not depend on the batch; enough for a batch of few heads."""


def _check_invariant(batch_invariant: bool | str, num_splits: int | None) -> None:
    if batch_invariant != "rows":
        if not isinstance(batch_invariant, bool):
            raise TypeError(f"batch_invariant: expected a bool or 'rows', got {batch_invariant!r}")
    elif num_splits is not None:
        raise ValueError(f"num_splits: expected None with batch_invariant 'rows', got {num_splits}")


def _invariant(spec: CacheSpec, batch_invariant: bool | str) -> CacheSpec:
    """Change the call so that its keys are divided by their own number alone, or not at all."""
    if batch_invariant == "rows":
        return spec._replace(num_splits=UNDIVIDED)
    if spec.cu_seqlens_q is not None:  # the kernel's tiles follow from how many queries an entry has on average
        raise ValueError("batch_invariant: expected False with cu_seqlens_q, got True")
    return spec if spec.num_splits is not None else spec._replace(num_splits=INVARIANT_SPLITS)
