"""Generation: against the full model at every step, against transformers, and against searches by brute force."""

import copy
import math

import pytest
import torch

import fastattn
from fastattn import BeamSearch, Sampling, generate, stream
from fastattn.nn import (
    ALiBi,
    DynamicCache,
    KVCache,
    Learned,
)
from fastattn.testing import assert_parity
from tests.support.generation import KINDS, NEW, RAGGED, VOCAB, encoder_decoder, greedy, language_model

# Greedy search


POSITIONS = {"RoPE": {}, "learned": {"position": Learned(64)}, "ALiBi": {"position": ALiBi()}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", POSITIONS)
def test_greedy_is_the_argmax_of_the_whole_model(kind, position, prompt):
    model = language_model(window=(3, 0), **POSITIONS[position])
    result = generate(model, prompt, NEW, cache=KINDS[kind])
    assert torch.equal(result.tokens, greedy(model, prompt))
    assert result.lengths.tolist() == [NEW] * 3 and result.tokens.dtype == torch.int64


@pytest.mark.parametrize("kind", ["KVCache", "DynamicCache", "PagedCache"])
def test_greedy_of_an_encoder_decoder(kind, prompt):
    model = encoder_decoder()
    result = generate(model, prompt, NEW, start=1, cache=KINDS[kind])
    assert torch.equal(result.tokens, greedy(model, prompt, start=1))
    started = torch.cat([torch.ones_like(prompt[:, :1]), result.tokens[:, :2]], 1)
    rest = generate(model, prompt, NEW - 2, start=started, cache=KINDS[kind])
    assert torch.equal(rest.tokens, result.tokens[:, 2:])


def test_scores_are_log_probabilities(model, prompt):
    result = generate(model, prompt, NEW, sampling=Sampling(temperature=3.0, top_k=5, seed=1), stop=[1, 2, 3])
    for row in range(3):
        text = torch.cat([prompt[row], result.tokens[row, : result.lengths[row]]])[None]
        exact, eager = (
            m(text[:, :-1]).log_softmax(-1)[0, prompt.shape[1] - 1 :].gather(1, text[0, prompt.shape[1] :, None]).sum()
            for m in (copy.deepcopy(model).double(), model)
        )
        assert_parity(result.scores[row], exact, eager, intermediate=exact)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_length_are_as_each_alone(kind):
    model = language_model(window=(3, 0))
    prompts = [torch.randint(VOCAB, (length,)) for length in RAGGED]
    alone = [generate(model, p[None], NEW, cache=KINDS[kind]).tokens for p in prompts]
    together = generate(model, prompts, NEW, cache=KINDS[kind])
    assert torch.equal(together.tokens, torch.cat(alone))
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7)
    given = generate(model, padded, NEW, lengths=torch.tensor(RAGGED), cache=KINDS[kind])
    assert torch.equal(given.tokens, together.tokens)


def test_sources_of_different_length_are_as_each_alone():
    model = encoder_decoder()
    sources = [torch.randint(VOCAB, (length,)) for length in RAGGED]
    for options in ({}, {"beams": BeamSearch(3)}):
        alone = [generate(model, s[None], NEW, start=1, **options).tokens for s in sources]
        assert torch.equal(generate(model, sources, NEW, start=1, **options).tokens, torch.cat(alone))


def test_prompts_of_equal_length_in_a_list(model, prompt):
    assert torch.equal(generate(model, list(prompt), NEW).tokens, generate(model, prompt, NEW).tokens)


# Stop tokens


def cut(tokens, stop):
    """Each row up to and with its first stop token."""
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        rows.append(row[:end])
    return rows


@pytest.mark.parametrize("kind", ["KVCache", "PagedCache"])
def test_rows_end_at_stop_tokens(kind, model, prompt):
    full = generate(model, prompt, NEW).tokens
    stop = [int(full[0, 2]), int(full[1, 5])]
    expected = cut(full, stop)
    assert len({len(row) for row in expected}) > 1
    result = generate(model, prompt, NEW, stop=stop, pad=-100, cache=KINDS[kind])
    assert result.tolist() == expected and result.lengths.tolist() == [len(row) for row in expected]
    assert result.tokens.shape[1] == max(len(row) for row in expected)
    assert all((row[n:] == -100).all() for row, n in zip(result.tokens, result.lengths, strict=True))


def test_one_stop_token_and_no_work_after_the_last_row_has_ended(model, prompt):
    full = generate(model, prompt[:1], NEW).tokens
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    result = generate(model, prompt[:1], NEW, stop=int(full[0, 3]))
    assert result.tolist() == cut(full, [int(full[0, 3])])
    assert len(calls) == result.lengths[0]  # the prompt is one call, the last token is not read


# Stream


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=2.0, top_p=0.9, seed=1)])
def test_stream_is_generate_step_by_step(sampling, model, prompt):
    full = generate(model, prompt, NEW, sampling=sampling)
    stop = int(full.tokens[0, 3])
    expected = generate(model, prompt, NEW, sampling=sampling, stop=stop, pad=-1)
    streamed = list(stream(model, prompt, NEW, sampling=sampling, stop=stop, pad=-1))
    assert torch.equal(torch.stack(streamed, 1), expected.tokens)
    sources = stream(encoder_decoder(), prompt, 3, start=1)
    assert [tuple(token.shape) for token in sources] == [(3,)] * 3


def test_stream_computes_a_token_when_it_is_asked_for(model, prompt):
    model.train()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    tokens = stream(model, prompt, NEW)
    next(tokens), next(tokens), next(tokens)
    assert calls == [False] * 3 and all(module.training for module in model.modules())


def test_stream_checks_its_arguments_at_once(model, prompt):
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        stream(model, prompt, 0)


# State


def test_training_flags_are_restored_and_dropout_is_off(prompt):
    model = language_model(dropout=0.5)
    expected = generate(model, prompt, NEW).tokens
    model.train()
    model.decoder.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    assert torch.equal(generate(model, prompt, NEW).tokens, expected)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(ValueError, match=f"tokens: expected tokens from 0 to {VOCAB - 1}, got"):
        generate(model, prompt + VOCAB, NEW)
    assert [module.training for module in model.modules()] == flags


def test_no_graph_is_kept(model, prompt):
    for options in ({}, {"sampling": Sampling()}, {"beams": BeamSearch(2)}):
        result = generate(model, prompt, NEW, **options)
        assert not any(x.requires_grad or x.is_inference() for x in (result.tokens, result.lengths, result.scores))
    grad_enabled = []
    model.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    for _ in stream(model, prompt, 3):
        assert torch.is_grad_enabled()
    assert grad_enabled == [False] * 3


def test_the_cache_has_exactly_the_room_needed(model, prompt, monkeypatch):
    made = []
    monkeypatch.setattr(
        KVCache, "__init__", lambda self, *a, _init=KVCache.__init__, **k: (_init(self, *a, **k), made.append(self))[0]
    )
    generate(model, prompt, NEW)
    assert [cache.capacity for cache in made] == [prompt.shape[1] + NEW - 1] and made[0].length == made[0].capacity


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_in_one_cache(kind):
    """Rows of different length, which end at different steps, go on as if all had been one prompt."""
    model = language_model(window=(3, 0))
    turns = [[torch.randint(VOCAB, (length,)) for length in lengths] for lengths in (RAGGED, (2, 5, 1))]
    cache = model.make_cache(3, 64, KINDS[kind])
    stop = list(range(6))
    first = generate(model, turns[0], NEW, stop=stop, cache=cache)
    assert len(set(first.lengths.tolist())) > 1
    assert cache.lens.tolist() == [a + b - 1 for a, b in zip(RAGGED, first.lengths.tolist(), strict=True)]
    last = [torch.tensor([row[-1], *turn.tolist()]) for row, turn in zip(first.tolist(), turns[1], strict=True)]
    second = generate(model, last, NEW, cache=cache)
    for row, text in enumerate(first.tolist()):
        whole = torch.cat([turns[0][row], torch.tensor(text), turns[1][row]])[None]
        assert second.tolist()[row] == greedy(model, whole)[0].tolist()


def test_compiled_steps_do_not_recompile(prompt):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = language_model()
    expected = generate(model, prompt, NEW).tokens
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for new in (NEW - 3, NEW - 2):  # with sizes as constants, then as variables
        assert torch.equal(generate(compiled, prompt, new).tokens, expected[:, :new])
    before = len(graphs)
    assert 0 < before <= 3
    assert torch.equal(generate(compiled, prompt, NEW).tokens, expected)
    assert len(graphs) == before
    seq2seq = encoder_decoder()
    expected = generate(seq2seq, prompt, NEW, start=1).tokens
    seq2seq.decoder.compile(backend=backend)
    assert torch.equal(generate(seq2seq, prompt, NEW, start=1).tokens, expected)
    assert len(graphs) > before
    torch._dynamo.reset()


# What is refused


MODEL, SEQ2SEQ = "language model", "encoder-decoder"
BAD = [
    (MODEL, {"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a CausalLM or an EncoderDecoder, got Linear"),
    (MODEL, {"prompt": torch.zeros(2, 1, 3, dtype=torch.int64)}, ValueError, "prompt.shape: expected (N, L), both pos"),
    (MODEL, {"prompt": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "got (2, 0)"),
    (MODEL, {"prompt": torch.zeros(2, 5)}, TypeError, "prompt.dtype: expected int32 or int64, got torch.float32"),
    (MODEL, {"prompt": []}, TypeError, "sequence of at least one Tensor"),
    (MODEL, {"prompt": [[1, 2.0]]}, TypeError, "prompt: expected a Tensor (N, L), or a sequence"),
    (MODEL, {"prompt": "text"}, TypeError, "list of integers, got str"),
    (MODEL, {"beams": BeamSearch(2, length_penalty=500.0)}, ValueError, "length_penalty: expected at most 49.8"),
    (MODEL, {"do_sample": True}, TypeError, "'do_sample'; here it is sampling=Sampling()"),
    (MODEL, {"temperature": 0.7}, TypeError, "'temperature'; here it is sampling=Sampling(temperature=...)"),
    (MODEL, {"eos_token_id": 1}, TypeError, "'eos_token_id'; here it is stop"),
    (MODEL, {"num_beams": 4}, TypeError, "'num_beams'; here it is beams=BeamSearch(num_beams=...)"),
    (MODEL, {"nonsense": 4}, TypeError, "generate() got an unexpected keyword argument 'nonsense'"),
    (MODEL, {"prompt": [torch.zeros(1, 2, dtype=torch.int64)]}, ValueError, "expected tensors (L,), got shapes"),
    (MODEL, {"prompt": [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]}, ValueError, "got lengths [1, 0]"),
    (MODEL, {"prompt": [torch.tensor([1.0])]}, TypeError, "prompt.dtype"),
    (MODEL, {"prompt": [torch.tensor([1])], "lengths": torch.tensor([1])}, ValueError, "lengths: expected None with"),
    (MODEL, {"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1, got 0"),
    (MODEL, {"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int, got float"),
    (MODEL, {"lengths": [5, 5, 5]}, TypeError, "lengths: expected a Tensor or None, got list"),
    (MODEL, {"lengths": torch.tensor([5, 5])}, ValueError, "lengths.shape: expected (3,), got (2,)"),
    (MODEL, {"lengths": torch.tensor([5.0, 5, 5])}, TypeError, "lengths.dtype: expected int32 or int64"),
    (MODEL, {"lengths": torch.tensor([5, 0, 5])}, ValueError, "lengths: expected 1 to 5, got [5, 0, 5]"),
    (MODEL, {"start": 1}, ValueError, "start: expected None for a CausalLM"),
    (MODEL, {"stop": VOCAB}, ValueError, f"stop: expected tokens below {VOCAB}, got {VOCAB}"),
    (MODEL, {"stop": [-1]}, ValueError, "stop: expected at least 0, got -1"),
    (MODEL, {"stop": ["."]}, TypeError, "stop: expected an int, got str"),
    (MODEL, {"sampling": 0.7}, TypeError, "sampling: expected Sampling or None, got float"),
    (MODEL, {"beams": 4}, TypeError, "beams: expected BeamSearch or None, got int"),
    (MODEL, {"sampling": Sampling(), "beams": BeamSearch(2)}, ValueError, "beams: expected None with sampling"),
    (MODEL, {"cache": "paged"}, TypeError, "cache: expected a cache or a kind of cache, got str"),
    (SEQ2SEQ, {}, TypeError, "start: expected the target's first token"),
    (SEQ2SEQ, {"start": True}, TypeError, "got bool"),
    (SEQ2SEQ, {"start": torch.tensor([1, 1, 1])}, ValueError, "start.shape: expected (3, length), got (3,)"),
    (SEQ2SEQ, {"start": torch.tensor([[1.0]] * 3)}, TypeError, "start.dtype: expected int32 or int64"),
]


@pytest.mark.parametrize(("kind", "changes", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(kind, changes, error, message, prompt):
    arguments = {"model": language_model() if kind == MODEL else encoder_decoder(), "prompt": prompt}
    arguments |= {"max_new_tokens": 4} | changes
    with pytest.raises(error) as caught:
        generate(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -0.1}, ValueError), ({"temperature": math.inf}, ValueError), ({"temperature": "1"}, TypeError),
        ({"top_k": 0}, ValueError), ({"top_k": 1.5}, TypeError), ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.1}, ValueError), ({"min_p": -0.1}, ValueError), ({"min_p": True}, TypeError),
        ({"repetition_penalty": 0.0}, ValueError), ({"repetition_penalty": math.nan}, ValueError),
        ({"seed": -1}, ValueError), ({"seed": 1.0}, TypeError),
    ],
)  # fmt: skip
def test_bad_sampling(options, error):
    with pytest.raises(error, match=f"{next(iter(options))}: expected"):
        Sampling(**options)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0,), ValueError), ((2.0,), TypeError), ((2, math.inf), ValueError), ((2, 1.0, "never"), TypeError)],
)
def test_bad_beam_search(arguments, error):
    with pytest.raises(error, match="expected"):
        BeamSearch(*arguments)


def test_caches_that_do_not_fit(model, prompt):
    with pytest.raises(ValueError, match=r"cache.batch: expected prompt.shape\[0\] == 3, got 2"):
        generate(model, prompt, 4, cache=model.make_cache(2, 16))
    with pytest.raises(ValueError, match="cache: expected room for 8 more tokens, got 0 of 7 places in use"):
        generate(model, prompt, 4, cache=model.make_cache(3, 7))
    assert generate(model, prompt, 4, cache=model.make_cache(3, 7, DynamicCache)).tokens.shape == (3, 4)
    with pytest.raises(ValueError, match="cache: expected a kind of cache for beam search"):
        generate(model, prompt, 4, beams=BeamSearch(2), cache=model.make_cache(3, 16))
    seq2seq = encoder_decoder()
    cache = seq2seq.make_cache(3, 16, memory=seq2seq.encode(prompt))
    with pytest.raises(TypeError, match="cache: expected a kind of cache for an EncoderDecoder, got a KVCache"):
        generate(seq2seq, prompt, 4, start=1, cache=cache)
    with pytest.raises(TypeError, match=r"after model.decoder.compile\(\), got torch.compile of it"):
        generate(torch.compile(seq2seq), prompt, 4, start=1)


def test_positions_that_the_model_does_not_have(prompt):
    model = language_model(position=Learned(8))
    assert generate(model, prompt, 4).tokens.shape == (3, 4)
    with pytest.raises(ValueError, match="max_new_tokens: expected at most 4, since the model has 8 positions, got 5"):
        generate(model, prompt, 5)


def test_public_names():
    assert {"generate", "stream", "Sampling", "BeamSearch", "Generated"} <= set(fastattn.__all__)
