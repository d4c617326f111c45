"""The function of a Hub kernel that transformers calls: attention with the masks of "sdpa".

`fastattn.integrations.huggingface` also replaces those masks, so that forbidden tiles cost nothing; a kernel of the Hub
cannot.
"""

from typing import Any

from torch import Tensor, nn

from fastattn.integrations.huggingface import attention_forward

__all__ = ["flash_attn_forward", "supports_flash_attn"]

supports_flash_attn = True
"""Tells transformers to call `flash_attn_forward`."""


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn.integrations.huggingface.attention_forward`, but no mask means the same as for "sdpa".

    Args:
        module, query, key, value, options: as there.
        attention_mask: bool or float, broadcastable to (B, Hq, Lq, Lk), including windows and padding. None: top-left
            causal order if ``is_causal`` or, if that is None, ``module.is_causal`` is True.
        is_causal: only applies without a mask.
        sliding_window: ignored, because the mask includes it.

    Returns:
        (B, Lq, Hq, Dv), and the weights if the call asks for them, otherwise None.
    """
    if attention_mask is None and is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
