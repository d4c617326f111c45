"""Every attention model of the installed transformers, built small and random, with inputs to call it with."""

import contextlib
import copy
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    (r"^(num_experts_per_tok|num_experts_per_token|moe_top_k|top_k|moe_k)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^(sliding_window|attention_window|local_attention|sliding_window_size)$", 4),
    (r"^image_size$", 32),
    (r"^patch_size$", 8),
    (r"^num_mel_bins$", 16),
    (r"^(width|depth)_coefficient$", 1),
    (r"dropout|_drop$|^layerdrop$|_pdrop$|drop_path|layerdrop|jitter", 0.0),
)

# Where the sizes above do not fit one another: what a model is made of keeps its proportions, and fewer are made of it.
KEPT = re.compile(
    r"coefficient|layers$|^depth$|vocab_size$|experts|top_k|^moe_k$|^n_group$|topk_group|window|local_attention|drop|jitter"
)
WIDTH = re.compile(
    r"size$|dim$|dims$|^d_|^n_embd$|width|heads?$|ffn|n_inner|channels|rank|kv_heads|features|num_filters"
)
FIXED = re.compile(
    r"vocab|image|patch|window|head_dim|conv|kernel|stride|batch|group|chunk|num_channels|in_channels|d_kv"
)
# The ways to try, in order: what widths and heads are divided by (0: the sizes of the table), and whether to `fit`.
WAYS = ((0, False), (0, True), (1, True), (4, True), (16, True))
LARGEST = 30_000_000

# Values that a configuration leaves open.
OPEN = {
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48, "n_shared_experts": 1, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "deepstack_layer_map": [(0, 0)],
}  # fmt: skip

# Parts of models that are too large as a whole.
PARTS = {
    "align (text)": "AlignTextModel",
    "clap (text)": "ClapTextModel",
    "gemma3n (text)": "Gemma3nTextModel",
    "step3p7 (text)": "Step3p7TextModel",
}
# A model type, and changes of its configuration.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma (both sides)": ("gemma", {"use_bidirectional_attention": True}),
    "gemma2 (both sides)": ("gemma2", {"use_bidirectional_attention": True}),
    "llama (both sides)": ("llama", {"is_causal": False}),
}


ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
PER_LAYER = {"full_attention": ROTARY, "sliding_attention": ROTARY}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
SAM = {
    "prompt_encoder_config.image_embedding_size": 4, "vision_config.num_pos_feats": 16,
    "vision_config.output_channels": 32, "prompt_encoder_config.hidden_size": 32,
}  # fmt: skip
RESNET = {
    "backbone_config.embedding_size": 8, "backbone_config.hidden_sizes": [8, 16, 32, 64],
    "backbone_config.depths": [1, 1, 1, 1],
}  # fmt: skip
PLACES = {"image_token_index": 5, "video_token_index": 5}
# Values without a usable default in the configuration.
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "blip-2": PLACES,
    "instructblip": PLACES,
    "instructblipvideo": PLACES,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "cohere_compass": {"text_config": {"rope_parameters": PER_LAYER}},
    "cohere_compass_text": {"rope_parameters": PER_LAYER},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "kosmos-2": {"latent_query_num": 4},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "esm": {"vocab_size": 120, "pad_token_id": 0, "mask_token_id": 1},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
}
# Values set after the sizes: a path into the configuration, and its value.
AFTERWARDS: dict[str, dict[str, Any]] = {
    "gemma3n (text)": {
        "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 120,
    },
    "step3p7 (text)": {"sliding_window": 4},
    "step3p7": {"text_config.sliding_window": 4},
    "align": {"projection_dim": 320},
    "sam": SAM,
    "sam_hq": SAM,
    "rt_detr": RESNET | {"encoder_in_channels": [16, 32, 64]},
    "rt_detr_v2": RESNET | {"encoder_in_channels": [16, 32, 64]},
}  # fmt: skip


class CannotBuild(Exception):
    """The model cannot be made small, or cannot be called with the inputs made here; the text says why."""


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


def shrink(config: Any, divisor: int = 0, fitted: bool = False) -> None:
    """Set the sizes of a configuration, and of those inside it, by their names; with a divisor, in proportion."""
    before = vars(config).get("num_hidden_layers")
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value, divisor, fitted)
            continue
        if name == "rope_parameters" and isinstance(value, dict) and not (fitted and _settled(value, divisor)):
            if value.get("rope_type") == "longrope":
                value["rope_type"] = "default"
            value["mrope_section"] = [2, 1, 1]  # only multimodal models look for it: half of head_dim
            if "partial_rotary_factor" in value:
                value["partial_rotary_factor"] = 1.0
        if divisor:
            value = _divided(name, value, divisor)
            _set(config, name, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for pattern, size in SIZES:
            if divisor and not KEPT.search(name):
                break
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
    if not divisor and (
        "kv_lora_rank" in vars(config) if fitted else hasattr(config, "kv_lora_rank")
    ):  # every head has keys of its own
        _set(config, "num_key_value_heads", config.num_attention_heads)
    _set(config, "apply_spec_augment", False)
    for name in [name for name in vars(config) if re.match("mask_(time|feature)_prob", name)]:
        _set(config, name, 0.0)
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= 120:
            _set(config, name, 110 + len(name) % 9)
    if isinstance(getattr(config, "pad_token_id", 0), int):
        _set(config, "pad_token_id", 0)
    if fitted:
        fit(config, before)


def _settled(rope: dict[str, Any], divisor: int) -> bool:
    """Whether the parameters of the rotary embedding stay: one set for each kind of layer, or heads as they were."""
    if any(isinstance(x, dict) for x in rope.values()) or divisor:
        return True
    sections = rope.get("mrope_section")
    if isinstance(sections, list) and len(sections) == 3 and sections[0] == sections[1]:
        rope["mrope_section"] = [1, 1, 2]
        return True
    return False


def fit(config: Any, layers_before: Any) -> None:
    """Sizes that follow from others, and values for those that a configuration leaves open."""
    sizes = vars(config)
    layers = sizes.get("num_hidden_layers")
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    for name, value in list(sizes.items()):
        if "vocab_size" in name and isinstance(value, int):
            _set(config, name, min(value, 120))
        if isinstance(value, list) and isinstance(layers, int) and len(value) == layers_before and len(value) > layers:
            _set(config, name, value[:layers])
    for name, value in (
        ("num_kv_shared_layers", 0),
        ("hidden_size_per_layer_input", 8),
        ("base_channels", 32),
        ("output_channels", 32),
    ):
        if isinstance(sizes.get(name), int):
            _set(config, name, value)
        if re.search("num_key_value.*heads$", name) and isinstance(heads, int) and isinstance(value, int):
            _set(config, name, min(value, heads))
    opened: dict[str, Any] = dict(OPEN)
    if "sliding_attention" in (sizes.get("layer_types") or ()):
        opened["sliding_window"] = 4
    if "hybrid" in (kinds := sizes.get("layers_block_type") or ()):
        layers = 4
        _set(config, "num_hidden_layers", layers)
        _set(config, "layers_block_type", list(dict.fromkeys(kinds)) * 2)
        _set(config, "hybrid_layer_ids", [1, 3])
        _set(config, "attention_hidden_size", 2 * (hidden or 0))
        _set(config, "attention_head_dim", 2 * (hidden or 0) // (heads or 1))
    if isinstance(sizes.get("conv_dim"), list | tuple):
        _set(config, "num_feat_extract_layers", len(config.conv_dim))
    if isinstance(sizes.get("decoder_in_channels"), list) and "encoder_hidden_dim" in sizes:
        _set(config, "decoder_in_channels", [config.encoder_hidden_dim] * len(config.decoder_in_channels))
    if "image_embedding_size" in sizes:
        _set(config, "image_embedding_size", config.image_size // config.patch_size)
    if isinstance(hidden, int) and isinstance(heads, int):
        opened |= {"head_dim": hidden // heads, "num_key_value_heads": heads, "upsample_groups": hidden}
    if isinstance(layers, int):
        opened |= {"layer_types": ["full_attention"] * layers, "mlp_layer_types": ["dense", "sparse"] * layers}
    for name, value in opened.items():
        if name in sizes and sizes[name] is None:
            _set(config, name, value[:layers] if isinstance(value, list) else value)
    if "upsample_groups" in sizes and isinstance(hidden, int):
        _set(config, "upsample_groups", hidden)
    if "qk_head_dim" in sizes:
        _set(config, "qk_head_dim", config.qk_nope_head_dim + config.qk_rope_head_dim)
    inner = sizes.get("mamba_d_ssm") or sizes.get("mamba_expand", 0) * (hidden or 0)
    for count, size in (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")):
        if inner and sizes.get(count):
            _set(config, "mamba_d_ssm" if "mamba_d_ssm" in sizes else "", inner)
            _set(config, size, inner // sizes[count])


def _divided(name: str, value: Any, divisor: int) -> Any:
    """A width or a number of heads, or a list of them, made smaller; images of at most 256 pixels a side."""
    if name in ("image_size", "input_size") and isinstance(value, int):
        return min(value, 256)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return type(value)(_divided(name, x, divisor) for x in value)
    if divisor == 1 or type(value) is not int or not WIDTH.search(name) or FIXED.search(name):
        return value
    return max(value // divisor, min(value, 1 if "head" in name else 4))


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError, TypeError, ValueError, NotImplementedError):  # computed from others
        setattr(config, name, value)


def build(name: str, divisor: int = 0, fitted: bool = False) -> nn.Module:
    """A small model of this type with weights large enough that attention is far from uniform, in float64."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    model: Any
    try:
        if name in PARTS:
            model = getattr(transformers, PARTS[name])
            config = model.config_class()
        else:
            kind, changes = CHANGES.get(name, (name, SETTINGS.get(name, {})))
            config = CONFIG_MAPPING[kind](**copy.deepcopy(changes))
            model = _model_of(type(config), MODEL_MAPPING)
        shrink(config, divisor, fitted)
        for path, value in AFTERWARDS.get(name, {}).items():
            *within, last = path.split(".")
            setattr(functools.reduce(getattr, within, config), last, value)
        model = model[0] if isinstance(model, tuple | list) else model
        if fitted and model.config_class is not type(config):  # the model of a part
            config = next((x for x in vars(config).values() if isinstance(x, model.config_class)), config)
        if divisor and _parameters(model, config) > LARGEST:
            raise CannotBuild("more than 30 million parameters with its widths in proportion")
        model = model._from_config(config, attn_implementation="eager", experts_implementation="eager")
    except CannotBuild:
        raise
    except Exception as error:
        raise CannotBuild(one_line(error)) from error
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise CannotBuild("more than 30 million parameters after its sizes were reduced")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=min(0.2, parameter.shape[-1] ** -0.5), generator=generator)
    return model.double()


def _model_of(kind: type, mapping: Any) -> Any:
    """The model of a configuration; in its own module where transformers lists one that is not public."""
    with contextlib.suppress(ValueError):
        return mapping[kind]
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    return getattr(module, kind.__name__.replace("Config", "Model"))


def _parameters(model: Any, config: Any) -> int:
    """The number of its parameters, without allocating them; 0 if the model reads a value while it is built."""
    with contextlib.suppress(Exception), torch.device("meta"):
        made = model._from_config(copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager")
        return sum(p.numel() for p in made.parameters())
    return 0


def one_line(error: Exception) -> str:
    """The first line of an error, after its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:150] if text else ''}"
