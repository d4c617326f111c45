"""Keywords of other packages, and the names that their arguments have here."""

from collections.abc import Callable, Mapping
from typing import Any

_OURS = {
    "alibi": "alibi_slopes",
    "attn_bias": "bias",
    "attn_mask": "mask (bool, True takes part) or bias (float, added)",
    "block_table": "block_table of fastattn.attention_with_kvcache",
    "cache_seqlens": "cache_lens",
    "cu_seqlens": "cu_seqlens_q of fastattn.attention_varlen",
    "cu_seqlens_q": "cu_seqlens_q of fastattn.attention_varlen",
    "deterministic": "no argument, since the fused kernels always add up in one order",
    "dropout": "dropout_p",
    "enable_gqa": "no argument, since shapes say how many query heads share a key head",
    "is_causal": "causal, with q_offset=0 for PyTorch's top-left order",
    "key_padding_mask": "mask, as valid[:, None, None, :] with True where a key takes part",
    "logits_soft_cap": "softcap",
    "p": "dropout_p",
    "return_attn_probs": "return_lse; weights are never stored",
    "return_softmax_lse": "return_lse",
    "s_aux": "sinks",
    "score_mod": "bias, alibi_slopes or softcap",
    "sliding_window": "window=(left, right)",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window=(left, right), where None leaves a side open",
}
_PYTORCHS = {
    **{
        name: f"{name} of fastattn.attention"
        for name in ("alibi_slopes", "backend", "block_mask", "q_offset", "return_lse", "sinks", "softcap", "window")
    },
    "attn_bias": "attn_mask",
    "bias": "attn_mask",
    "causal": "is_causal",
    "dropout": "dropout_p",
    "key_padding_mask": "attn_mask, as valid[:, None, None, :] with True where a key takes part",
    "mask": "attn_mask",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window=(left, right) of fastattn.attention",
}


def refuse(function: Callable[..., Any], unknown: Mapping[str, object]) -> None:
    """Raise for keywords that a function does not have; the error gives the name to use here.

    Raises:
        TypeError: always.
    """
    names = _PYTORCHS if function.__name__ == "scaled_dot_product_attention" else _OURS
    name = next(iter(unknown))
    cure = f"; here it is {names[name]}" if name in names else ""
    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{cure}")
