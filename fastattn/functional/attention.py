"""The public functions: validate, choose a backend, call it."""

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backends, ops
from fastattn.backends import Explanation
from fastattn.block_mask import BlockMask
from fastattn.functional import divided, keywords, leading, remembered
from fastattn.spec import AttentionSpec, is_dtensor, make_spec

Backend = Literal["triton", "cuda", "cpu", "torch", "reference"]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ..., mask: Tensor | None = ...,
    block_mask: BlockMask | None = ..., bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., dropout_p: float = ...,
    return_lse: Literal[False] = ..., backend: Backend | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., kv_start: Tensor | None = ..., mask: Tensor | None = ...,
    block_mask: BlockMask | None = ..., bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., dropout_p: float = ...,
    return_lse: Literal[True], backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
    mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale * q k^T + bias) v`` over the keys that are allowed.

    All arguments combine freely. A query row with nothing allowed gives output 0, lse -inf (or the sink) and
    gradients 0; on the torch backend where scores and values are finite. Everything is differentiable: q, k, v,
    ``bias``, ``alibi_slopes``, ``sinks``, and through lse.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16, float32 or float64; any strides; D from 1 to 256 on fused backends.
        k: (B, Hk, Lk, D), dtype and device of q. Hq is a multiple of Hk: query head h uses key head h // (Hq / Hk).
        v: (B, Hk, Lk, Dv).
        causal: query i sees key j only if ``j <= i + q_offset``.
        q_offset: absolute position of query 0: an int, or an int32/int64 tensor (B,). None means ``Lk - Lq``, which
            lines the last query up with the last key, as a KV cache needs; 0 is PyTorch's ``is_causal``.
        window: (left, right): query i sees key j only if ``i + q_offset - left <= j <= i + q_offset + right``; None
            leaves a side open. Work falls with the window.
        kv_start: int32 or int64 (B,): entry b sees no key before ``kv_start[b]``, as where prompts are padded on the
            left; those cost nothing and have gradients 0. On a GPU values are not checked but cut to 0 .. Lk. Positions
            stay what they are. Where queries are not padded and the first one belongs to the first key that counts, say
            ``q_offset=kv_start`` too.
        mask: bool, broadcastable to (B, Hq, Lq, Lk); True takes part. Never expanded in memory.
        block_mask: `fastattn.BlockMask` for (B or 1, Hq or 1, Lq, Lk): a mask whose empty tiles cost nothing. What it
            has in common with ``causal`` or ``window`` belongs into it: then those tiles are not visited either.
        bias: any float dtype, broadcastable likewise, added to the scaled scores; -inf forbids. Its gradient has its
            own shape.
        alibi_slopes: float (Hq,) or (B, Hq): ``slope * |i + q_offset - j|`` is subtracted from the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before bias and slopes are added.
        sinks: float (Hq,): one more logit per head in each row's softmax, with no value of its own.
        scale: default ``1 / sqrt(D)``; 0 or at least 2**-126 in size.
        dropout_p: probability with which a weight is dropped, in [0, 1]. Applied as given: pass 0 when evaluating. The
            random bits come from the device's default generator, so `torch.manual_seed` fixes them.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"``, ``"reference"``; None chooses, as `explain` shows.

    Returns:
        out (B, Hq, Lq, Dv) in the dtype of q; with ``return_lse`` also lse (B, Hq, Lq) in float32 (float64 for
        float64 inputs), natural logarithm.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also where an explicit
            ``backend`` cannot serve the call, with every reason. Nothing falls back silently.

    Source: Vaswani et al., 2017 (arXiv:1706.03762); Dao, FlashAttention-2, 2023 (arXiv:2307.08691);
    ALiBi: Press et al., 2021 (arXiv:2108.12409); softcap: Gemma 2, 2024 (arXiv:2408.00118); sinks: Xiao et al., 2023
    (arXiv:2309.17453), in the learned form of gpt-oss, 2025.
    """
    if unknown:
        keywords.refuse(attention, unknown)
    if (division := divided.current()) is not None:
        if kv_start is not None:
            divided.refuse("kv_start", "a Tensor")
        return division.attention(
            q, k, v, causal=causal, q_offset=q_offset, window=window, mask=mask, block_mask=block_mask, bias=bias,
            alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    key = None
    if (
        window is kv_start is block_mask is bias is alibi_slopes is softcap is sinks is backend is None
        and return_lse is False
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        key, out = remembered.attention(q, k, v, mask, causal, q_offset, scale, True)
        if out is not None:
            return out
    spec = make_spec(
        q, k, v, causal=causal, q_offset=q_offset, window=window, kv_start=kv_start, mask=mask,
        block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
        dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    out, lse = _run(spec, backend, key)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _run(spec: AttentionSpec, backend: str | None, key: Any = None) -> tuple[Tensor, Tensor | None]:
    """(out, lse); ``key`` is what `remembered` called it."""
    if is_dtensor(spec.q):
        from fastattn.functional import sharded

        return sharded.attention(spec, backend)
    chosen = backends.choose(spec, backend)
    remembered.remember(key, spec, chosen)
    return ops.attention(spec, chosen)


def _explain(spec: AttentionSpec, backend: str | None) -> Explanation:
    if is_dtensor(spec.q):
        from fastattn.functional import sharded

        return sharded.explain(spec, backend)
    return backends.explain(spec, backend)


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
        seqused_k: int32 or int64 (sequences,): how many of its keys a sequence uses, the first ones; None is all of
            them. The others cost nothing, may be NaN, and have gradients 0. Positions count from what is used.
        max_seqlen_q, max_seqlen_k: taken so that calls written for other packages run; not needed, not read.
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
        if kv_start is not None:
            divided.refuse("kv_start", "a Tensor")
        return division.attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, causal=causal,
            q_offset=q_offset, window=window, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
            dropout_p=dropout_p, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    spec = varlen_spec(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), seqused_k=seqused_k, causal=causal,
        q_offset=q_offset, window=window, kv_start=kv_start, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
        scale=scale, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    out, lse = _run(spec, backend)
    out = out.squeeze(0).transpose(0, 1)  # whose gradient is a view: that of an index is a copy
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
    return _explain(spec, backend)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
    mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
    **unknown: Any,
) -> Explanation:
    """Which backend `attention` would run for the same arguments and, for each other one, why it would not.

    Nothing is computed. ``str()`` of the result is a table; ``.backend`` and ``.reasons`` are the data.
    """
    if unknown:
        keywords.refuse(explain, unknown)
    spec = make_spec(
        q, k, v, causal=causal, q_offset=q_offset, window=window, kv_start=kv_start, mask=mask,
        block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
        dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    return _explain(spec, backend)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, on fastattn's backends.

    Two differences: ``attn_mask`` and ``is_causal`` combine instead of excluding each other, and a row with nothing
    allowed gives 0 on every device, where scores and values are finite.

    Args:
        query: (..., Hq, Lq, D) with any number of leading batch dimensions, or (Lq, D) without heads.
        key: (..., Hk, Lk, D). What stands before the last two dimensions broadcasts.
        value: (..., Hk, Lk, Dv).
        attn_mask: bool (True takes part) or float (added), broadcastable to (..., Hq, Lq, Lk).
        dropout_p: applied as given, also in evaluation.
        is_causal: query i sees keys 0 .. i (top-left alignment).
        scale: default ``1 / sqrt(D)``.
        enable_gqa: Hq may be a multiple of Hk instead of broadcasting with it.

    Returns:
        (..., Hq, Lq, Dv) in the dtype of the query.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if unknown:
        keywords.refuse(scaled_dot_product_attention, unknown)
    known = None
    division = divided.current()
    if division is None and type(dropout_p) is float and dropout_p == 0.0:
        known, out = remembered.attention(query, key, value, attn_mask, is_causal, 0, scale, enable_gqa)
        if out is not None:
            return out
    lead = None
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"enable_gqa: expected a bool, got {type(enable_gqa).__name__}")
    if not leading.is_4d(query, key, value, enable_gqa):
        query, key, value, attn_mask, lead = leading.to_4d(query, key, value, attn_mask, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask: expected a Tensor, got {type(attn_mask).__name__}")
        if attn_mask.is_floating_point():
            bias = attn_mask
        elif attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            raise TypeError(
                f"attn_mask.dtype: expected bool (True takes part) or a floating-point dtype, got {attn_mask.dtype}"
            )
    if division is not None:
        options: Any = {"causal": is_causal, "q_offset": 0, "scale": scale, "dropout_p": dropout_p}
        out = division.attention(query, key, value, mask=mask, bias=bias, **options)
        return out if lead is None else out.reshape(*lead, *out.shape[-2:])
    spec = make_spec(
        query, key, value, causal=is_causal, q_offset=0, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p,
        names=leading.NAMES,
    )  # fmt: skip
    out, _ = _run(spec, None, known if lead is None else None)
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


# PyTorch's signature, for whoever looks: the keywords that are only there to be refused are not part of it.
scaled_dot_product_attention.__signature__ = (  # pyright: ignore[reportFunctionMemberAccess]
    (_signature := inspect.signature(scaled_dot_product_attention)).replace(
        parameters=[p for p in _signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    )
)
