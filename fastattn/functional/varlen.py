"""`fastattn.attention_varlen`: attention over packed sequences."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn.backends import Explanation
from fastattn.functional import divided, keywords
from fastattn.functional.attention import Backend, explain_spec, run
from fastattn.spec import AttentionSpec, make_spec


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ..., *,
    seqused_k: Tensor | None = ..., max_seqlen_q: int | Tensor | None = ...,
    max_seqlen_k: int | Tensor | None = ..., causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., dropout_p: float = ...,
    return_lse: Literal[False] = ..., backend: Backend | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ..., *,
    seqused_k: Tensor | None = ..., max_seqlen_q: int | Tensor | None = ...,
    max_seqlen_k: int | Tensor | None = ..., causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., dropout_p: float = ...,
    return_lse: Literal[True], backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over packed sequences, each by itself: no padding is stored and none computed.

    Sequence s has the queries ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` and the keys ``cu_seqlens_k[s] :
    cu_seqlens_k[s + 1]``; it may be empty. Rows after the last sequence give output 0, lse -inf and gradients 0.
    The lengths are read on the device: no synchronisation, no recompilation, safe under CUDA graphs.

    Args:
        q: (total_q, Hq, D), float16, bfloat16, float32 or float64; any strides.
        k: (total_k, Hk, D), Hq a multiple of Hk.
        v: (total_k, Hk, Dv).
        cu_seqlens_q: int32 or int64 (sequences + 1,), rising from 0 to at most total_q.
        cu_seqlens_k: likewise for the keys; None means ``cu_seqlens_q``.
        seqused_k: int32 or int64 (sequences,): how many keys a sequence uses, counted from its first; None is all. The
            others cost nothing, may be NaN, and have gradients 0. Positions count as if they were not there.
        max_seqlen_q, max_seqlen_k: accepted and ignored, so that calls written for other packages run.
        causal, window: as in `attention`, positions counted within each sequence.
        kv_start: as in `attention`, (sequences,), counted within each sequence.
        q_offset: position of the first query of each sequence: an int, or an integer tensor (sequences,). None lines
            the last query of each sequence up with its last key.
        alibi_slopes: float (Hq,) or (sequences, Hq).
        softcap, sinks, scale, dropout_p, return_lse, backend: as in `attention`. Dropout drops for sequence s what
            `attention` drops for batch entry s.

    Returns:
        out (total_q, Hq, Dv) in the dtype of q; with ``return_lse`` also lse (Hq, total_q), natural logarithm.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values of ``cu_seqlens`` and
            ``seqused_k`` are checked on CPU only, where reading them does not wait; elsewhere a ``seqused_k`` beyond
            the keys of its sequence is cut to them.

    Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691); padding-free training: Zeng et al., 2022 (arXiv:2208.08124).
    """
    if unknown:
        keywords.refuse(attention_varlen, unknown)
    if (division := divided.current()) is not None:
        return division.attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, causal=causal,
            q_offset=q_offset, window=window, kv_start=kv_start, alibi_slopes=alibi_slopes, softcap=softcap,
            sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    spec = varlen_spec(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), seqused_k=seqused_k, causal=causal,
        q_offset=q_offset, window=window, kv_start=kv_start, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
        scale=scale, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    out, lse = run(spec, backend)
    out = out.squeeze(0).transpose(0, 1)  # the gradient of squeeze is a view, that of an index a copy
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.squeeze(0)


def varlen_spec(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None,
    max_seqlens: tuple[int | Tensor | None, int | Tensor | None], **options: Any,
) -> AttentionSpec:  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 3:
            raise ValueError(f"{name}: expected 3 dimensions (total, heads, head_dim), got shape {tuple(tensor.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v.shape[:2]: expected k.shape[:2] == {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    for name, length in zip(("max_seqlen_q", "max_seqlen_k"), max_seqlens, strict=True):
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt, Tensor, type(None))):
            raise TypeError(f"{name}: expected an int, a Tensor or None, got {type(length).__name__}")
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    return make_spec(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def explain_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    seqused_k: Tensor | None = None, max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None, causal: bool = False, q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None, kv_start: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0,
    return_lse: bool = False, backend: Backend | None = None, **unknown: Any,
) -> Explanation:  # fmt: skip
    """`explain` for `attention_varlen`, with its arguments."""
    if unknown:
        keywords.refuse(explain_varlen, unknown)
    spec = varlen_spec(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), seqused_k=seqused_k, causal=causal,
        q_offset=q_offset, window=window, kv_start=kv_start, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
        scale=scale, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    return explain_spec(spec, backend)
