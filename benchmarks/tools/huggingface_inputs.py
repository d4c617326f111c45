"""Arguments for a call of a model of transformers, made from its signature and the sizes in its configuration."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .huggingface_models import CannotBuild

LENGTHS, LENGTH = (9, 6), 9
PADDINGS = ("none", "right", "left")
GRID = (1, 4, 4)  # frames, rows and columns of patches


def inputs(model: nn.Module, padding: str) -> Iterator[dict[str, Any]]:
    """Arguments to try, the plainest first."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)
    words = _first(config, "vocab_size") or 100
    ids = torch.randint(3, max(min(100, words), 4), (len(LENGTHS), LENGTH), generator=generator)
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
    options += list(_by_signature(model, given))
    books = _first(config, "num_codebooks")
    if books and given:
        options += [
            given | {"input_ids": ids.repeat(books, 1)},
            given | {"input_ids": ids[..., None].repeat(1, 1, books)},
        ]
        options.append(given | {"input_ids": ids[..., None].repeat(1, 1, books + 1)})
    if not options:
        raise CannotBuild(f"no inputs are known for {', '.join(list(names)[:4])}")
    if "use_cache" in names:
        options = [option | {"use_cache": False} for option in options]
    yield from options


def _by_signature(model: nn.Module, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every argument with a known name: first those without a default, then all, in each of their shapes."""
    known = _made(model)
    signature = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in signature.items() if p.default is p.empty and p.kind not in kinds and n not in given]
    if any(name not in known for name in needed):
        return
    usual = [
        n for n in signature if n in known and n not in given and (n != "inputs_embeds" or "input_ids" not in given)
    ]
    tried = []
    for names in (needed, usual):
        if names and names not in tried:
            tried.append(names)
            shapes = max(len(known[name]) for name in names)
            for i in range(shapes):
                option = given | {name: known[name][min(i, len(known[name]) - 1)] for name in names}
                yield option
                if "pixel_values" in option and "input_ids" in given:
                    yield from _with_places(model.config, option)


def _with_places(config: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same with places for an image before the text."""
    token = next(
        (x for n in ("image_token_id", "image_token_index", "video_token_index") if (x := _first(config, n))), 0
    )
    for name in ("num_query_tokens", "image_seq_length", "mm_tokens_per_image"):
        if token and (count := _first(config, name)):
            places = torch.full((len(LENGTHS), count), token)
            ids = torch.cat([places, given["input_ids"]], 1)
            longer = {"input_ids": ids}
            if "attention_mask" in given:
                longer["attention_mask"] = torch.cat([torch.ones_like(places), given["attention_mask"]], 1)
            yield given | longer


def _made(model: nn.Module) -> dict[str, list[Any]]:
    """Values to try by the name of an argument."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = len(LENGTHS)
    ids = torch.randint(3, 100, (batch, LENGTH), generator=generator)
    corners = torch.tensor([[1, 2, 5, 9]]).expand(batch, LENGTH, 4)
    channels = _first(config, "num_channels") or _first(config, "in_channels") or _first(config, "in_chans") or 3
    size = _first(config, "image_size") or 64
    patch = _first(config, "patch_size") or _first(config, "spatial_patch_size") or 8
    tubelet = _first(config, "temporal_patch_size") or _first(config, "patch_temporal") or 1
    count = batch * GRID[0] * GRID[1] * GRID[2]
    frames = _first(config, "num_frames") or _first(config, "frames_per_clip") or 4
    linear, conv = (_entry(model, kind) for kind in (nn.Linear, nn.Conv1d))
    hidden = _first(config, "hidden_size") or _first(config, "d_model") or 32
    bins = [
        x for n in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size",
                    "input_dim", "mel_bins", "num_mels", "feature_size")
        if (x := _first(config, n))
    ] + [x for x in (linear, conv) if x]  # fmt: skip
    spans = [x for x in (_first(config, "max_length"), 64, 128, 200, 72) if x]
    past = (_first(config, "context_length") or 16) + max(getattr(config, "lags_sequence", None) or [0])
    series = _first(config, "num_input_channels") or 1
    flat = [
        random(count, channels * tubelet * patch * patch),
        random(count, channels, patch, patch),
        random(count, channels, tubelet, patch, patch),
        random(count, channels * patch * patch),
        random(count, tubelet, patch, patch, channels),
        random(count, linear or 1),
        random(batch, count // batch, channels * tubelet * patch * patch),
        random(batch, count // batch, linear or 1),
        random(1, channels, patch, count * patch),
        random(count, 2 * patch, 2 * patch, channels),
    ]
    images = [
        random(batch, channels, size, size),
        random(batch, frames, channels, size, size),
        random(batch, 2, channels, size, size),
        random(batch, 1, channels, size, size),
        random(batch, channels, 64, 64),
        random(batch, channels, 224, 224),
    ]
    spectra = [random(batch, *shape) for b in bins for n in spans for shape in ((n, b), (b, n), (1, n, b))]
    grid = torch.tensor([GRID] * batch)
    names = inspect.signature(model.forward).parameters
    patches = any(
        name in names for name in ("grid_thw", "image_grid_thw", "spatial_shapes", "pixel_position_ids", "target_sizes")
    )
    vision = "input_ids" not in names
    if patches and (vision or "spatial_shapes" in names):
        images = flat
    made: dict[str, list[Any]] = {
        "pixel_values": images,
        "hidden_states": flat,
        "grid_thw": [grid],
        "image_grid_thw": [grid] if vision else [],
        "merge_sizes": [torch.ones(batch, dtype=torch.long), torch.full((batch,), 2)],
        "pixel_values_videos": [random(batch, frames, channels, size, size)],
        "input_features": spectra,
        "audio_mel": [x for x in spectra if x.ndim == 3],
        "input_values": [random(batch, n) for n in (7680, 4000, 16000)]
        + [random(batch, 1, 7680)]
        + spectra
        + [random(batch, LENGTH, hidden)],
        "bbox": [corners],
        "qformer_input_ids": [ids],
        "text_inputs": [ids],
        "task_inputs": [ids, torch.randint(3, 100, (batch, _first(config, "task_seq_len") or 77), generator=generator)],
        "pixel_mask": [],
        "past_values": [random(batch, past), random(batch, past, series), random(batch, past * 4)],
        "past_time_features": [random(batch, past, _first(config, "num_time_features") or 1)],
        "past_observed_mask": [torch.ones(batch, past)],
        "past_values_padding": [torch.zeros(batch, past), torch.zeros(batch, past * 4)],
        "freq": [torch.zeros(batch, 1, dtype=torch.long)],
        "future_values": [random(batch, _first(config, "prediction_length") or 1)],
        "future_time_features": [
            random(batch, _first(config, "prediction_length") or 1, _first(config, "num_time_features") or 1)
        ],
        "states": [random(batch, LENGTH, _first(config, "state_dim") or 17)],
        "actions": [random(batch, LENGTH, _first(config, "act_dim") or 4)],
        "rewards": [random(batch, LENGTH, 1)],
        "returns_to_go": [random(batch, LENGTH, 1)],
        "timesteps": [torch.arange(LENGTH).expand(batch, LENGTH)],
        "visual_feats": [random(batch, LENGTH, _first(config, "visual_feat_dim") or 32)],
        "visual_pos": [random(batch, LENGTH, _first(config, "visual_pos_dim") or 4)],
        "query_embeds": [random(batch, LENGTH, hidden)],
        "encoder_hidden_states": [random(batch, LENGTH, _first(config, "encoder_hidden_size") or hidden)],
        "noise_embeds": [random(batch, LENGTH, hidden)],
        "context_hidden_states": [random(batch, LENGTH, x) for x in _widths(model)],
        "latents": [random(batch, hidden, LENGTH), random(batch, LENGTH, hidden)],
        "decoder_input_values": [random(batch, LENGTH, hidden)],
        "spatial_shapes": [torch.tensor([GRID[1:]] * batch)],
        "pixel_attention_mask": [torch.ones(batch, GRID[1] * GRID[2], dtype=torch.long)],
        "target_sizes": [torch.tensor([GRID[1:]] * batch)],
        "input_features_mask": [torch.ones(batch, n, dtype=torch.long) for _ in bins for n in spans for _ in range(3)],
        "audio_mel_mask": [torch.zeros(batch, x.shape[1], dtype=torch.bool) for x in spectra if x.ndim == 3],
        "input": images,
        "inputs_embeds": [random(batch, LENGTH, hidden)],
        "pixel_position_ids": [torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(batch, 16, 2)],
        "image_attention_mask": [torch.ones(batch, LENGTH, 1)],
        "image_embeds_position_mask": [
            (torch.arange(LENGTH) < (_first(config, "latent_query_num") or 0)).long().expand(batch, LENGTH)
        ],
        "inputs": [random(batch, LENGTH, _first(config, "d_model") or hidden)],
        "state": [random(batch, _first(config, "max_state_dim") or 32)],
        "action_embeds": [random(batch, LENGTH, hidden)],
        "input_points": [torch.rand(batch, 1, 2, 2, generator=generator, dtype=torch.float64) * 30],
    }
    return {name: values for name, values in made.items() if values}


def _entry(model: nn.Module, kind: type[nn.Module]) -> int:
    """The input size of the first layer of this kind; 0 without one."""
    first: Any = next((x for x in model.modules() if isinstance(x, kind)), None)
    return (first.in_features if kind is nn.Linear else first.in_channels) if first is not None else 0


def _widths(model: nn.Module) -> list[int]:
    """The input sizes of its linear layers."""
    return list(dict.fromkeys(x.in_features for x in model.modules() if isinstance(x, nn.Linear)))


def _first(config: Any, name: str) -> Any:
    for one in (config, *(x for x in vars(config).values() if hasattr(x, "to_dict"))):
        if isinstance(getattr(one, name, None), int):
            return getattr(one, name)
    return None


def valid(padding: str) -> Tensor:
    """bool (B, L): tokens that are not padding."""
    lengths, positions = torch.tensor(LENGTHS)[:, None], torch.arange(LENGTH)
    if padding == "none":
        return torch.ones(len(LENGTHS), LENGTH, dtype=torch.bool)
    return positions < lengths if padding == "right" else positions >= LENGTH - lengths
