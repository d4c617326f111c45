"""Sampling: the distributions that are left, seeds, and that a row does not depend on others."""

import math

import pytest
import torch

from fastattn import Sampling, generate
from fastattn.inference.sampling import draw, truncate
from fastattn.testing import assert_parity
from tests.support.generation import NEW, RAGGED, TRUNCATIONS, VOCAB, language_model, logits_of


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
        assert_parity(p, expected, logits.masked_fill(expected == 0, -math.inf).softmax(0))


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


def test_the_largest_seed(model, prompt):
    generate(model, prompt, 1, sampling=Sampling(seed=2**64 - 1))
    with pytest.raises(ValueError, match=r"seed: expected less than 2\*\*64, got 18446744073709551616"):
        Sampling(seed=2**64)


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
