"""Generation: against the full model at every step, against transformers, and against searches by brute force."""

import dataclasses
import functools
import itertools
import math
import os

import pytest
import torch

import fastattn
from fastattn import BeamSearch, Sampling, generate, stream
from fastattn.inference.sampling import draw, penalise, truncate
from fastattn.nn import (
    ALiBi,
    CausalLM,
    CausalLMConfig,
    DynamicCache,
    EncoderDecoder,
    EncoderDecoderConfig,
    KVCache,
    Learned,
    PagedCache,
    SlidingWindowCache,
    TransformerConfig,
)

VOCAB, NEW = 29, 12
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "dim_feedforward": 48, "init_std": 0.3}
KINDS = {
    "KVCache": KVCache,
    "DynamicCache": DynamicCache,
    "PagedCache": PagedCache,
    "SlidingWindowCache": SlidingWindowCache,
    "small chunks": functools.partial(SlidingWindowCache, window=3, chunk=2),
}


def language_model(**options):
    """Weights large enough that logits differ by more than rounding, and that texts do not repeat one token."""
    return CausalLM(CausalLMConfig(**SIZES | {"vocab_size": VOCAB} | options)).eval()


def encoder_decoder(**options):
    stack = TransformerConfig(**SIZES, **options)
    return EncoderDecoder(EncoderDecoderConfig(encoder=stack, decoder=stack, source_vocab_size=VOCAB)).eval()


@pytest.fixture
def model():
    return language_model()


@pytest.fixture
def prompt():
    return torch.randint(VOCAB, (3, 5))


def logits_of(model, prompt, tokens, start=None):
    """What the whole model, without a cache, says after `tokens` (N, T)."""
    if isinstance(model, CausalLM):
        return model(torch.cat([prompt, tokens], 1))[:, -1]
    start = torch.full_like(prompt[:, :1], start)
    return model(prompt, torch.cat([start, tokens], 1))[:, -1]


@torch.no_grad()
def greedy(model, prompt, new=NEW, start=None):
    tokens = prompt[:, :0]
    for _ in range(new):
        tokens = torch.cat([tokens, logits_of(model, prompt, tokens, start).argmax(1, keepdim=True)], 1)
    return tokens


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
        p = model(text[:, :-1]).log_softmax(-1)[0, prompt.shape[1] - 1 :]
        expected = p.gather(1, text[0, prompt.shape[1] :, None]).sum()
        torch.testing.assert_close(result.scores[row], expected)


# Prompts


RAGGED = (4, 1, 6)


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


# Sampling: what is left of the distribution


TRUNCATIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_k beyond the vocabulary": {"top_k": VOCAB + 5},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of the best alone": {"min_p": 1.0},
    "all": {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
}


def exact_distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """By the definitions, one row, in Python's floats."""
    weights = {token: math.exp(x / temperature) for token, x in enumerate(logits.tolist())}

    def normalised(weights):
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}

    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    if top_k is not None:
        weights = {token: weights[token] for token in ranked[:top_k]}
    p = normalised(weights)
    if top_p is not None:
        kept, mass = [], 0.0
        for token in sorted(p, key=p.__getitem__, reverse=True):
            if mass >= top_p:
                break
            kept.append(token)
            mass += p[token]
        p = normalised({token: p[token] for token in kept})
    if min_p is not None:
        p = normalised({token: x for token, x in p.items() if x >= min_p * max(p.values())})
    return torch.tensor([p.get(token, 0.0) for token in range(len(logits))], dtype=torch.float64)


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_by_definition(name):
    for logits in 2.0 * torch.randn(20, VOCAB):
        expected = exact_distribution(logits, **TRUNCATIONS[name])
        p = truncate(logits[None], Sampling(**TRUNCATIONS[name])).softmax(1)[0]
        assert torch.equal(p > 0, expected > 0)
        torch.testing.assert_close(p, expected.float())


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_samples_have_the_exact_distribution(name):
    """Chi-square of 20,000 samples of one prompt, within 5 standard deviations of its mean."""
    model, samples = language_model(), 20_000
    prompt = torch.randint(VOCAB, (1, 5))
    p = exact_distribution(logits_of(model, prompt, prompt[:, :0])[0], **TRUNCATIONS[name])
    tokens = generate(model, prompt.expand(samples, -1), 1, sampling=Sampling(seed=3, **TRUNCATIONS[name])).tokens
    counts = tokens.flatten().bincount(minlength=VOCAB).double()
    assert (counts[p == 0] == 0).all()
    rare = (p > 0) & (p * samples < 5)  # chi-square needs about this many: rare tokens count as one
    observed = torch.cat([counts[(p > 0) & ~rare], counts[rare].sum()[None]])
    expected = samples * torch.cat([p[(p > 0) & ~rare], p[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


def test_a_draw_passes_over_tokens_of_probability_zero():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.75, 1.0], dtype=torch.float64)
    assert draw(p, uniform).tolist() == [1, 1, 3, 3, 3]


def test_temperature_zero_is_greedy(model, prompt):
    assert torch.equal(
        generate(model, prompt, NEW, sampling=Sampling(temperature=0.0, seed=4)).tokens,
        generate(model, prompt, NEW).tokens,
    )


def test_repetition_penalty_of_greedy_search():
    model, penalty = language_model(), 1.7
    prompts = [torch.randint(VOCAB, (length,)) for length in RAGGED]  # padding, of token 0, is not in them
    result = generate(model, prompts, NEW, sampling=Sampling(temperature=0.0, repetition_penalty=penalty))
    for prompt, row in zip(prompts, result.tolist(), strict=True):
        text = prompt.tolist()
        for token in row:
            logits = model(torch.tensor([text]))[0, -1].tolist()
            for seen in set(text):
                logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
            assert token == max(range(VOCAB), key=logits.__getitem__)
            text.append(token)
    assert result.tolist() != generate(model, prompts, NEW).tolist()


# Seeds


def test_a_seed_fixes_the_tokens_and_leaves_the_generators_alone(model, prompt):
    sampling = Sampling(seed=5)
    first = generate(model, prompt, NEW, sampling=sampling).tokens
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(generate(model, prompt, NEW, sampling=sampling).tokens, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generate(model, prompt, NEW, sampling=Sampling(seed=6)).tokens, first)


def test_without_a_seed_the_global_generator_decides(model, prompt):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, prompt, NEW, sampling=Sampling()).tokens

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_a_row_is_sampled_as_if_the_others_were_not_there(model, prompt):
    sampling = Sampling(seed=5)
    tokens = generate(model, prompt, NEW, sampling=sampling).tokens
    others = torch.cat([prompt[:1], prompt.flip(0), prompt])
    assert torch.equal(generate(model, others, NEW, sampling=sampling).tokens[:1], tokens[:1])
    same = generate(model, prompt[:1].expand(3, -1), NEW, sampling=sampling).tokens
    assert len({tuple(row) for row in same.tolist()}) == 3


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


# Beam search


def reference_beam_search(model, prompt, new, beams, stop, start=None):
    """One prompt, in lists, without a cache, from the description: the best (score, tokens)."""

    def log_p(tokens):
        text = torch.tensor([tokens], dtype=torch.int64)
        return logits_of(model, prompt, text, start)[0].log_softmax(0).tolist()

    live, finished = [(0.0, [])], []
    for length in range(1, new + 1):
        continued = [(s + p, [*tokens, t]) for s, tokens in live for t, p in enumerate(log_p(tokens))]
        ranked = sorted(continued, reverse=True)
        ended = [length == new or tokens[-1] in stop for _, tokens in ranked]
        if not (beams.early_stopping and len(finished) == beams.num_beams):
            finished += [
                (score / length**beams.length_penalty, tokens)
                for (score, tokens), end in list(zip(ranked, ended, strict=True))[: beams.num_beams]
                if end
            ]
            finished = sorted(finished, reverse=True)[: beams.num_beams]
        live = [candidate for candidate, end in zip(ranked, ended, strict=True) if not end][: beams.num_beams]
        full = len(finished) == beams.num_beams
        if not live or (full and beams.early_stopping):
            break
        if full and live[0][0] / length**beams.length_penalty <= finished[-1][0]:
            break
    return finished[0]


BEAMS = {
    "two": BeamSearch(2),
    "five": BeamSearch(5),
    "one": BeamSearch(1),
    "long": BeamSearch(3, 2.0),
    "no penalty": BeamSearch(3, 0.0),
    "short": BeamSearch(3, -1.0),
    "early": BeamSearch(3, early_stopping=True),
    "early and long": BeamSearch(4, 2.0, early_stopping=True),
}
STOPS = {"no stop": None, "a stop": 3, "stops": [3, 7, 11]}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", BEAMS)
def test_beams_against_a_search_without_cache(name, stop, prompt):
    model, new = encoder_decoder().double(), 6
    result = generate(model, prompt, new, start=1, beams=BEAMS[name], stop=STOPS[stop])
    stops = {3, 7, 11} if stop == "stops" else {STOPS[stop]}
    with torch.no_grad():
        for row in range(3):
            score, tokens = reference_beam_search(model, prompt[row][None], new, BEAMS[name], stops, start=1)
            assert result.tolist()[row] == tokens
            torch.testing.assert_close(result.scores[row], torch.tensor(score))


@pytest.mark.parametrize("kind", KINDS)
def test_beams_with_every_cache_and_ragged_prompts(kind):
    model = language_model(window=(3, 0))
    prompts = [torch.randint(VOCAB, (length,)) for length in RAGGED]
    for beams in (BeamSearch(1), BeamSearch(4)):
        result = generate(model, prompts, 6, beams=beams, stop=3, cache=KINDS[kind])
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                _, tokens = reference_beam_search(model, prompt[None], 6, beams, {3})
            assert result.tolist()[row] == tokens


@pytest.mark.parametrize("stop", [None, 2])
def test_enough_beams_find_the_best_of_all_texts(stop):
    vocab, new = 4, 4
    model = language_model(vocab_size=vocab)
    prompt = torch.randint(vocab, (1, 5))
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=new)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts[:, :-1]], 1))[:, prompt.shape[1] - 1 :]
    steps = logits.log_softmax(-1).gather(2, texts[:, :, None]).squeeze(2)
    lengths = [next((i + 1 for i, t in enumerate(text) if t == stop), new) for text in texts.tolist()]
    scores = [float(row[:n].sum()) / n for row, n in zip(steps, lengths, strict=True)]
    best = max(range(len(texts)), key=scores.__getitem__)
    result = generate(model, prompt, new, beams=BeamSearch(vocab**new), stop=stop)
    assert result.tolist() == [texts[best, : lengths[best]].tolist()]
    torch.testing.assert_close(result.scores, torch.tensor([scores[best]]))


def test_one_beam_is_greedy_search(model, prompt):
    assert torch.equal(generate(model, prompt, NEW, beams=BeamSearch(1)).tokens, generate(model, prompt, NEW).tokens)


# transformers


@pytest.fixture(scope="module")
def llama():
    """The same random Llama here and there: (model, that of transformers)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastattn[hf]'"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {
        "o_proj": "out_proj", "mlp": "feed_forward", "input_layernorm": "self_norm",
        "post_attention_layernorm": "feed_forward_norm", "model.embed_tokens": "embedding", "model.layers":
        "decoder.blocks", "model.norm": "decoder.norm", "lm_head": "head",
    }  # fmt: skip

    def renamed(name):
        return functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)

    ours = language_model(tie_embeddings=False, norm_eps=config.rms_norm_eps)
    ours.load_state_dict({renamed(name): weight for name, weight in theirs.state_dict().items()})
    return ours, theirs


def theirs_generates(theirs, prompt, **options):
    """Sequences (N, T) without the prompt, and scores where beams have some."""
    out = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **{"do_sample": False, "eos_token_id": None, **options},
    )  # fmt: skip
    return out.sequences[:, prompt.shape[1] :], getattr(out, "sequences_scores", None)


def assert_same_texts(result, tokens):
    assert result.tokens.shape == tokens.shape
    assert result.tolist() == [row[:n].tolist() for row, n in zip(tokens, result.lengths, strict=True)]


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("stop", STOPS)
def test_greedy_of_transformers(penalty, stop, llama, prompt):
    ours, theirs = llama
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    tokens, _ = theirs_generates(theirs, prompt, repetition_penalty=penalty, eos_token_id=STOPS[stop])
    assert_same_texts(generate(ours, prompt, NEW, sampling=sampling, stop=STOPS[stop]), tokens)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", [name for name in BEAMS if name != "one"])
def test_beams_of_transformers(name, stop, llama, prompt):
    ours, theirs = llama
    tokens, scores = theirs_generates(theirs, prompt, eos_token_id=STOPS[stop], **dataclasses.asdict(BEAMS[name]))
    result = generate(ours, prompt, NEW, beams=BEAMS[name], stop=STOPS[stop])
    assert_same_texts(result, tokens)
    torch.testing.assert_close(result.scores, scores)


@pytest.mark.parametrize("name", TRUNCATIONS)
@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_logits_processors_of_transformers(name, penalty, llama):
    _, theirs = llama
    options = {"do_sample": True, "repetition_penalty": penalty, "top_k": 0, **TRUNCATIONS[name]}
    config, _ = theirs._prepare_generation_config(None, **options)
    processors = theirs._get_logits_processor(config, input_ids_seq_length=7, device="cpu")
    assert processors or name == "top_k beyond the vocabulary" or penalty == 1.0
    text, logits = torch.randint(VOCAB, (50, 7)), 3.0 * torch.randn(50, VOCAB)
    expected = processors(text, logits.clone())
    seen = torch.zeros(50, VOCAB, dtype=torch.bool).scatter_(1, text, True)
    actual = truncate(penalise(logits, seen, penalty), Sampling(**TRUNCATIONS[name]))
    torch.testing.assert_close(actual, expected)


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
