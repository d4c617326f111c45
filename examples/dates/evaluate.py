"""Use of the trained model: conversion, exact match, the effect of the KV cache, and the decoder's attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from examples.dates import data
from fastattn.nn import EncoderDecoder


@dataclass(frozen=True)
class Answer:
    """The model's answer and its probability."""

    text: str
    probability: float


def convert(model: EncoderDecoder, texts: Sequence[str]) -> list[Answer]:
    """Convert written dates to ISO dates, greedily, all in one batch."""
    source, lengths = data.batch_sources(texts, next(model.parameters()).device)
    answers = with_cache(model, source, lengths)
    return [
        Answer(data.TARGET.decode(tokens), probability)
        for tokens, probability in zip(answers.tolist(), answers.scores.exp().tolist(), strict=True)
    ]


def with_cache(model: EncoderDecoder, source: Tensor, lengths: Tensor) -> fastattn.Generated:
    """Decode with a cache of the keys and values of earlier characters and of the source."""
    return fastattn.generate(
        model, source, data.LONGEST_TARGET, lengths=lengths, start=data.BOS, stop=data.EOS, pad=data.PAD
    )


@torch.no_grad()
def without_cache(model: EncoderDecoder, source: Tensor, lengths: Tensor) -> Tensor:
    """The same tokens (N, T) the slow way: each step computes all characters so far again."""
    memory = model.encode(source, lengths=lengths)
    target = torch.full_like(source[:, :1], data.BOS)
    ended = torch.zeros_like(target, dtype=torch.bool)
    while target.shape[1] <= data.LONGEST_TARGET and not ended.all():
        token = model.decode(target, memory, memory_lengths=lengths)[:, -1:].argmax(-1).masked_fill(ended, data.PAD)
        target = torch.cat([target, token], dim=1)
        ended |= token == data.EOS
    return target[:, 1:]


# ------------------------------------------------------------------------------------------------ exact match


@dataclass(frozen=True)
class Score:
    """The number of exactly right dates, by format, and the wrong ones."""

    right: dict[str, int]
    count: dict[str, int]
    mistakes: list[dict[str, str]]

    @property
    def accuracy(self) -> float:
        return sum(self.right.values()) / sum(self.count.values())


def score(model: EncoderDecoder, written: Sequence[data.Written]) -> Score:
    answers = convert(model, [text for text, _ in written])
    right, count = dict.fromkeys(data.FORMATS, 0), dict.fromkeys(data.FORMATS, 0)
    mistakes = []
    for (text, day), answer in zip(written, answers, strict=True):
        name = next(name for name, write in data.FORMATS.items() if write(day) == text)
        count[name] += 1
        right[name] += answer.text == day.isoformat()
        if answer.text != day.isoformat():
            mistakes.append({"source": text, "expected": day.isoformat(), "got": answer.text})
    return Score(right, count, mistakes)


# ------------------------------------------------------------------------------------------------- the cache


def teacher_forced(model: EncoderDecoder, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """Logits (N, L, V) after each token of target (N, L), all in one call."""
    return model(source, target, source_lengths=lengths)


def step_by_step(model: EncoderDecoder, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """The same logits, token after token through a KV cache."""
    memory = model.encode(source, lengths=lengths)
    cache = model.make_cache(len(target), target.shape[1], memory=memory, memory_lengths=lengths)
    return torch.cat([model.decode(token, cache=cache) for token in target.split(1, dim=1)], dim=1)


@torch.no_grad()
def compare_decoding(model: EncoderDecoder, written: Sequence[data.Written]) -> dict[str, Any]:
    """Is decoding with the cache what teacher forcing trained, and how much faster is it than without a cache?

    Returns: same_tokens, whether teacher forcing with the decoded tokens predicts each of them, and decoding without a
    cache finds them too; difference and largest, of the logits; seconds with and without a cache by batch size.
    """
    source, lengths, _ = data.batch(written, next(model.parameters()).device)
    answers = with_cache(model, source, lengths)
    target = torch.cat([torch.full_like(source[:, :1], data.BOS), answers.tokens[:, :-1]], dim=1)
    forced = teacher_forced(model, source, lengths, target)
    within = torch.arange(target.shape[1], device=target.device) < answers.lengths[:, None]
    same = torch.equal(forced.argmax(-1)[within], answers.tokens[within])
    same = same and torch.equal(answers.tokens, without_cache(model, source, lengths))
    difference = (forced - step_by_step(model, source, lengths, target))[within]
    seconds = {}
    for size in (1, len(written)):
        part = source[:size], lengths[:size]
        seconds[str(size)] = {
            "with_cache": _seconds(lambda part=part: with_cache(model, *part)),
            "without_cache": _seconds(lambda part=part: without_cache(model, *part)),
        }
    return {
        "tokens": int(within.sum()),
        "same_tokens": same,
        "difference": difference.abs().max().item(),
        "largest": forced[within].abs().max().item(),
        "seconds": seconds,
    }


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The time of the fastest of some runs, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


# -------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def cross_attention(model: EncoderDecoder, text: str, answer: str) -> tuple[Tensor, Tensor, Tensor]:
    """The attention of the decoder's last layer: weights (H, L, S) of L written characters, with EOS, over S read ones.

    A fused operator never holds these weights. They are computed again, from the queries and keys of the layer in a
    pass with teacher forcing. Cross-attention has no positions, mask (one source, no padding) or dropout, hence
    the weights are softmax(q k / sqrt(D)). The other two results, what the layer returned and what follows from the
    weights, (1, L, d_model) each, are equal except for rounding.
    """
    device = next(model.parameters()).device
    layer: Any = model.decoder.blocks[-1].cross_attn
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = layer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args[0], kwargs["memory"], output)), with_kwargs=True
    )
    try:
        source = data.encode_source(text)[None].to(device)
        model(source, torch.tensor([[data.BOS, *data.TARGET.encode(answer)]], device=device))
    finally:
        hook.remove()
    x, memory, output = seen[0]
    q, (k, v) = layer.queries(x), layer.keys_values(memory)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (1, H, L or S, D)
    weights = (q @ k.mT * layer.head_dim**-0.5).softmax(-1)
    return weights[0], output, layer.out_proj((weights @ v).transpose(1, 2).flatten(-2))
