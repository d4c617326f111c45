"""The next token from logits: the most probable one, or one drawn at random.

Dimensions in comments: N prompts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import _check as check
from fastattn.inference.decoding import Decoding

__all__ = ["Sampling", "TokenPicker", "draw", "penalise", "truncate"]

_LEAST_TEMPERATURE = 1e-30  # takes the most probable token already, and no quotient overflows


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits. The settings apply in the order listed here.

    Args:
        repetition_penalty: divides positive logits of tokens in the prompt or among the generated ones, and multiplies
            negative ones (Keskar et al. 2019, arXiv:1909.05858). 1 changes nothing.
        temperature: logits are divided by it; 0 takes the most probable token, always.
        top_k: keep the k largest logits, and those equal to the smallest of them (Fan et al. 2018, arXiv:1805.04833).
        top_p: keep the fewest most probable tokens that have at least this probability together (Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: keep tokens at least this times as probable as the most probable one (Nguyen et al. 2024,
            arXiv:2407.01082).
        seed: the same seed, prompts and `max_new_tokens` give the same tokens, whatever the state of torch's
            generators, and leave that state alone. None: from torch's CPU generator.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check.number("repetition_penalty", self.repetition_penalty, "(0, inf)")
        check.number("temperature", self.temperature, "[0, inf)")
        if self.top_k is not None:
            check.integer("top_k", self.top_k, 1)
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                check.number(name, getattr(self, name), "(0, 1]")
        if self.seed is not None:
            check.integer("seed", self.seed, 0)
            if self.seed >= 2**64:
                raise ValueError(f"seed: expected less than 2**64, got {self.seed}")


class TokenPicker:
    """The next token of each row from logits (N, V)."""

    def __init__(self, run: Decoding, sampling: Sampling) -> None:
        self.sampling = sampling
        target = run.target
        self.seen = None
        if sampling.repetition_penalty != 1.0:
            within = torch.ones_like(target, dtype=torch.float32)
            if run.lengths is not None:
                within *= torch.arange(target.shape[1], device=target.device) < run.lengths[:, None]
            counts = torch.zeros(target.shape[0], run.vocab_size, device=target.device)
            self.seen = counts.scatter_add_(1, target.long(), within) > 0
        self.uniform = None
        if sampling.temperature > 0.0:
            # On the CPU, row by row: a row's numbers then depend neither on the device nor on the other rows.
            generator = None if sampling.seed is None else torch.Generator("cpu").manual_seed(sampling.seed)
            shape = (target.shape[0], run.max_new_tokens)
            uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")
            self.uniform = uniform.to(target.device)

    def __call__(self, logits: Tensor, index: int) -> Tensor:
        if self.seen is not None:
            logits = penalise(logits.float(), self.seen, self.sampling.repetition_penalty)
        if self.uniform is None:
            token = logits.argmax(1)
        else:
            token = draw(truncate(logits.float(), self.sampling).softmax(1), self.uniform[:, index])
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (N, V) with those of `seen` tokens, boolean (N, V), made smaller."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised.clamp(max=torch.finfo(logits.dtype).max), logits)  # a small penalty overflows


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (N, V) at the temperature, -inf where `top_k`, `top_p` or `min_p` leaves a token out."""
    logits = logits / max(sampling.temperature, _LEAST_TEMPERATURE)
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        smallest = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=1, descending=True)
        p = ordered.softmax(1)
        before = p.cumsum(1) - p  # of all that are more probable
        before[:, 0] = 0.0
        logits = logits.masked_fill((before >= sampling.top_p).gather(1, index.argsort(1)), -math.inf)
    if sampling.min_p is not None:
        p = logits.softmax(1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(1, keepdim=True), -math.inf)
    return logits


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row of probabilities p (N, V) at which their sum passes `uniform` (N,), in [0, 1)."""
    total = p.double().cumsum(1)
    whole = total[:, -1:]
    at = torch.minimum(uniform[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    token = torch.searchsorted(total, at, right=True).squeeze(1)  # right: never a token of probability 0
    return token.clamp(max=p.shape[1] - 1)  # NaN has no place; the search that drew it raises
