"""Attention for transformers' layers that also returns its weights, in plain operations."""

import functools
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import divided


def weights_are_collected() -> bool:
    """Whether the caller set ``output_attentions=True`` on a model that does not pass it to its attention layers."""
    if torch.compiler.is_compiling():
        return False
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return any(name.endswith("attentions") for name in collected or ())


def attention_with_weights(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`fastattn.attention` that also returns all weights, which it holds in memory.

    Args:
        query, key, value: (B, Hq, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, Dv).
        options: arguments of `fastattn.attention`; they include ``softcap``, ``sinks``, ``scale`` and ``dropout_p``.

    Returns:
        (B, Hq, Lq, Dv), and the weights after dropout (B, Hq, Lq, Lk).
    """
    divided.refuse("output_attentions", "True")
    if not torch.compiler.is_compiling():
        _warn()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    scores = (query @ key.transpose(-1, -2)) * scale
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if "bias" in options:
        scores = scores + options["bias"]
    allowed = _allowed(options, scores)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if options["sinks"] is not None:
        sinks = options["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide)[..., : key.shape[2]].to(value.dtype)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)  # a row that sees no key is 0
    weights = torch.nn.functional.dropout(weights, options["dropout_p"])
    return weights @ value, weights


def _allowed(options: dict[str, Any], scores: Tensor) -> Tensor | None:
    """The allowed pairs: bool, broadcastable to the scores, or None if nothing is forbidden."""
    if "mask" in options:
        return options["mask"]
    if "block_mask" in options:
        return options["block_mask"].to_dense()
    window = options.get("window")
    if not options.get("causal") and window is None:
        return None
    i = torch.arange(scores.shape[2], device=scores.device)[:, None] + options["q_offset"]
    j = torch.arange(scores.shape[3], device=scores.device)
    allowed = (j <= i) if options["causal"] else torch.ones_like(j <= i)
    if options.get("kv_start") is not None:
        allowed = allowed & (j >= options["kv_start"].view(-1, 1, 1, 1))
    return allowed if window is None else allowed & (j >= i - window[0]) & (j <= i + window[1])


@functools.cache
def _warn() -> None:
    warnings.warn(
        "output_attentions=True: attn_implementation='fastattn' then computes all weights, in plain operations; "
        "without it, no tensor of size Lq x Lk is kept",
        stacklevel=4,
    )
