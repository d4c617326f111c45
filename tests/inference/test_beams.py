"""Beam search against a search without a cache, and generation against that of transformers."""

import copy
import dataclasses
import functools
import itertools
import os

import pytest
import torch

from fastattn import BeamSearch, Sampling, generate
from fastattn.inference.sampling import penalise, truncate
from fastattn.testing import assert_parity
from tests.support.generation import KINDS, NEW, RAGGED, TRUNCATIONS, VOCAB, encoder_decoder, language_model, logits_of

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
    stops, scores = {3, 7, 11} if stop == "stops" else {STOPS[stop]}, []
    with torch.no_grad():
        for row in range(3):
            score, tokens = reference_beam_search(model, prompt[row][None], new, BEAMS[name], stops, start=1)
            assert result.tolist()[row] == tokens
            scores.append(score)
    exact = torch.tensor(scores, dtype=torch.float64)
    sums = exact * torch.tensor([len(tokens) ** BEAMS[name].length_penalty for tokens in result.tolist()])
    assert_parity(result.scores, exact, exact.float(), intermediate=sums)  # summed and kept in float32


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
    lengths = torch.tensor([next((i + 1 for i, t in enumerate(text) if t == stop), new) for text in texts.tolist()])

    @torch.no_grad()
    def scores(model):
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts[:, :-1]], 1))[:, prompt.shape[1] - 1 :]
        steps = logits.log_softmax(-1).gather(2, texts[:, :, None]).squeeze(2)
        return steps.masked_fill(torch.arange(new) >= lengths[:, None], 0.0).sum(1) / lengths

    exact, eager = scores(copy.deepcopy(model).double()), scores(model)
    best = exact.argmax()
    result = generate(model, prompt, new, beams=BeamSearch(vocab**new), stop=stop)
    assert result.tolist() == [texts[best, : lengths[best]].tolist()]
    assert_parity(result.scores, exact[best, None], eager[best, None], intermediate=exact[best] * lengths[best])


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


@torch.no_grad()
def log_p_of(model, prompt, tokens):
    """The log-probability of a text after a prompt (L,)."""
    text = torch.tensor(tokens)
    logits = model(torch.cat([prompt, text])[None, :-1])[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, text[:, None]).sum()


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
    sums = torch.stack(
        [log_p_of(copy.deepcopy(ours).double(), *row) for row in zip(prompt, result.tolist(), strict=True)]
    )
    exact = sums / result.lengths ** BEAMS[name].length_penalty
    assert_parity(result.scores, exact, scores, "scores", intermediate=sums)


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
    assert torch.equal(actual, expected)
