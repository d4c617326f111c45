"""The public functions: validate, choose a backend, call it."""

from typing import Literal, overload

from torch import Tensor

from . import backends, ops
from .backends import Explanation
from .spec import make_spec

Backend = Literal["triton", "cuda", "torch", "reference"]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., mask: Tensor | None = ..., bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., dropout_p: float = ...,
    return_lse: Literal[False] = ..., backend: Backend | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    window: tuple[int | None, int | None] | None = ..., mask: Tensor | None = ..., bias: Tensor | None = ...,
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
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale * q k^T + bias) v`` over the keys that are allowed.

    All arguments combine freely. A query row with nothing allowed gives output 0, lse -inf (or the sink) and
    gradients 0. Everything is differentiable: q, k, v, ``bias``, ``alibi_slopes``, ``sinks``, and through lse.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16, float32 or float64; any strides; D from 1 to 256 on fused backends.
        k: (B, Hk, Lk, D), dtype and device of q. Hq is a multiple of Hk: query head h uses key head h // (Hq / Hk).
        v: (B, Hk, Lk, Dv).
        causal: query i sees key j only if ``j <= i + q_offset``.
        q_offset: absolute position of query 0: an int, or an int32/int64 tensor (B,). None means ``Lk - Lq``, which
            lines the last query up with the last key, as a KV cache needs; 0 is PyTorch's ``is_causal``.
        window: (left, right): query i sees key j only if ``i + q_offset - left <= j <= i + q_offset + right``; None
            leaves a side open. Work falls with the window.
        mask: bool, broadcastable to (B, Hq, Lq, Lk); True takes part. Never expanded in memory.
        bias: any float dtype, broadcastable likewise, added to the scaled scores; -inf forbids. Its gradient has its
            own shape.
        alibi_slopes: float (Hq,) or (B, Hq): ``slope * |i + q_offset - j|`` is subtracted from the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before bias and slopes are added.
        sinks: float (Hq,): one more logit per head in each row's softmax, with no value behind it.
        scale: default ``1 / sqrt(D)``.
        dropout_p: probability with which a weight is dropped, in [0, 1]. Applied as given: pass 0 when evaluating. The
            random bits come from the device's default generator, so `torch.manual_seed` fixes them.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``; None chooses, as `explain` shows.

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
    spec = make_spec(
        q, k, v, causal=causal, q_offset=q_offset, window=window, mask=mask, bias=bias, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    out, lse = ops.attention(spec, backends.choose(spec, backend))
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Explanation:
    """Which backend `attention` would run for the same arguments and, for each other one, why it would not.

    Nothing is computed. ``str()`` of the result is a table; ``.backend`` and ``.reasons`` are the data.
    """
    spec = make_spec(
        q, k, v, causal=causal, q_offset=q_offset, window=window, mask=mask, bias=bias, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    return backends.explain(spec, backend)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, on fastattn's backends.

    Two differences: ``attn_mask`` and ``is_causal`` combine instead of excluding each other, and a row with nothing
    allowed gives 0 on every device.

    Args:
        query: (..., Hq, Lq, D) with any number of leading batch dimensions, or (Lq, D) without heads.
        key: (..., Hk, Lk, D).
        value: (..., Hk, Lk, Dv).
        attn_mask: bool (True takes part) or float (added), broadcastable to (..., Hq, Lq, Lk).
        dropout_p: applied as given, also in evaluation.
        is_causal: query i sees keys 0 .. i (top-left alignment).
        scale: default ``1 / sqrt(D)``.
        enable_gqa: allow Hq to be a multiple of Hk.

    Returns:
        (..., Hq, Lq, Dv) in the dtype of the query.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    leading = None
    if getattr(query, "ndim", 4) != 4:
        leading, (query, key, value, attn_mask) = query.shape[:-2], _to_4d(query, key, value, attn_mask)
    mask, bias = attn_mask, None
    if attn_mask is not None and attn_mask.is_floating_point():
        mask, bias = None, attn_mask
    spec = make_spec(
        query, key, value, causal=is_causal, q_offset=0, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p,
        names=("query", "key", "value"),
    )  # fmt: skip
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key.shape[-3]: expected query.shape[-3] == {query.shape[1]} heads unless enable_gqa=True, "
            f"got {key.shape[1]}"
        )
    out, _ = ops.attention(spec, backends.choose(spec))
    return out if leading is None else out.reshape(*leading, *out.shape[-2:])


def _to_4d(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Insert or merge leading dimensions; (N, L, D) becomes N batch entries of one head."""
    ndim = query.ndim
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} dimensions like query, got shape {tuple(tensor.shape)}")
    if ndim < 2:
        raise ValueError(f"query: expected at least 2 dimensions (length, head_dim), got shape {tuple(query.shape)}")
    if ndim < 4:
        position = 0 if ndim == 2 else 1
        query, key, value = (
            t[None, None] if ndim == 2 else t.unsqueeze(position) for t in (query, key, value)
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
        return query, key, value, attn_mask
    batch = query.shape[:-3]
    if attn_mask is not None and attn_mask.ndim > 3:
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
    return query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4), attn_mask
