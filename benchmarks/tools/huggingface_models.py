"""Every attention model of the installed transformers, built small and random, with inputs to call it with."""

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS, LENGTH = (9, 6), 9
PADDINGS = ("none", "right", "left")
SIZES = (
    (r"(^|_)(num_)?(hidden_|encoder_|decoder_|text_|vision_|attention_)?layers$|^n_layers?$|_layers$|^depth$", 2),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r"(^|_)(attention_)?heads$|^n_heads?$|_heads$", 4),
    (r"^(head_dim|d_kv|qk_nope_head_dim|v_head_dim|attention_head_size|kv_channels|global_head_dim)$", 8),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(q_lora_rank|kv_lora_rank)$", 16),
    (r"vocab_size$", 120),
    (
        r"intermediate_size$|ffn_dim$|^d_ff$|^d_inner$|^n_inner$|^ffn_hidden_size$|^dim_feedforward$|^d_intermediate$",
        48,
    ),
    (r"^(hidden_size|d_model|n_embd|embed_dim|dim|projection_dim|embedding_size|hidden_dim|emb_dim|width)$", 32),
    (r"_hidden_size$|_embed_dim$|_projection_dim$|_proj_dim$", 32),
    (r"^(max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx)$", 64),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_top_k|top_k|moe_k)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^(sliding_window|attention_window|local_attention|sliding_window_size)$", 4),
    (r"^image_size$", 32),
    (r"^patch_size$", 8),
    (r"^num_mel_bins$", 16),
    (r"dropout|_drop$|^layerdrop$|_pdrop$|drop_path|layerdrop|jitter", 0.0),
)

# Towers that the whole model is too large to show.
PARTS = {"align (text)": "AlignTextModel", "clap (text)": "ClapTextModel"}
# A model type, and what is changed in its configuration.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma (both sides)": ("gemma", {"use_bidirectional_attention": True}),
    "gemma2 (both sides)": ("gemma2", {"use_bidirectional_attention": True}),
    "llama (both sides)": ("llama", {"is_causal": False}),
}


class CannotBuild(Exception):
    """The model does not come small, or cannot be called with inputs made here; the text says why."""


def architectures() -> list[str]:
    """Model types whose code calls transformers' attention interface or its masks, in order."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    root = Path(transformers.__file__).parent / "models"
    found = []
    for name in MODEL_MAPPING_NAMES:
        if name not in CONFIG_MAPPING:
            continue
        folder = CONFIG_MAPPING[name].__module__.split(".")[2]
        code = "".join(path.read_text() for path in (root / folder).glob("modeling_*.py"))
        if "ALL_ATTENTION_FUNCTIONS" in code or "_mask(" in code:
            found.append(name)
    return sorted([*found, *PARTS, *CHANGES])


def shrink(config: Any) -> None:
    """Set the sizes of a configuration, and of those inside it, by their names."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
            continue
        if name == "rope_parameters" and isinstance(value, dict):
            if value.get("rope_type") == "longrope":
                value["rope_type"] = "default"
            value["mrope_section"] = [2, 1, 1]  # only multimodal models look for it: half of head_dim
            if "partial_rotary_factor" in value:
                value["partial_rotary_factor"] = 1.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for pattern, size in SIZES:
            if re.search(pattern, name):
                keep = isinstance(value, int) and isinstance(size, int) and 0 <= value < size
                if not keep:
                    _set(config, name, type(value)(size))
                break
    layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and isinstance(layers, int) and kinds:
        distinct = list(dict.fromkeys(kinds))
        _set(config, "num_hidden_layers", max(layers, len(distinct)))
        _set(config, "layer_types", (distinct * 2)[: max(layers, len(distinct))])
    if hasattr(config, "kv_lora_rank"):  # every head has keys of its own
        _set(config, "num_key_value_heads", config.num_attention_heads)
    _set(config, "apply_spec_augment", False)
    for name in [name for name in vars(config) if re.match("mask_(time|feature)_prob", name)]:
        _set(config, name, 0.0)
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= 120:
            _set(config, name, 110 + len(name) % 9)
    if isinstance(getattr(config, "pad_token_id", 0), int):
        _set(config, "pad_token_id", 0)


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError, TypeError, ValueError, NotImplementedError):  # computed from others
        setattr(config, name, value)


def build(name: str) -> nn.Module:
    """A small model of this type with weights large enough that attention is far from uniform, in float64."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    model: Any
    try:
        if name in PARTS:
            model = getattr(transformers, PARTS[name])
            config = model.config_class()
        else:
            kind, changes = CHANGES.get(name, (name, {}))
            config = CONFIG_MAPPING[kind]()
            for key, value in changes.items():
                setattr(config, key, value)
            model = MODEL_MAPPING[type(config)]
        shrink(config)
        model = model[0] if isinstance(model, tuple | list) else model
        model = model._from_config(config, attn_implementation="eager", experts_implementation="eager")
    except Exception as error:
        raise CannotBuild(one_line(error)) from error
    if sum(p.numel() for p in model.parameters()) > 30_000_000:
        raise CannotBuild("more than 30 million parameters after its sizes were reduced")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=min(0.2, parameter.shape[-1] ** -0.5), generator=generator)
    return model.double()


def inputs(model: nn.Module, padding: str) -> Iterator[dict[str, Any]]:
    """Arguments to try, the plainest first."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (len(LENGTHS), LENGTH), generator=generator)
    given: dict[str, Any] = {}
    if "input_ids" in names:
        given["input_ids"] = ids
        if padding != "none" and "attention_mask" in names:
            given["attention_mask"] = valid(padding).long()
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = ids.flip(1)
    vision = _first(config, "image_size")
    size = vision if isinstance(vision, int) else 32
    channels = _first(config, "num_channels") or 3
    pixels = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    bins = _first(config, "num_mel_bins") or 16
    frames = 2 * (_first(config, "max_source_positions") or 32)
    features = torch.randn(2, bins, frames, generator=generator, dtype=torch.float64)
    options: list[dict[str, Any]] = []
    if "input_ids" in given:
        options.append(given)
        if "pixel_values" in names:
            options.append(given | {"pixel_values": pixels})
    elif "pixel_values" in names:
        options += [{"pixel_values": pixels}, {"pixel_values": pixels[:, None]}]
    if "input_features" in names:
        for x in (features, features.transpose(1, 2)):
            options.append(given | {"input_features": x})
    if "input_values" in names:
        wave = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
        options += [given | {"input_values": x} for x in (wave, wave[:, None], features.transpose(1, 2))]
    if not options:
        raise CannotBuild(f"no inputs are known for {', '.join(list(names)[:4])}")
    if "use_cache" in names:
        options = [option | {"use_cache": False} for option in options]
    yield from options


def _first(config: Any, name: str) -> Any:
    for one in (config, *(x for x in vars(config).values() if hasattr(x, "to_dict"))):
        if isinstance(getattr(one, name, None), int):
            return getattr(one, name)
    return None


def valid(padding: str) -> Tensor:
    """bool (B, L): what is no padding."""
    lengths, positions = torch.tensor(LENGTHS)[:, None], torch.arange(LENGTH)
    if padding == "none":
        return torch.ones(len(LENGTHS), LENGTH, dtype=torch.bool)
    return positions < lengths if padding == "right" else positions >= LENGTH - lengths


def one_line(error: Exception) -> str:
    """The first line of an error, after its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:150] if text else ''}"
