"""Models of Hugging Face transformers as `fastattn.nn.CausalLM`, and weights back.

`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen3ForCausalLM` and `GPT2LMHeadModel`. Nothing is approximated. A weight
without a place, a place without a weight, and a setting that changes results but that `CausalLMConfig` cannot express
are errors that name it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn.integrations.huggingface import _require_transformers
from fastattn.nn import CausalLM, CausalLMConfig, Learned, LinearScaling, Llama3Scaling, RoPE, YarnScaling
from fastattn.nn.weights import Link, build, to_theirs

__all__ = ["export", "load"]

_LLAMA = (
    Link("model.embed_tokens.", ("embedding.",)),
    Link("model.norm.", ("decoder.norm.",)),
    Link("lm_head.", ("head.",)),
)
_LLAMA_LAYER = (
    Link("input_layernorm.", ("self_norm.",)),
    *(Link(f"self_attn.{name}.", (f"self_attn.{name}.",)) for name in ("q_proj", "k_proj", "v_proj")),
    *(Link(f"self_attn.{name}.", (f"self_attn.{name}.",)) for name in ("q_norm", "k_norm")),
    Link("self_attn.o_proj.", ("self_attn.out_proj.",)),
    Link("post_attention_layernorm.", ("feed_forward_norm.",)),
    *(Link(f"mlp.{name}.", (f"feed_forward.{name}.",)) for name in ("gate_proj", "up_proj", "down_proj")),
)
_GPT2 = (
    Link("transformer.wte.", ("embedding.",)),
    Link("transformer.wpe.weight", ("decoder.position.table",)),
    Link("transformer.ln_f.", ("decoder.norm.",)),
    Link("lm_head.", ("head.",)),
)
_GPT2_LAYER = (
    Link("ln_1.", ("self_norm.",)),
    Link("attn.c_attn.", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."), transposed=True),
    Link("attn.c_proj.", ("self_attn.out_proj.",), transposed=True),
    Link("ln_2.", ("feed_forward_norm.",)),
    Link("mlp.c_fc.", ("feed_forward.up_proj.",), transposed=True),
    Link("mlp.c_proj.", ("feed_forward.down_proj.",), transposed=True),
)


def load(model: nn.Module | str | os.PathLike[str], **options: Any) -> CausalLM:
    """A model of transformers, or a checkpoint of one, as a `CausalLM` with copies of its weights.

    It computes the same logits. Pad tokens on the right; the results at padding have no meaning. It has the dtype,
    device and mode of `model` and shares no memory with it, so for a moment there are two copies.

    Args:
        model: of a class named above, not a subclass; or a folder or a name on the Hub, for `from_pretrained`.
        options: for `from_pretrained`, such as `dtype`, `device_map` or `revision`.

    Raises:
        ImportError: transformers is not installed, or too old.
        TypeError: the model has another class, or the call gives `options` with a model.
        ValueError: weights do not fit, or a setting has no equivalent; the text names them.
    """
    _require_transformers()
    if isinstance(model, nn.Module) and options:
        raise TypeError(f"options: expected none with an existing model, got {', '.join(options)}")
    source: Any = model if isinstance(model, nn.Module) else _pretrained(model, options)
    family = _family(type(source))
    config = family.translate(source.config)
    ours = build(lambda: CausalLM(config), family.links, source.state_dict())
    if config.tie_embeddings:
        if not torch.equal(source.get_output_embeddings().weight, source.get_input_embeddings().weight):
            raise ValueError("lm_head.weight: expected the embedding, as tie_word_embeddings says; got another tensor")
        ours.head.weight = ours.embedding.weight
    return ours.train(source.training)


def export(model: CausalLM, hf_model: nn.Module) -> None:
    """Copy the weights of `model` into a model of transformers that computes the same: the inverse of `load`.

    `hf_model` keeps its dtype and device; `save_pretrained` then makes a checkpoint.

    Args:
        model: as from `load`, perhaps trained since.
        hf_model: such as `LlamaForCausalLM(config)`, of a configuration with the same meaning.

    Raises:
        ImportError, TypeError, ValueError: as in `load`; ValueError names a setting in which the two differ.
    """
    _require_transformers()
    if not isinstance(model, CausalLM):
        raise TypeError(f"model: expected fastattn.nn.CausalLM, got {type(model).__qualname__}")
    family = _family(type(hf_model))
    own, wanted = _meaning(model.config), _meaning(family.translate(hf_model.config))
    for name, value in own.items():
        if wanted[name] != value:
            raise ValueError(f"hf_model.config: expected what means {name} == {value!r}, got {wanted[name]!r}")
    hf_model.load_state_dict(to_theirs(family.links(model), model))


class _Family(NamedTuple):
    """Models that use the same names of weights."""

    translate: Callable[[Any], CausalLMConfig]
    model_links: tuple[Link, ...]
    layer_links: tuple[Link, ...]
    layers: str

    def links(self, model: CausalLM) -> list[Link]:
        layers = range(model.config.num_layers)
        return [
            *self.model_links,
            *(x.below(f"{self.layers}.{i}.", f"decoder.blocks.{i}.") for i in layers for x in self.layer_links),
        ]


def _pretrained(path: Any, options: dict[str, Any]) -> Any:
    """The model at `path`, with every weight from there. It reads no weights of a model that it refuses."""
    import transformers

    hub: Any = transformers
    config, _ = hub.AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
    kind = hub.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), type(config))
    _family(kind).translate(config)
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[what]:
            raise ValueError(f"{path}: expected the weights of {kind.__name__}, got {what} {list(info[what])}")
    return model


def _family(kind: type) -> _Family:
    name, module = kind.__name__, kind.__module__
    if name not in _FAMILIES or not module.startswith("transformers.models."):
        raise TypeError(f"model: expected {', '.join(_FAMILIES)} of transformers, not a subclass, got {module}.{name}")
    return _FAMILIES[name]


def _meaning(config: CausalLMConfig) -> dict[str, Any]:
    """The settings that decide results in evaluation, with defaults resolved."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.dim_per_head, "dim_feedforward": config.ff_dim}
    values["final_norm"] = config.norm_first if config.final_norm is None else config.final_norm
    return {name: x for name, x in values.items() if name not in ("dropout", "init_std", "checkpoint")}


def _llama(config: Any) -> CausalLMConfig:
    """LlamaConfig, MistralConfig or Qwen3Config."""
    _expect(config, attention_dropout=0.0, is_causal=True)
    bias = getattr(config, "attention_bias", False)
    if bias != (mlp_bias := getattr(config, "mlp_bias", False)):
        raise ValueError(
            f"config.attention_bias: expected biases everywhere or nowhere, got {bias}, mlp_bias {mlp_bias}"
        )
    return CausalLMConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dim_feedforward=config.intermediate_size,
        activation=_choose("hidden_act", config.hidden_act, {"silu": "swiglu", "gelu": "geglu"}),
        norm_eps=config.rms_norm_eps,
        bias=bias,
        position=_rope(config.rope_parameters),
        qk_norm=config.model_type == "qwen3",
        window=_window(config),
        tie_embeddings=config.tie_word_embeddings,
    )


def _gpt2(config: Any) -> CausalLMConfig:
    _expect(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        is_causal=True,
        attn_pdrop=config.resid_pdrop,
        embd_pdrop=config.resid_pdrop,
    )
    return CausalLMConfig(
        vocab_size=config.vocab_size,
        d_model=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        dim_feedforward=config.n_inner,
        activation=_choose("activation_function", config.activation_function, _GPT2_ACTIVATIONS),
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        bias=True,
        position=Learned(config.n_positions),
        dropout=config.resid_pdrop,
        tie_embeddings=config.tie_word_embeddings,
    )


_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    **{name: name for name in ("gelu", "relu", "silu")},
}
_LLAMA_FAMILY = _Family(_llama, _LLAMA, _LLAMA_LAYER, "model.layers")
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA_FAMILY,
    "MistralForCausalLM": _LLAMA_FAMILY,
    "Qwen3ForCausalLM": _LLAMA_FAMILY,
    "GPT2LMHeadModel": _Family(_gpt2, _GPT2, _GPT2_LAYER, "transformer.h"),
}


def _expect(config: Any, **wanted: Any) -> None:
    for name, value in wanted.items():
        given = getattr(config, name, value)
        if given != value:
            raise ValueError(f"config.{name}: expected {value!r} for CausalLM, got {given!r}")


def _choose(name: str, given: str, known: dict[str, Any]) -> Any:
    if given not in known:
        raise ValueError(f"config.{name}: expected one of {', '.join(map(repr, known))}, got {given!r}")
    return known[given]


def _window(config: Any) -> tuple[int, int] | None:
    """The sliding window in the terms of `fastattn.attention`: the keys beside the query's own."""
    if config.model_type == "qwen3":
        kinds = set(config.layer_types)
        if len(kinds) > 1:
            raise ValueError(f"config.layer_types: expected one kind for all layers, got {', '.join(sorted(kinds))}")
        size = config.sliding_window if kinds == {"sliding_attention"} else None
    else:
        size = config.sliding_window if config.model_type == "mistral" else None  # Llama would ignore one
    return None if size is None else (size - 1, 0)


_SCALINGS: dict[str, tuple[type | None, dict[str, str]]] = {  # class, and names of its parameters
    "default": (None, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_max_len",
            "low_freq_factor": "low",
            "high_freq_factor": "high",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_max_len",
            "beta_slow": "slow",
            "beta_fast": "fast",
            "attention_factor": "attention_factor",
        },
    ),
}


def _rope(parameters: dict[str, Any]) -> RoPE:
    """Convert `config.rope_parameters`. Each changes results, so an unknown one is an error."""
    given = {name: value for name, value in parameters.items() if value is not None}
    for name, only in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.pop(name, only) != only:
            raise ValueError(f"config.rope_parameters[{name!r}]: expected {only}, got {parameters[name]}")
    if "rope_theta" not in given:
        raise ValueError(f"config.rope_parameters: expected rope_theta, one for all layers, got {', '.join(given)}")
    theta, kind = given.pop("rope_theta"), given.pop("rope_type")
    given.pop("type", None)  # the older name of rope_type
    if kind not in _SCALINGS:
        raise ValueError(f"config.rope_parameters['rope_type']: expected one of {', '.join(_SCALINGS)}, got {kind!r}")
    scaling, names = _SCALINGS[kind]
    if kind == "yarn":
        numerator, denominator = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        if numerator and denominator and "factor" in given:
            growth = 0.1 * math.log(max(given["factor"], 1.0))
            given.setdefault("attention_factor", (numerator * growth + 1) / (denominator * growth + 1))
    if not given.keys() <= names.keys() or ("factor" in names and "factor" not in given):
        raise ValueError(
            f"config.rope_parameters: expected {', '.join(names) or 'nothing more'} for rope_type {kind!r}, "
            f"got {', '.join(given) or 'nothing'}"
        )
    return RoPE(theta, scaling(**{names[name]: value for name, value in given.items()}) if scaling else None)
