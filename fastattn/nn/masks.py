"""Convert the masks of torch.nn's layers for the operator; attention that returns its weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.functional import divided


def check_mask_dtype(mask: Tensor | None, name: str) -> None:
    """Refuse integer masks, with torch.nn's text."""
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")


def merge_masks(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    extra_keys: int,
    H: int,
    own: slice,
) -> tuple[Tensor | None, Tensor | None]:
    """The two masks of the layer (True = ignore, or float) as the operator's `mask` (True = take part) and `bias`.

    Two masks become one tensor only if both are float. Otherwise each keeps its size and the operator broadcasts it: no
    tensor of N*H*L*S elements arises unless the caller made it. ``own`` selects heads among the H.
    """
    N, _, L, _ = q.shape
    S = k.shape[2]
    mask = bias = None
    if attn_mask is not None:
        expected = (L, S - extra_keys) if attn_mask.dim() == 2 else (N * H, L, S - extra_keys)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (N, H))[:, own]
        if extra_keys:  # they are open to all
            attn_mask = F.pad(attn_mask, (0, extra_keys))
        if attn_mask.dtype == torch.bool:
            mask = ~attn_mask  # (L, S) or (N, H, L, S)
        else:
            bias = attn_mask
    if key_padding_mask is not None:
        if extra_keys:
            key_padding_mask = F.pad(key_padding_mask, (0, extra_keys))
        for dim, size in enumerate((N, S)):
            if key_padding_mask.shape[dim] != size:
                raise AssertionError(
                    f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}"
                )
        key_padding_mask = key_padding_mask[:, None, None, :]  # (N, 1, 1, S)
        if key_padding_mask.dtype != torch.bool:
            bias = key_padding_mask if bias is None else bias + key_padding_mask
        elif mask is None:
            mask = ~key_padding_mask
        else:
            bias = _additive(~key_padding_mask, q.dtype)
    return mask, bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask (True = take part) to the float mask that the layer adds to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float, H: int, own: slice
) -> tuple[Tensor, Tensor]:
    """Unfused attention, which returns its weights (N, H, L, S). Dropout draws the same numbers as torch.nn's layer."""
    divided.refuse("need_weights", "True")
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, H, L, S)
    if mask is not None:
        additive = _additive(mask, scores.dtype)
        bias = additive if bias is None else bias + additive
    if bias is None:
        weights = scores.softmax(dim=-1)
    else:
        # At least float32: many masks hold the lowest float32 in place of -inf, and float16 cannot represent it.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores + bias.to(scores.dtype)
        # A row with nothing allowed would be NaN, as would its gradient: give it finite scores, then zero weights.
        nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0).to(v.dtype)
    if dropout_p and own != slice(0, H):  # draw for all heads, then keep the part of these
        weights = weights * F.dropout(weights.new_ones(weights.shape[0], H, *weights.shape[2:]), dropout_p)[:, own]
    else:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
