"""Text from a model: greedy search, sampling and beam search over a KV cache.

Dimensions in comments: N prompts, L prompt length, T new tokens, B beams, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastattn import _check as check
from fastattn.nn import CausalLM, DynamicCache, EncoderDecoder, KVCache

__all__ = ["BeamSearch", "Generated", "Sampling", "generate", "stream"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits. The parts apply in the order in which they stand here.

    Args:
        repetition_penalty: logits of tokens that stand in the prompt or were generated are divided by it if positive,
            multiplied if negative (Keskar et al. 2019, arXiv:1909.05858). 1 changes nothing.
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


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `num_beams` most probable beginnings at each step; the best finished text wins.

    The score of a text is its log-probability divided by length ** `length_penalty` (Wu et al. 2016, arXiv:1609.08144,
    without the constants). Rules and results are those of transformers' `generate`.

    Args:
        num_beams: beams per prompt.
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: end a prompt's search as soon as `num_beams` texts are finished; False: when moreover no beam
            scores better, at its present length, than the worst of them.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check.integer("num_beams", self.num_beams, 1)
        check.number("length_penalty", self.length_penalty, "(-inf, inf)")
        check.flag("early_stopping", self.early_stopping)


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        tokens: int64 (N, T), the new tokens, a stop token included; after it padding. T is the largest of `lengths`.
        lengths: int64 (N,), new tokens of each row.
        scores: float32 (N,), log-probability of each row's tokens: by the model, whatever the sampling; of beam search
            divided by length ** length_penalty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def tolist(self) -> list[list[int]]:
        """The tokens of each row without padding."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[:length] for row, length in rows]


@torch.no_grad()
def generate(
    model: CausalLM | EncoderDecoder,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    start: int | Tensor | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int = 0,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    cache: KVCache | Callable[..., KVCache] = KVCache,
) -> Generated:
    """Continue each prompt; or, by an encoder-decoder, answer each source.

    The model computes in evaluation mode, without gradients, and is then as it was. With `stop` the host waits for the
    device once per step, to see whether all rows have ended; without it never.

    Args:
        model: a `CausalLM`; an `EncoderDecoder`, for which `prompt` is the source; or `torch.compile` of a `CausalLM`,
            which compiles the steps, not the prompt's pass. Of an EncoderDecoder compile `model.decoder.compile()`.
        prompt: (N, L) integer, padded at the end if at all; or N tensors (L,) of any lengths.
        max_new_tokens: at most so many per row.
        lengths: integer (N,), tokens of each prompt before its padding, at least 1. None: all.
        start: what every target begins with, for an encoder-decoder alone: one token, or (N, length).
        stop: tokens that end a row.
        pad: what `tokens` holds after a row's end.
        sampling: None takes the most probable token at each step; so does `temperature=0`, with a repetition penalty
            if you like. Row b's random numbers depend on the seed, b and `max_new_tokens`, not on the other rows.
        beams: beam search, in place of sampling.
        cache: a kind of cache, made as large as needed: `KVCache`, `DynamicCache`, `PagedCache`, `SlidingWindowCache`,
            or `functools.partial` of one with its options. Or a `CausalLM`'s cache, which the prompt continues: it then
            holds all tokens but the last of each row, with which the next prompt should begin.

    Returns:
        `Generated`: tokens, their number per row, and scores.
    """
    run = _prepare(model, prompt, max_new_tokens, lengths, start, stop, sampling, cache)
    if beams is not None:
        check.instance("beams", beams, BeamSearch, type(None))
        if sampling is not None:
            raise ValueError("beams: expected None with sampling, got both")
        if isinstance(cache, KVCache):
            raise ValueError("cache: expected a kind of cache for beam search, got one that exists")
        with _evaluating(model):
            return _beam_search(run, beams, pad)
    tokens, alive = [], []
    scores = torch.zeros(run.target.shape[0], device=run.target.device)
    with _evaluating(model):
        for token, logits, running in _steps(run):
            score = logits.float().log_softmax(1).gather(1, token[:, None]).squeeze(1)
            scores += score if running is None else score.where(running, 0.0)
            tokens.append(token)
            alive.append(torch.ones_like(token, dtype=torch.bool) if running is None else running)
    kept = torch.stack(alive, 1)
    return Generated(torch.stack(tokens, 1).where(kept, pad), kept.sum(1), scores)


def stream(
    model: CausalLM | EncoderDecoder,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    start: int | Tensor | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int = 0,
    sampling: Sampling | None = None,
    cache: KVCache | Callable[..., KVCache] = KVCache,
) -> Iterator[Tensor]:
    """The tokens of `generate` while they are made: one int64 (N,) per step, `pad` in rows that have ended.

    The arguments are those of `generate`, and are checked at once; the model runs when a token is asked for, and
    between tokens is in the mode that you left it in.
    """
    run = _prepare(model, prompt, max_new_tokens, lengths, start, stop, sampling, cache)
    return _streamed(model, _steps(run), pad)


def _streamed(model: nn.Module, steps: Iterator[tuple[Tensor, Tensor, Tensor | None]], pad: int) -> Iterator[Tensor]:
    while True:
        with torch.no_grad(), _evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        token, _, running = step
        yield token if running is None else token.where(running, pad)


@dataclass
class _Decoding:
    """A checked call: the model as two functions, and what they start from."""

    prefill: Callable[..., Tensor]
    """(tokens (N, L), cache, lengths) -> logits (N, V) after them."""
    step: Callable[..., Tensor]
    """(tokens (N, 1), cache=, lengths=) -> logits (N, 1, V)."""
    make_cache: Callable[[], KVCache]
    target: Tensor
    lengths: Tensor | None
    max_new_tokens: int
    vocab_size: int
    stop: Tensor | None
    sampling: Sampling
    keeps_cache: bool
    """The cache is the caller's: rows that have ended must not grow in it."""


def _prepare(
    model: CausalLM | EncoderDecoder,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    lengths: Tensor | None,
    start: int | Tensor | None,
    stop: int | Iterable[int] | None,
    sampling: Sampling | None,
    cache: KVCache | Callable[..., KVCache],
) -> _Decoding:
    origin = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(origin, (CausalLM, EncoderDecoder)):
        raise TypeError(f"model: expected a CausalLM or an EncoderDecoder, got {type(model).__name__}")
    device = origin.head.weight.device
    check.integer("max_new_tokens", max_new_tokens, 1)
    prompt, lengths = _check_prompt(prompt, lengths, device)
    vocab_size = origin.head.out_features
    stops = _check_stop(stop, vocab_size, device)
    check.instance("sampling", sampling, Sampling, type(None))
    given = isinstance(cache, KVCache)

    encode: Callable[..., Tensor] | None = None
    if isinstance(origin, CausalLM):
        if start is not None:
            raise ValueError("start: expected None for a CausalLM, whose prompt it is, got a value")
        target, target_lengths = prompt, lengths
        step: Callable[..., Tensor] = model
    else:
        if origin is not model:
            raise TypeError("model: expected an EncoderDecoder after model.decoder.compile(), got torch.compile of it")
        if given:
            raise TypeError(f"cache: expected a kind of cache for an EncoderDecoder, got a {type(cache).__name__}")
        target, target_lengths = _check_start(start, prompt), None
        step = origin.decode
        encode = origin.encode

    needed = target.shape[1] + max_new_tokens - 1  # the last token is not read
    held = cache.length if isinstance(cache, KVCache) else 0
    table = origin.decoder.position
    if table is not None and held + needed > (most := table.table.shape[0]):
        raise ValueError(
            f"max_new_tokens: expected at most {most + 1 - held - target.shape[1]}, since the model has {most} "
            f"positions, got {max_new_tokens}"
        )
    if isinstance(cache, KVCache):
        if cache.batch != prompt.shape[0]:
            raise ValueError(f"cache.batch: expected prompt.shape[0] == {prompt.shape[0]}, got {cache.batch}")
        if held + needed > cache.capacity and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"cache: expected room for {needed} more tokens, got {held} of {cache.capacity} places in use"
            )
    elif not callable(cache):
        raise TypeError(f"cache: expected a cache or a kind of cache, got {type(cache).__name__}")

    def make_cache() -> KVCache:
        if isinstance(cache, KVCache):
            return cache
        memory: dict[str, Any] = {}
        if encode is not None:
            memory = {"memory": encode(prompt, lengths=lengths), "memory_lengths": lengths}
        return origin.make_cache(prompt.shape[0], needed, cache, **memory)

    sampling = Sampling(temperature=0.0) if sampling is None else sampling
    return _Decoding(
        origin.prefill, step, make_cache, target, target_lengths, max_new_tokens, vocab_size, stops, sampling, given
    )


def _steps(run: _Decoding) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Per step the token of each row (N,), the logits (N, V) it comes from, and which rows had not ended before it."""
    choose = _Choice(run)
    cache = run.make_cache()
    logits = run.prefill(run.target, cache, run.lengths)
    running = None if run.stop is None else torch.ones_like(run.target[:, 0], dtype=torch.bool)
    for index in range(run.max_new_tokens):
        token = choose(logits, index)
        yield token, logits, running
        if running is not None and run.stop is not None:
            running = running & (token[:, None] != run.stop).all(1)
            if not running.any():
                return
        if index + 1 < run.max_new_tokens:
            cache.reserve(1)  # before the model, which may be compiled: see PagedCache
            kept = running if run.keeps_cache else None
            logits = run.step(token[:, None], cache=cache, lengths=kept)[:, -1]


class _Choice:
    """The next token of each row from logits (N, V)."""

    def __init__(self, run: _Decoding) -> None:
        self.sampling = sampling = run.sampling
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
            # On the CPU, row after row: the same numbers on every device, and for a row whatever the others are.
            generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
            shape = (target.shape[0], run.max_new_tokens)
            self.uniform = torch.rand(shape, dtype=torch.float64, generator=generator).to(target.device)

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
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (N, V) at the temperature, -inf where `top_k`, `top_p` or `min_p` leaves a token out."""
    logits = logits / sampling.temperature
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
    return torch.searchsorted(total, at, right=True).squeeze(1)  # right: never a token of probability 0


def _beam_search(run: _Decoding, beams: BeamSearch, pad: int) -> Generated:
    N, B, T, V = run.target.shape[0], beams.num_beams, run.max_new_tokens, run.vocab_size
    device = run.target.device
    stop = torch.empty(0, dtype=torch.int64, device=device) if run.stop is None else run.stop
    # Every beam has len(stop) ends at most among its continuations: so many candidates hold B that go on.
    candidates = min((1 + max(1, stop.shape[0])) * B, B * V)
    first = (torch.arange(N, device=device) * B)[:, None]

    cache = run.make_cache()
    logits = run.prefill(run.target, cache, run.lengths).repeat_interleave(B, 0)
    cache.select(torch.arange(N, device=device).repeat_interleave(B))

    # -inf is the score of what does not exist: all beams but one at first, and texts that are not finished yet.
    scores = torch.full((N, B), -math.inf, device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((N, B, T), pad, device=device)
    best_scores = torch.full((N, B), -math.inf, device=device)
    best_tokens, best_lengths = tokens, torch.zeros(N, B, dtype=torch.int64, device=device)
    improvable = torch.ones(N, 1, dtype=torch.bool, device=device)

    for index in range(T):
        length = index + 1
        total = (scores[:, :, None] + logits.float().log_softmax(-1).view(N, B, V)).flatten(1)
        total, place = total.topk(candidates, dim=1)
        beam, token = place // V, place % V
        text = tokens.gather(1, beam[:, :, None].expand(-1, -1, T)).index_copy(
            2, torch.tensor([index], device=device), token[:, :, None]
        )
        ended = (token[:, :, None] == stop).any(2) if length < T else torch.ones_like(token, dtype=torch.bool)

        # The finished ones: only of the first B, and only where they may still win.
        accepted = ended & improvable & (torch.arange(candidates, device=device) < B)
        if beams.early_stopping:
            accepted &= (best_scores == -math.inf).any(1, keepdim=True)
        finished = (total / length**beams.length_penalty).masked_fill(~accepted, -math.inf)
        best_scores, kept = torch.cat([best_scores, finished], 1).topk(B, dim=1)
        best_tokens = torch.cat([best_tokens, text], 1).gather(1, kept[:, :, None].expand(-1, -1, T))
        best_lengths = torch.cat([best_lengths, torch.full_like(token, length)], 1).gather(1, kept)

        # The beams that go on.
        scores, kept = total.masked_fill(ended, -math.inf).topk(B, dim=1)
        tokens = text.gather(1, kept[:, :, None].expand(-1, -1, T))
        worst = best_scores[:, -1:]
        improvable = improvable & (scores[:, :1] / length**beams.length_penalty > worst)
        open_ = improvable.any() & (scores[:, :1] > -math.inf).any()
        if beams.early_stopping:
            open_ &= (worst == -math.inf).any()
        if length == T or not open_:
            break
        cache.select((beam.gather(1, kept) + first).flatten())
        cache.reserve(1)
        logits = run.step(tokens[:, :, index].reshape(-1, 1), cache=cache)[:, -1]

    lengths = best_lengths[:, 0]
    return Generated(best_tokens[:, 0, : int(lengths.max())], lengths, best_scores[:, 0])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, what was before after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_prompt(
    prompt: Tensor | Sequence[Tensor], lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Tokens (N, L) and, where prompts differ in length, lengths (N,)."""
    if not isinstance(prompt, Tensor):
        if lengths is not None:
            raise ValueError("lengths: expected None with a sequence of prompts, got a value")
        if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(p, Tensor) for p in prompt):
            got = type(prompt).__name__
            if isinstance(prompt, Sequence) and prompt:
                got += f" of {type(prompt[0]).__name__}"
            raise TypeError(f"prompt: expected a Tensor (N, L) or a sequence of at least one Tensor (L,), got {got}")
        if any(p.ndim != 1 for p in prompt):
            raise ValueError(f"prompt: expected tensors (L,), got shapes {[tuple(p.shape) for p in prompt]}")
        sizes = [p.shape[0] for p in prompt]
        lengths = torch.tensor(sizes, device=device) if len(set(sizes)) > 1 else None
        _check_dtypes("prompt", *prompt)
        if min(sizes) == 0:
            raise ValueError(f"prompt: expected at least one token in each, got lengths {sizes}")
        return pad_sequence(list(prompt), batch_first=True).to(device), lengths
    _check_dtypes("prompt", prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt.shape: expected (N, L), both positive, got {tuple(prompt.shape)}")
    if prompt.device != device:
        raise ValueError(f"prompt.device: expected the model's, {device}, got {prompt.device}")
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected a Tensor or None, got {type(lengths).__name__}")
        _check_dtypes("lengths", lengths)
        if lengths.shape != prompt.shape[:1]:
            raise ValueError(f"lengths.shape: expected {tuple(prompt.shape[:1])}, got {tuple(lengths.shape)}")
        if lengths.device != device:
            raise ValueError(f"lengths.device: expected the model's, {device}, got {lengths.device}")
        if device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= prompt.shape[1])).all()):
            raise ValueError(f"lengths: expected 1 to {prompt.shape[1]}, got {lengths.tolist()}")
    return prompt, lengths


def _check_start(start: int | Tensor | None, source: Tensor) -> Tensor:
    """The first target tokens (N, length)."""
    if isinstance(start, int) and not isinstance(start, bool):
        return torch.full_like(source[:, :1], start)
    if not isinstance(start, Tensor):
        raise TypeError(
            f"start: expected the target's first token, an int or a Tensor (N, length), for an EncoderDecoder, "
            f"got {type(start).__name__}"
        )
    _check_dtypes("start", start)
    if start.ndim != 2 or start.shape[0] != source.shape[0] or start.shape[1] == 0:
        raise ValueError(f"start.shape: expected ({source.shape[0]}, length), got {tuple(start.shape)}")
    if start.device != source.device:
        raise ValueError(f"start.device: expected prompt.device == {source.device}, got {start.device}")
    return start


def _check_stop(stop: int | Iterable[int] | None, vocab_size: int, device: torch.device) -> Tensor | None:
    if stop is None:
        return None
    tokens = [stop] if isinstance(stop, int) else list(stop)
    for token in tokens:
        check.integer("stop", token, 0)
        if token >= vocab_size:
            raise ValueError(f"stop: expected tokens below {vocab_size}, got {token}")
    return torch.tensor(tokens, device=device) if tokens else None


def _check_dtypes(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}.dtype: expected int32 or int64, got {tensor.dtype}")
