"""Prompts in any form, logits without a next token, models that are wrapped, and where caches are made."""

import functools

import pytest
import torch
from torch import nn

import fastattn
import fastattn.testing
from fastattn import BeamSearch, Sampling, generate, stream
from fastattn.nn import (
    CausalLM,
    CausalLMConfig,
    DynamicCache,
    EncoderDecoder,
    EncoderDecoderConfig,
    KVCache,
    PagedCache,
    SlidingWindowCache,
    TransformerConfig,
)
from tests.support.generation import SIZES, VOCAB

NEW = 6
KINDS = [KVCache, DynamicCache, PagedCache, functools.partial(SlidingWindowCache, window=5, chunk=4)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(**SIZES, vocab_size=VOCAB)).eval()


@pytest.fixture
def seq2seq():
    torch.manual_seed(0)
    stack = TransformerConfig(**SIZES)
    return EncoderDecoder(EncoderDecoderConfig(encoder=stack, decoder=stack, source_vocab_size=VOCAB)).eval()


@pytest.fixture
def prompt():
    return torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))


# Prompts


def test_prompts_as_lists_and_as_one_row(model, prompt):
    expected = generate(model, prompt, NEW).tokens
    assert torch.equal(generate(model, prompt.tolist(), NEW).tokens, expected)
    assert torch.equal(generate(model, prompt[0], NEW).tokens, expected[:1])
    assert torch.equal(generate(model, prompt[0].tolist(), NEW).tokens, expected[:1])
    ragged = [row[:n] for row, n in zip(prompt, (5, 2, 3), strict=True)]
    expected = generate(model, ragged, NEW).tokens
    assert torch.equal(generate(model, [row.tolist() for row in ragged], NEW).tokens, expected)


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_tokens_beyond_the_vocabulary_are_named(token, model, seq2seq, prompt):
    prompt[1, 2] = token
    message = f"expected tokens from 0 to {VOCAB - 1}, got {token}"
    with pytest.raises(ValueError, match=f"tokens: {message}"):
        model(prompt)
    with pytest.raises(ValueError, match=f"tokens: {message}"):
        generate(model, prompt, NEW)
    with pytest.raises(ValueError, match=f"source: {message}"):
        generate(seq2seq, prompt, NEW, start=1)
    with pytest.raises(ValueError, match=f"target: {message}"):
        seq2seq(prompt.clamp(0, 5), prompt)


# Logits that have no next token


SEARCHES = {"greedy": {}, "sampling": {"sampling": Sampling(seed=0)}, "beams": {"beams": BeamSearch(2)}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2], ids=["prompt", "later"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_row_without_a_next_token_is_named(name, step, value, model, prompt):
    calls = []

    def spoil(module, args, logits):
        calls.append(1)
        if len(calls) == step + 1:
            logits[logits.shape[0] // 3, :, 4] = value  # of beams the first of row 1
        return logits

    model.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="model: expected finite logits, got NaN or infinity in row 1"):
        generate(model, prompt, NEW, **SEARCHES[name])


def test_a_row_that_has_ended_may_hold_anything(model, prompt):
    first = int(generate(model, prompt, 1).tokens[0, 0])
    expected = generate(model, prompt, NEW, stop=first)
    assert expected.lengths[0] == 1 and expected.lengths.max() > 1

    def spoil(module, args, logits):
        if logits.shape[1] == 1 and args[0].shape[1] == 1:
            logits[0] = float("nan")
        return logits

    model.register_forward_hook(spoil)
    assert torch.equal(generate(model, prompt, NEW, stop=first).tokens, expected.tokens)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 1e-8])
def test_a_tiny_temperature_is_the_argmax(temperature, model, prompt):
    expected = generate(model, prompt, NEW).tokens
    assert torch.equal(generate(model, prompt, NEW, sampling=Sampling(temperature=temperature)).tokens, expected)
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.1}
    sampling = Sampling(temperature=temperature, **options)
    assert torch.equal(generate(model, prompt, NEW, sampling=sampling).tokens, expected)


def test_the_smallest_repetition_penalty(model, prompt):
    result = generate(model, prompt, NEW, sampling=Sampling(repetition_penalty=1e-42))
    assert (result.tokens < VOCAB).all()


@pytest.mark.parametrize("penalty", [49.0, -49.0])
def test_length_penalties_as_far_as_scores_have_a_place(penalty, model, prompt):
    result = generate(model, prompt, 4, beams=BeamSearch(2, length_penalty=penalty), stop=3)
    assert result.scores.isfinite().all() and (result.scores != 0).all()


# The module is called


def test_hooks_see_every_call(model, seq2seq, prompt):
    for m, options in ((model, {}), (seq2seq, {"start": 1})):
        lengths = []
        position = 0 if m is model else 1
        m.register_forward_pre_hook(lambda _, args, lengths=lengths, at=position: lengths.append(args[at].shape[1]))
        generate(m, prompt, 4, **options)
        assert lengths == [5 if m is model else 1, 1, 1, 1]


def test_weights_that_are_elsewhere_until_a_layer_is_called(model, prompt):
    """As accelerate offloads: parameters are on the meta device but for the time of a call."""
    expected = generate(model, prompt, NEW).tokens
    for module in model.modules():
        held = dict(module.named_parameters(recurse=False))
        if not held:
            continue

        def fetch(module, args, held=held):
            for name, value in held.items():
                setattr(module, name, value)

        def drop(module, args, result, held=held):
            for name, value in held.items():
                setattr(module, name, nn.Parameter(value.to("meta")))

        drop(module, None, None)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(generate(model, prompt, NEW).tokens, expected)


# Where and of what dtype caches are


def made(model, kind=KVCache, **options):
    return model.make_cache(2, 16, kind, **options)


def windowed():
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(**SIZES, vocab_size=VOCAB, window=(5, None))).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_takes_the_dtype_of_the_keys(kind, prompt):
    model = windowed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = made(model, kind)
        for chunk in prompt[:2].split(2, dim=1):
            model(chunk, cache=cache)
    assert {x.dtype for x in cache.k + cache.v} == {torch.bfloat16}


def test_a_cache_takes_the_dtype_that_wrapped_layers_compute_in(model, prompt):
    class Wrapped(nn.Module):
        """As a quantised layer: parameters of one dtype, results of another."""

        def __init__(self, inner):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float16))
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * self.scale.float()

    expected = generate(model, prompt, NEW).tokens
    for block in model.decoder.blocks:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(block.self_attn, name, Wrapped(getattr(block.self_attn, name)))
    assert torch.equal(generate(model, prompt, NEW).tokens, expected)
    model.decoder.dropout = Wrapped(nn.Identity())  # first among the parameters
    assert torch.equal(generate(model, prompt, NEW).tokens, expected)


def test_a_partial_keeps_its_dtype(model, prompt):
    kind = functools.partial(KVCache, dtype=torch.float64)
    assert made(model, kind).k[0].dtype == torch.float64
    assert made(model, functools.partial(kind, device="cpu")).k[0].dtype == torch.float64
    assert made(model, kind, dtype=torch.float32).k[0].dtype == torch.float32
    with pytest.raises((TypeError, ValueError), match="dtype"):  # it is not overridden: keys are float32
        generate(model, prompt, NEW, cache=kind)
    encoder = fastattn.nn.TransformerEncoder(fastattn.nn.TransformerEncoderLayer(8, 2, 8), 1)
    assert encoder.make_cache(2, 4, kind).k[0].dtype == torch.float64


class Subclass(SlidingWindowCache):
    pass


@pytest.mark.parametrize(
    "kind",
    [Subclass, functools.partial(SlidingWindowCache, chunk=3), functools.partial(functools.partial(Subclass), chunk=2)],
)
def test_partials_and_subclasses_take_the_window_of_the_model(kind, prompt):
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(**SIZES, vocab_size=VOCAB, window=(4, 0))).eval()
    assert made(model, kind).window == 4
    assert torch.equal(generate(model, prompt, NEW, cache=kind).tokens, generate(model, prompt, NEW).tokens)
    with pytest.raises(ValueError, match="window: expected one, since the model has none"):
        made(CausalLM(CausalLMConfig(**SIZES, vocab_size=VOCAB)), kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_made_in_inference_mode_works_outside(kind, prompt):
    model, rows = windowed(), torch.tensor([1, 0, 0])
    with torch.inference_mode():
        cache = made(model, kind)
        model(prompt[:2, :2], cache=cache)
        cache.select(rows)
        cache.reserve(3)
    with torch.enable_grad():
        out = model(prompt[rows][:, 2:], cache=cache)
    whole = model(prompt[rows])[:, 2:]
    fastattn.testing.assert_parity(out, model.double()(prompt[rows])[:, 2:], whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_memory_made_in_inference_mode_works_outside(kind, seq2seq, prompt):
    with torch.inference_mode():
        memory = seq2seq.encode(prompt)
        cache = seq2seq.make_cache(3, 16, kind, memory=memory, memory_lengths=torch.tensor([5, 5, 5]))
        cache.reserve(5)
    with torch.enable_grad():
        out = torch.cat([seq2seq(None, prompt[:, i : i + 1], cache=cache) for i in range(5)], 1)
    whole = seq2seq(prompt, prompt)
    fastattn.testing.assert_parity(out, seq2seq.double()(prompt, prompt), whole)


@pytest.mark.parametrize("kind", [KVCache, PagedCache])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_default_device_does_not_matter(name, kind, model, prompt):
    expected = generate(model, prompt, NEW, cache=kind, **SEARCHES[name]).tokens
    with torch.device("meta"):
        assert torch.equal(generate(model, prompt, NEW, cache=kind, **SEARCHES[name]).tokens, expected)
        assert torch.equal(generate(model, prompt.tolist(), NEW, cache=kind, **SEARCHES[name]).tokens, expected)
        streamed = list(stream(model, prompt, NEW, cache=kind, sampling=SEARCHES[name].get("sampling")))
    if name != "beams":
        assert torch.equal(torch.stack(streamed, 1), expected)
