"""`fastattn.attention`: validate, choose a backend, call it."""

from typing import Any, Literal, overload

from torch import Tensor

from fastattn import backends, ops
from fastattn.backends import Explanation
from fastattn.block_mask import BlockMask
from fastattn.functional import divided, keywords, remembered
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
            leaves a side open. A narrower window costs less.
        kv_start: int32 or int64 (B,): entry b sees no key before ``kv_start[b]``, for prompts with padding on the left.
            Those keys cost nothing and get gradients 0. Positions stay as they are: if the queries have no padding and
            query 0 belongs to key ``kv_start[b]``, also pass ``q_offset=kv_start``. On a GPU values are not checked but
            cut to 0 .. Lk.
        mask: bool, broadcastable to (B, Hq, Lq, Lk); True takes part. Never expanded in memory.
        block_mask: `fastattn.BlockMask` for (B or 1, Hq or 1, Lq, Lk): a mask whose empty tiles cost nothing. Build
            causal order and windows into it: tiles that only ``causal`` or ``window`` empties are still visited.
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
        return division.attention(
            q, k, v, causal=causal, q_offset=q_offset, window=window, kv_start=kv_start, mask=mask,
            block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
            dropout_p=dropout_p, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    key = None
    if (
        kv_start is block_mask is bias is alibi_slopes is sinks is backend is None
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        key, result = remembered.attention(
            q, k, v, mask, causal, q_offset, scale, True, window, softcap, return_lse
        )  # fmt: skip
        if result is not None:
            return result
    spec = make_spec(
        q, k, v, causal=causal, q_offset=q_offset, window=window, kv_start=kv_start, mask=mask,
        block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
        dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    out, lse = run(spec, backend, key)
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
    return explain_spec(spec, backend)


def run(spec: AttentionSpec, backend: str | None, key: Any = None) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a checked call. ``key``: under which `remembered` may keep the choice."""
    if is_dtensor(spec.q):
        from fastattn.functional import sharded

        return sharded.attention(spec, backend)
    chosen = backends.choose(spec, backend)
    remembered.remember(key, spec, chosen)
    return ops.attention(spec, chosen)


def explain_spec(spec: AttentionSpec, backend: str | None) -> Explanation:
    """Which backend `run` would take, and why not another."""
    if is_dtensor(spec.q):
        from fastattn.functional import sharded

        return sharded.explain(spec, backend)
    return backends.explain(spec, backend)
