"""Keywords of other packages. When a caller passes one, the error of the layer or config names ours."""

from typing import TypeVar

from fastattn import _check as check

Class = TypeVar("Class", bound=type)

_FUNCTION = "scale of fastattn.attention; this layer has torch.nn's 1 / sqrt(head_dim)"
_WINDOW = "TransformerConfig(window=(left, right)), for fastattn.nn.Attention"
_SOFTCAP = "TransformerConfig(softcap=...), for fastattn.nn.Attention"
_ALIBI = "TransformerConfig(position=ALiBi()), for fastattn.nn.Attention"
_NO_SCALE = "no argument, since the scale is 1 / sqrt(head_dim)"
_BY_CLASS = "decided by the class: Encoder or Decoder"
_NEVER_STORED = "no argument, since weights are never stored"
_LAYER = {
    **{
        name: f"TransformerConfig({name}=...), for fastattn.nn.Attention"
        for name in ("num_kv_heads", "qk_norm", "sinks", "softcap", "window")
    },
    "alibi_slopes": _ALIBI,
    "causal": "is_causal of forward, with the mask itself",
    "dropout_p": "dropout of the layer",
    "logits_soft_cap": _SOFTCAP,
    "num_key_value_heads": "TransformerConfig(num_kv_heads=...), for fastattn.nn.Attention",
    "scale": _FUNCTION,
    "sliding_window": _WINDOW,
    "sm_scale": _FUNCTION,
    "softmax_scale": _FUNCTION,
    "rope": "TransformerConfig(position=RoPE()), for fastattn.nn.Attention",
    "use_alibi": _ALIBI,
    "window_size": _WINDOW,
}
_WIDTH = ("dim", "hidden_size", "model_dim", "n_embd")
_HEADS = ("heads", "n_head", "n_heads", "num_attention_heads")
_FEEDFORWARD = ("d_ff", "dim_ff", "ffn_dim", "intermediate_size")

multihead_attention = check.keywords(
    **_LAYER,
    **dict.fromkeys(("d_model", *_WIDTH), "embed_dim"),
    **dict.fromkeys(("nhead", *_HEADS), "num_heads"),
    attention_dropout="dropout",
    is_causal="is_causal of forward, with attn_mask",
    qkv_bias="bias",
    return_attn_probs="need_weights of forward",
)
"""The constructor of MultiheadAttention."""

_SIZES = {
    **dict.fromkeys(("embed_dim", *_WIDTH), "d_model"),
    **dict.fromkeys(("num_heads", *_HEADS), "nhead"),
    **dict.fromkeys(_FEEDFORWARD, "dim_feedforward"),
    "hidden_act": "activation",
    "pre_norm": "norm_first",
}
_CALLS = {
    "is_causal": "is_causal of forward, with the mask itself",
    "return_attn_probs": "need_weights of fastattn.nn.MultiheadAttention.forward",
}
transformer = check.keywords(
    **_LAYER,
    **_SIZES,
    **_CALLS,
    **dict.fromkeys(("depth", "num_layers", "num_hidden_layers"), "num_encoder_layers and num_decoder_layers"),
)
"""The constructors of layers, and of Transformer."""

stack = check.keywords(
    **_LAYER,
    **{name: f"{ours} of the layer that is copied" for name, ours in _SIZES.items()},
    **_CALLS,
    **dict.fromkeys(("depth", "num_hidden_layers"), "num_layers"),
)
"""The constructors of TransformerEncoder and TransformerDecoder."""

_FORWARD = {
    "alibi_slopes": "an argument of fastattn.attention; here a bias is a float mask, which is added to the scores",
    "dropout_p": "dropout of the constructor, in training mode",
    "scale": _FUNCTION,
    "sm_scale": _FUNCTION,
    "softcap": _SOFTCAP,
    "softmax_scale": _FUNCTION,
    "window": _WINDOW,
    "window_size": _WINDOW,
}
_WEIGHTS = ("output_attentions", "return_attention_weights", "return_attn_probs", "return_weights")
_NO_WEIGHTS = "need_weights of fastattn.nn.MultiheadAttention.forward; this layer returns none"

attend = check.keywords(
    **_FORWARD,
    **dict.fromkeys(_WEIGHTS, "need_weights"),
    attention_mask="key_padding_mask, where True means padding",
    attn_bias="attn_mask (float, added)",
    bias="attn_mask (float, added)",
    causal="is_causal, with attn_mask",
    hidden_states="query, key, value",
    k="key",
    mask="attn_mask, where True means forbidden",
    memory="key, value",
    q="query",
    v="value",
    x="query, key, value",
)
"""`MultiheadAttention.forward`."""


def _masks(of: str, causal: str, padding: str) -> dict[str, str]:
    return {
        **_FORWARD,
        **dict.fromkeys(_WEIGHTS, _NO_WEIGHTS),
        "attention_mask": f"{padding}, where True means padding",
        "attn_bias": f"{of} (float, added)",
        "attn_mask": f"{of}, where True means forbidden",
        "bias": f"{of} (float, added)",
        "causal": f"{causal}, with {of}",
        "is_causal": f"{causal}, with {of}",
        "key_padding_mask": f"{padding}, where True means padding",
        "mask": f"{of}, where True means forbidden",
        "need_weights": _NO_WEIGHTS,
    }


encode_layer = check.keywords(**_masks("src_mask", "is_causal", "src_key_padding_mask"), hidden_states="src", x="src")
"""`TransformerEncoderLayer.forward`."""

encode = check.keywords(
    **_masks("mask", "is_causal", "src_key_padding_mask"),
    hidden_states="src",
    src_mask="mask, where True means forbidden",
    x="src",
)
"""`TransformerEncoder.forward`."""

decode = check.keywords(
    **_masks("tgt_mask", "tgt_is_causal", "tgt_key_padding_mask"),
    encoder_hidden_states="memory",
    hidden_states="tgt",
    x="tgt",
)
"""`TransformerDecoderLayer.forward` and `TransformerDecoder.forward`."""

translate = check.keywords(
    **_masks("src_mask, tgt_mask or memory_mask", "src_is_causal or tgt_is_causal", "src_key_padding_mask"),
    x="src",
)
"""`Transformer.forward`."""

blocks = check.keywords(
    attention_mask="lengths: padding stands at the end",
    attn_mask="mask, where True takes part",
    decoder_input_ids="target",
    input_ids="tokens, or source of an EncoderDecoder",
    is_causal="decided by the class: Encoder or Decoder; causal of Attention",
    key_padding_mask="lengths, or mask with True where an element takes part",
    memory_key_padding_mask="memory_lengths, or memory_mask with True where an element takes part",
    need_weights=_NEVER_STORED,
    output_attentions=_NEVER_STORED,
    past_key_values="cache",
    return_attn_probs=_NEVER_STORED,
    softmax_scale=_NO_SCALE,
    src_key_padding_mask="lengths, or mask with True where an element takes part",
    use_cache="cache, from make_cache",
    window_size="window of TransformerConfig, (left, right)",
)
"""`forward` of `Attention` and of the models."""

_config = check.keywords(
    **dict.fromkeys(("embed_dim", *_WIDTH), "d_model"),
    **dict.fromkeys(("nhead", *_HEADS), "num_heads"),
    **dict.fromkeys(_FEEDFORWARD, "dim_feedforward"),
    **dict.fromkeys(("depth", "n_layer", "n_layers", "num_hidden_layers"), "num_layers"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), "norm_eps"),
    **dict.fromkeys(("attention_dropout", "dropout_p", "resid_pdrop"), "dropout"),
    alibi="position=ALiBi()",
    attn_logit_softcapping="softcap",
    causal=_BY_CLASS,
    hidden_act="activation",
    is_causal=_BY_CLASS,
    max_position_embeddings="max_len of position=Learned(...) or Sinusoidal(...); RoPE and ALiBi have no limit",
    n_kv_heads="num_kv_heads",
    num_key_value_heads="num_kv_heads",
    pre_norm="norm_first",
    rope_theta="position=RoPE(theta=...)",
    sliding_window="window, (left, right)",
    softmax_scale=_NO_SCALE,
    tie_word_embeddings="tie_embeddings of CausalLMConfig",
    window_size="window, (left, right)",
)


def of_config(cls: Class) -> Class:
    """A config whose constructor names ours."""
    cls.__init__ = _config(cls.__init__)
    return cls
