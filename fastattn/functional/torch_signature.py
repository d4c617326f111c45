"""`fastattn.scaled_dot_product_attention`, with the signature of PyTorch's function."""

import inspect
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import divided, keywords, leading, remembered
from fastattn.functional.attention import run
from fastattn.spec import make_spec


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
    out, _ = run(spec, None, known if lead is None else None)
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


# Introspection sees PyTorch's signature, without the catch-all that exists only to refuse keywords.
scaled_dot_product_attention.__signature__ = (  # pyright: ignore[reportFunctionMemberAccess]
    (_signature := inspect.signature(scaled_dot_product_attention)).replace(
        parameters=[p for p in _signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    )
)
