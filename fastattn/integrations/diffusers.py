"""``model.set_attention_backend("fastattn")`` for the models of Hugging Face diffusers."""

from typing import Any

from torch import Tensor

from fastattn.functional import scaled_dot_product_attention

NAME = "fastattn"


def register() -> None:
    """Register ``set_attention_backend("fastattn")`` for every model of diffusers. A second call changes nothing.

    It adds one member to diffusers' enumeration of backends and changes nothing else. It also registers
    ``with diffusers.attention_backend("fastattn"):``.

    Raises:
        ImportError: diffusers is not installed, or has no registry of attention backends (before 0.35).
    """
    try:
        from diffusers.models.attention_dispatch import (  # pyright: ignore[reportMissingImports]
            AttentionBackendName,
            _AttentionBackendRegistry,
        )
    except ImportError as error:
        raise ImportError(
            "diffusers: expected 0.35 or later (pip install 'diffusers>=0.35'), found none or an older one"
        ) from error
    if NAME in AttentionBackendName._value2member_map_:
        return
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_map_[NAME.upper()] = member
    AttentionBackendName._member_names_.append(NAME.upper())
    AttentionBackendName._value2member_map_[NAME] = member
    _AttentionBackendRegistry.register(member)(attention_forward)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The attention function for models of diffusers, on `fastattn.scaled_dot_product_attention`.

    Args:
        query: (B, Lq, Hq, D).
        key: (B, Lk, Hk, D).
        value: (B, Lk, Hk, Dv).
        attn_mask: bool (True takes part) or float (added), broadcastable to (B, Hq, Lq, Lk); or (B, Lk), of the keys.
        dropout_p: of the weights.
        is_causal: query i sees keys 0 .. i.
        scale: default ``1 / sqrt(D)``.
        enable_gqa: Hq is a multiple of Hk.
        return_lse: not supported.
        _parallel_config: of diffusers' context parallelism; not supported.

    Returns:
        (B, Lq, Hq, Dv).

    Raises:
        ValueError: the call asks for lse or diffusers' context parallelism; or as in `scaled_dot_product_attention`.
    """
    if return_lse or _parallel_config is not None:
        name = "return_lse" if return_lse else "_parallel_config"
        raise ValueError(f"{name}: expected none with set_attention_backend('fastattn'), got one")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)
