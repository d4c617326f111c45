"""What transformers calls of a kernel of the Hub: attention under the masks of "sdpa".

`fastattn.integrations.huggingface` hands over what is known instead of such masks, so that forbidden tiles cost
nothing; a kernel of the Hub has no say in the mask.
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
    """`fastattn.integrations.huggingface.attention_forward` where no mask means what it does for "sdpa".

    Args:
        module, query, key, value, options: as there.
        attention_mask: bool or float, broadcastable to (B, Hq, Lq, Lk), with windows and padding in it. None: causal
            order alone, top-left, if ``is_causal`` or, where that is None, ``module.is_causal`` says so.
        is_causal: counts without a mask only.
        sliding_window: not read, since the mask has it where it forbids anything.

    Returns:
        (B, Lq, Hq, Dv), and the weights where they are asked for, otherwise None.
    """
    if attention_mask is None and is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
