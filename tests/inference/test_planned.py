"""Decode steps of a CPU as one call: logits by the rule, the same tokens, and what keeps a step from being planned."""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn import generate, stream
from fastattn.backends.cpu import library as cpu_library
from fastattn.inference import graphs
from fastattn.inference.planned import PlannedStep, reason_against_plan
from fastattn.nn import (
    ALiBi,
    CausalLM,
    CausalLMConfig,
    DynamicCache,
    KVCache,
    Learned,
    PagedCache,
    RoPE,
    SlidingWindowCache,
    YarnScaling,
)
from fastattn.testing import assert_parity

pytestmark = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")

VOCAB, NEW = 61, 14
SIZES = {"d_model": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "dim_feedforward": 72, "init_std": 0.3}
MODELS = {
    "plain": {},
    "biases": {"bias": True, "scale_embeddings": True, "tie_embeddings": False},
    "head norms": {"qk_norm": True, "head_dim": 18},
    "post-norm": {"norm_first": False, "num_kv_heads": 4},
    "without norm at the end": {"final_norm": False},
    "window and softcap": {"window": (6, 0), "softcap": 3.0},
    "sinks": {"sinks": True, "num_kv_heads": 1},
    "ALiBi": {"position": ALiBi()},
    "learned ALiBi": {"position": ALiBi(learned=True)},
    "YaRN": {"position": RoPE(scaling=YarnScaling(4.0, 8))},
    "no positions": {"position": None},
}
KINDS = {
    "KVCache": KVCache,
    "DynamicCache": DynamicCache,
    "PagedCache": functools.partial(PagedCache, page_size=3),
    "SlidingWindowCache": functools.partial(SlidingWindowCache, page_size=2),
}


def language_model(dtype=torch.float32, **options):
    """With parameters that differ from the zeros and ones with which they start, and logits that are far apart."""
    model = CausalLM(CausalLMConfig(**SIZES | {"vocab_size": VOCAB} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made."""
    made = []

    class Noted(PlannedStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(graphs, "PlannedStep", Noted)
    return made


def without_plan(monkeypatch):
    monkeypatch.setattr(graphs, "reason_against_plan", lambda *_: "none is wanted")


@torch.no_grad()
def logits_after(model, prompt, tokens, plan, threads=None):
    """What the model says after a prompt and each of some tokens, which alone have other threads: (steps, N, V)."""
    cache = model.make_cache(prompt.shape[0], prompt.shape[1] + tokens.shape[1])
    model.prefill(prompt, cache)
    if threads is not None:
        torch.set_num_threads(threads)
    step = PlannedStep(model, cache) if plan else lambda token, _: model(token[:, None], cache=cache)[:, 0]
    return torch.stack([step(token, None).clone() for token in tokens.T])


# Results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_keep_to_the_rule(name, dtype):
    model, results = language_model(dtype, **MODELS[name]), []
    for rows in (1, 2, 7):
        prompt, tokens = torch.randint(VOCAB, (rows, 5)), torch.randint(VOCAB, (rows, 6))
        cache = model.make_cache(rows, 11)
        assert reason_against_plan(model, cache, rows) is None
        exact = logits_after(copy.deepcopy(model).double(), prompt, tokens, plan=False)
        results.append((*(logits_after(model, prompt, tokens, plan=plan) for plan in (True, False)), exact))
    # All of them together: the largest error of the logits of a single row is a matter of chance, for eager code too.
    actual, eager, exact = (torch.cat([x.flatten() for x in part]) for part in zip(*results, strict=True))
    assert_parity(actual, exact, eager, "logits", intermediate=float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_model(kind, plans, monkeypatch):
    """Scores of all rows are held to the rule together: that of one row may be exact by luck in the peer."""
    model, calls = language_model(window=(9, 0)), []
    for rows in (1, 5):
        options = {"lengths": torch.randint(1, 6, (rows,)), "cache": KINDS[kind], "stop": 3}
        calls.append((torch.randint(VOCAB, (rows, 5)), NEW, options))
    found = [generate(model, prompt, new, **options) for prompt, new, options in calls]
    assert len(plans) == 2
    streamed = [[token.tolist() for token in stream(model, prompt, new, **options)] for prompt, new, options in calls]
    assert len(plans) == 4
    without_plan(monkeypatch)
    double = copy.deepcopy(model).double()
    expected, exact = (
        [generate(one, prompt, new, **options) for prompt, new, options in calls] for one in (model, double)
    )
    assert len(plans) == 4
    for ours, steps, theirs, right in zip(found, streamed, expected, exact, strict=True):
        assert ours.tolist() == theirs.tolist() == right.tolist() and steps == theirs.tokens.T.tolist()
    ours, theirs, right = (torch.cat([one.scores for one in results]) for results in (found, expected, exact))
    assert_parity(ours, right.double(), theirs, "scores", intermediate=right)


def test_a_cache_of_the_caller_grows_and_goes_on(plans):
    model = language_model()
    prompt = torch.randint(VOCAB, (3, 4))
    cache = model.make_cache(3, 6, DynamicCache)
    first = generate(model, prompt, NEW, cache=cache)
    assert len(plans) == 3 and cache.capacity == 24  # of 6, 12 and 24
    second = generate(model, first.tokens[:, -1:], NEW, cache=cache)
    both = generate(model, prompt, 2 * NEW)
    assert torch.cat([first.tokens, second.tokens], 1).tolist() == both.tolist()


@pytest.mark.parametrize("rows", [1, 6])
def test_results_do_not_depend_on_the_number_of_threads(rows):
    model = language_model(d_model=320, dim_feedforward=900)
    prompt, tokens = torch.randint(VOCAB, (rows, 5)), torch.randint(VOCAB, (rows, 3))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        try:
            results.append(logits_after(model, prompt, tokens, True, threads))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rows_do_not_depend_on_each_other_and_padding_is_not_kept():
    model = language_model()
    prompt = torch.randint(VOCAB, (2, 5))
    together = generate(model, prompt, NEW, lengths=torch.tensor([5, 2]))
    for row, length in enumerate((5, 2)):
        assert generate(model, prompt[row, :length], NEW).tolist() == together.tolist()[row : row + 1]


# The plan is of the model as it is


def test_weights_that_change_in_place_are_seen(plans):
    """The keys and values of old weights stay in the cache, so that only the head is changed."""
    model, prompt = language_model(tie_embeddings=False), torch.randint(VOCAB, (2, 5))
    expected = generate(model, prompt, 5).tokens
    steps = stream(model, prompt, NEW)
    for index in range(3):
        assert torch.equal(next(steps), expected[:, index])
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))  # what was token t is now t + 1
    assert torch.equal(next(steps), (expected[:, 3] + 1) % VOCAB)
    assert len(plans) == 2  # one of each search


def test_another_number_of_threads_is_a_new_plan(plans):
    model, prompt = language_model(), torch.randint(VOCAB, (2, 5))
    before = torch.get_num_threads()
    steps = stream(model, prompt, NEW)
    tokens = [next(steps) for _ in range(4)]
    try:
        torch.set_num_threads(before + 1)
        tokens += steps
    finally:
        torch.set_num_threads(before)
    assert len(plans) == 2
    assert torch.stack(tokens, 1).tolist() == generate(model, prompt, NEW).tolist()


def test_a_plan_made_in_inference_mode_serves_outside(plans):
    model, prompt = language_model(), torch.randint(VOCAB, (2, 5))
    steps = stream(model, prompt, NEW)
    with torch.inference_mode():
        tokens = [next(steps).tolist() for _ in range(4)]
    tokens += [token.tolist() for token in steps]
    assert len(plans) == 1 and tokens == generate(model, prompt, NEW).tokens.T.tolist()


# What is not planned


class Changed(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2.0


def hooked(model):
    model.decoder.blocks[1].feed_forward.up_proj.register_forward_hook(lambda module, args, out: out * 2.0)


def replaced(model):
    attn = model.decoder.blocks[0].self_attn
    layer = Changed(attn.q_proj.in_features, attn.q_proj.out_features, bias=False)
    layer.load_state_dict(attn.q_proj.state_dict())
    attn.q_proj = layer


def patched(model):
    block = model.decoder.blocks[1]
    own = block.forward
    block.forward = lambda *args, **inputs: own(*args, **inputs) * 2.0


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, hooked, r"blocks.1.feed_forward.up_proj has hooks"),
        ({}, replaced, r"blocks.0.self_attn.q_proj is a Changed"),
        ({}, patched, r"blocks.1 has hooks"),
        ({"norm": "layer"}, None, "the model has 'layer', 'swiglu'"),
        ({"activation": "geglu"}, None, "the model has 'rms', 'geglu'"),
        ({"position": Learned(32)}, None, "the model has Learned positions"),
        ({"num_heads": 20, "num_kv_heads": 1}, None, "more than 16 query heads"),
        ({}, torch.nn.Module.double, "torch.float64 is not served"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_a_plan_would_miss_is_not_planned(options, change, reason, plans, monkeypatch):
    model, prompt = language_model(**options), torch.randint(VOCAB, (2, 5))
    if change is not None:
        change(model)
    with torch.no_grad():
        why = reason_against_plan(model, model.make_cache(2, 20), 2)
    assert why is not None
    assert re.search(reason, why)
    found = generate(model, prompt, NEW)
    assert not plans
    without_plan(monkeypatch)
    assert found.tolist() == generate(model, prompt, NEW).tolist()


def test_who_records_operators_sees_them(plans):
    model, prompt = language_model(), torch.randint(VOCAB, (2, 5))
    with FlopCounterMode(display=False) as counter:
        generate(model, prompt, 4)
    generate(model, prompt, 4)
    assert counter.get_total_flops() > 0 and len(plans) == 1


def test_many_rows_are_not_planned(plans):
    generate(language_model(), torch.randint(VOCAB, (17, 5)), 4)
    assert not plans


def test_autocast_is_not_planned(plans):
    with torch.autocast("cpu", torch.bfloat16):
        generate(language_model(), torch.randint(VOCAB, (2, 5)), 4)
    assert not plans


def test_a_subclass_of_the_model_is_not_planned():
    class Own(CausalLM):
        pass

    model = Own(CausalLMConfig(**SIZES, vocab_size=VOCAB)).eval()
    assert reason_against_plan(model, model.make_cache(1, 8), 1) == "the model is a Own"


def test_where_gradients_are_wanted_nothing_is_planned():
    model = language_model()
    assert reason_against_plan(model, model.make_cache(1, 8), 1) == "somebody records or transforms what is computed"
