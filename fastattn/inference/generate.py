"""Text from a model: `generate` and `stream` check a call, then search token by token over a KV cache.

Dimensions in comments: N prompts, L prompt length, T new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastattn import _check as check
from fastattn.inference.beam import BeamSearch, beam_search
from fastattn.inference.decoding import Decoding, Generated, NonFinite
from fastattn.inference.graphs import DecodeSteps, reason_against
from fastattn.inference.sampling import Sampling, TokenPicker
from fastattn.nn import CausalLM, DynamicCache, EncoderDecoder, KVCache

__all__ = ["generate", "stream"]

Prompt = Tensor | Sequence[Tensor] | Sequence[int] | Sequence[Sequence[int]]

_keywords = check.keywords(
    **{name: f"sampling=Sampling({name}=...)" for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")},
    **{name: f"beams=BeamSearch({name}=...)" for name in ("num_beams", "length_penalty", "early_stopping")},
    attention_mask="lengths: prompts are padded at the end",
    decoder_start_token_id="start",
    do_sample="sampling=Sampling(), or None for greedy search",
    eos_token_id="stop",
    input_ids="prompt",
    inputs="prompt",
    max_length="max_new_tokens, without the prompt",
    max_tokens="max_new_tokens",
    num_return_sequences="prompt.repeat_interleave(n, 0)",
    pad_token_id="pad",
    past_key_values="cache",
    stop_token_ids="stop",
    streamer="fastattn.stream",
    temperature="sampling=Sampling(temperature=...)",
    use_cache="cache, a kind of cache or one that exists",
)


@_keywords
@torch.no_grad()
def generate(
    model: CausalLM | EncoderDecoder,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    start: int | Tensor | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int = 0,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    cache: KVCache | Callable[..., KVCache] = KVCache,
    cuda_graph: bool = True,
    batch_invariant: bool | Literal["rows"] = False,
) -> Generated:
    """Continue each prompt, or answer each source with an encoder-decoder.

    The model runs in evaluation mode without gradients; its own mode returns afterwards. With `stop` the host waits for
    the device once per step, to see whether all rows have ended; without `stop` it never waits.

    Args:
        model: a `CausalLM`; an `EncoderDecoder`, for which `prompt` is the source; or `torch.compile` of a `CausalLM`,
            which compiles the steps but not the pass over the prompt. For an EncoderDecoder call
            `model.decoder.compile()`.
        prompt: (N, L) integer, with padding at the end only; or a sequence of N prompts of any lengths, each a list of
            integers or a tensor (L,); or one such prompt alone, which makes N = 1.
        max_new_tokens: at most so many per row.
        lengths: integer (N,), tokens of each prompt before its padding, at least 1. None: all.
        start: what every target begins with, for an encoder-decoder alone: one token, or (N, length).
        stop: tokens that end a row.
        pad: what `tokens` holds after a row's end.
        sampling: None takes the most probable token at each step; so does `temperature=0`, with a repetition penalty
            if you like. Row b's random numbers depend on the seed, b and `max_new_tokens`, not on the other rows.
        beams: beam search, in place of sampling.
        cache: a kind of cache, made as large as needed: `KVCache`, `DynamicCache`, `PagedCache`, `SlidingWindowCache`,
            a subclass, or `functools.partial` of one with its options. Or a `CausalLM`'s cache, which the prompt
            continues: it then holds all tokens but the last of each row, with which the next prompt should begin.
        cuda_graph: on a GPU, capture one step as a CUDA graph and replay it where that is possible and pays. If not,
            the result's `no_cuda_graph` says why. Beam search never does.
        batch_invariant: attention gives a row the same bits in every batch size, see
            `fastattn.attention_with_kvcache`; a `cache` of yours keeps this. For a `CausalLM`. The linear layers
            between are PyTorch's, which keeps to no such rule. ``"rows"``: a token's attention has the same bits in a
            step as in a prompt, so that with linear layers that keep to the rule the logits of a step are those of a
            pass over the whole text. On a CPU a step is then not planned as one call.

    Returns:
        `Generated`: tokens, their number per row, and scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before the model runs; and where a
            row's logits are NaN or infinite, naming it, on the CPU at once, on a GPU when the search has ended.
    """
    run = _prepare(model, prompt, max_new_tokens, lengths, start, stop, sampling, cache, cuda_graph, batch_invariant)
    if beams is not None:
        check.instance("beams", beams, BeamSearch, type(None))
        if sampling is not None:
            raise ValueError("beams: expected None with sampling, got both")
        if isinstance(cache, KVCache):
            raise ValueError("cache: expected a kind of cache for beam search, got one that exists")
        beams.check_length(max_new_tokens)
        with _evaluating(model):
            return beam_search(run, beams, pad)
    tokens, alive = [], []
    scores = torch.zeros(run.target.shape[0], device=run.target.device)
    with _evaluating(model):
        for token, score, running in _steps(run, sampling):
            scores += score if running is None else score.where(running, 0.0)
            tokens.append(token)
            alive.append(torch.ones_like(token, dtype=torch.bool) if running is None else running)
    kept = torch.stack(alive, 1)
    return Generated(torch.stack(tokens, 1).where(kept, pad), kept.sum(1), scores, run.no_cuda_graph)


@_keywords
def stream(
    model: CausalLM | EncoderDecoder,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    start: int | Tensor | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int = 0,
    sampling: Sampling | None = None,
    cache: KVCache | Callable[..., KVCache] = KVCache,
    cuda_graph: bool = True,
    batch_invariant: bool | Literal["rows"] = False,
) -> Iterator[Tensor]:
    """Yield the tokens of `generate` as they are made: one int64 (N,) per step, `pad` in rows that have ended.

    The arguments are those of `generate` and are checked at once. The model runs when you ask for a token; between
    tokens it is in the mode in which you left it.
    """
    run = _prepare(model, prompt, max_new_tokens, lengths, start, stop, sampling, cache, cuda_graph, batch_invariant)
    return _streamed(model, _steps(run, sampling), pad)


def _streamed(model: nn.Module, steps: Iterator[tuple[Tensor, Tensor, Tensor | None]], pad: int) -> Iterator[Tensor]:
    while True:
        with torch.no_grad(), _evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        token, _, running = step
        yield token if running is None else token.where(running, pad)


def _prepare(
    model: CausalLM | EncoderDecoder,
    prompt: Prompt,
    max_new_tokens: int,
    lengths: Tensor | None,
    start: int | Tensor | None,
    stop: int | Iterable[int] | None,
    sampling: Sampling | None,
    cache: KVCache | Callable[..., KVCache],
    cuda_graph: bool,
    batch_invariant: bool | Literal["rows"],
) -> Decoding:
    origin = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(origin, (CausalLM, EncoderDecoder)):
        raise TypeError(f"model: expected a CausalLM or an EncoderDecoder, got {type(model).__name__}")
    device = _input_device(origin, prompt)
    check.integer("max_new_tokens", max_new_tokens, 1)
    check.instance("cuda_graph", cuda_graph, bool)
    if batch_invariant != "rows":
        check.instance("batch_invariant", batch_invariant, bool)
    if batch_invariant and isinstance(origin, EncoderDecoder):
        raise ValueError(f"batch_invariant: expected False for an EncoderDecoder, got {batch_invariant!r}")
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
        step = functools.partial(model, None)
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
        made = cache
        if not isinstance(made, KVCache):
            memory: dict[str, Any] = {}
            if encode is not None:
                memory = {"memory": encode(prompt, lengths=lengths), "memory_lengths": lengths}
            made = origin.make_cache(prompt.shape[0], needed, made, **memory)
        if made.batch_invariant != "rows":
            made.batch_invariant = batch_invariant or made.batch_invariant
        return made

    no_graph = reason_against(origin, cuda_graph, origin is not model, device, max_new_tokens - 1)
    return Decoding(
        origin.prefill, step, make_cache, target, target_lengths, max_new_tokens, vocab_size, stops, given, no_graph
    )  # fmt: skip


def _input_device(model: CausalLM | EncoderDecoder, prompt: object) -> torch.device:
    """The device for tokens: the embedding's, or the prompt's where the weights are offloaded or sharded."""
    weight = (model.embedding if isinstance(model, CausalLM) else model.target_embedding).weight
    somewhere = weight.is_meta or type(weight.data) is not Tensor
    if somewhere and isinstance(prompt, Tensor):
        return prompt.device
    return torch.device("cpu") if weight.is_meta else weight.device


def _steps(run: Decoding, sampling: Sampling | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Per step the token of each row (N,), its log-probability (N,), and which rows had not ended before it."""
    pick = TokenPicker(run, Sampling(temperature=0.0) if sampling is None else sampling)
    check_finite = NonFinite()
    cache = run.make_cache()
    step = DecodeSteps(run.step, cache, run.no_cuda_graph)
    logits = run.prefill(run.target, cache, run.lengths)
    running = None if run.stop is None else torch.ones_like(run.target[:, 0], dtype=torch.bool)
    for index in range(run.max_new_tokens):
        logits = logits.float()
        total = logits.logsumexp(1)
        bad = ~total.isfinite()
        check_finite(bad if running is None else bad & running)
        token = pick(logits, index)
        yield token, logits.gather(1, token[:, None]).squeeze(1) - total, running
        if running is not None and run.stop is not None:
            running = running & (token[:, None] != run.stop).all(1)
            if not running.any():
                break
        if index + 1 < run.max_new_tokens:
            logits = step(token, running if run.keeps_cache else None)
            run.no_cuda_graph = step.reason
    check_finite.check()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside ``with``, and the earlier mode after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_prompt(prompt: Prompt, lengths: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (N, L) and, where prompts differ in length, lengths (N,)."""
    if isinstance(prompt, Tensor) and prompt.ndim == 1 and lengths is None:
        prompt = prompt[None]
    if not isinstance(prompt, Tensor):
        if lengths is not None:
            raise ValueError("lengths: expected None with a sequence of prompts, got a value")
        rows = _rows(prompt)
        if any(row.ndim != 1 for row in rows):
            raise ValueError(f"prompt: expected tensors (L,), got shapes {[tuple(row.shape) for row in rows]}")
        sizes = [row.shape[0] for row in rows]
        lengths = torch.tensor(sizes, device=device) if len(set(sizes)) > 1 else None
        _check_dtypes("prompt", *rows)
        if min(sizes) == 0:
            raise ValueError(f"prompt: expected at least one token in each, got lengths {sizes}")
        return pad_sequence([row.to(device) for row in rows], batch_first=True), lengths
    _check_dtypes("prompt", prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt.shape: expected (N, L), both positive, got {tuple(prompt.shape)}")
    if prompt.device != device:
        raise ValueError(f"prompt.device: expected the model's, {device}, got {prompt.device}")
    if lengths is not None:
        check.lengths("lengths", lengths, prompt, prompt.shape[1], least=1)
    return prompt, lengths


def _rows(prompt: object) -> list[Tensor]:
    """The prompts of a sequence, each a tensor."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt:
        if all(_is_token(token) for token in prompt):
            prompt = [prompt]
        if all(isinstance(row, Tensor) for row in prompt):
            return list(prompt)
        if all(isinstance(row, Sequence) and all(_is_token(token) for token in row) for row in prompt):
            return [torch.tensor(list(row), dtype=torch.int64, device="cpu") for row in prompt]
    got = type(prompt).__name__
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt:
        got += f" of {type(prompt[0]).__name__}"
    raise TypeError(
        f"prompt: expected a Tensor (N, L), or a sequence of at least one Tensor (L,) or list of integers, got {got}"
    )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
