"""Decode steps as a CUDA graph, on a recorded graph in place of CUDA's: same tokens, few captures, reasons."""

import pytest
import torch

from fastattn import generate, stream
from fastattn.inference import graphs
from fastattn.nn import CausalLM, CausalLMConfig, DynamicCache, KVCache, PagedCache, SlidingWindowCache
from fastattn.spec import cache as cache_spec
from fastattn.spec import checks
from tests.support.recorded_graph import Graphs

VOCAB, NEW = 29, 20


@pytest.fixture
def made(monkeypatch):
    """The graphs that are made while CPU tensors count as a GPU's, which nobody reads in between."""
    made = Graphs()
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "capture", made.capture)
    monkeypatch.setattr(graphs, "reason_against_plan", lambda *_: "a GPU's steps are those of the layers")
    monkeypatch.setattr(checks, "readable", lambda _: False)
    monkeypatch.setattr(cache_spec, "readable", lambda _: False)
    return made


@pytest.fixture
def model():
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.3}
    return CausalLM(CausalLMConfig(vocab_size=VOCAB, window=(12, 0), **sizes)).eval()


@pytest.mark.parametrize("kind", [KVCache, DynamicCache, PagedCache, SlidingWindowCache])
def test_one_capture_gives_the_same_tokens(made, model, kind):
    for batch in (1, 3):
        prompt = torch.randint(VOCAB, (batch, 5))
        plain = generate(model, prompt, NEW, cache=kind, cuda_graph=False)
        before = made.captures, made.replays
        replayed = generate(model, prompt, NEW, cache=kind)
        assert replayed.no_cuda_graph is None and plain.no_cuda_graph == "cuda_graph is False"
        assert (made.captures - before[0], made.replays - before[1]) == (1, NEW - 2)
        assert replayed.tolist() == plain.tolist()
        assert torch.equal(replayed.scores, plain.scores)  # a replay is the same kernels again
        assert [step.tolist() for step in stream(model, prompt, NEW, cache=kind)] == plain.tokens.T.tolist()


def test_a_cache_that_grows_is_captured_anew(made, model):
    prompt = torch.randint(VOCAB, (2, 5))
    cache = model.make_cache(2, 8, DynamicCache)
    replayed = generate(model, prompt, NEW, cache=cache)
    assert cache.capacity == 32 and made.captures == 3  # of 8, 16 and 32
    assert replayed.tolist() == generate(model, prompt, NEW, cuda_graph=False).tolist()


def test_rows_that_have_ended_do_not_grow(made, model):
    prompt = torch.randint(VOCAB, (4, 5))
    first = generate(model, prompt, NEW, cuda_graph=False)
    stop = first.tokens[0, 3].item()
    caches = [model.make_cache(4, 64) for _ in range(2)]
    plain, replayed = (
        generate(model, prompt, NEW, stop=stop, cache=cache, cuda_graph=on)
        for cache, on in zip(caches, (False, True), strict=True)
    )
    assert made.captures == 1 and replayed.no_cuda_graph is None
    assert plain.tolist() == replayed.tolist() and plain.lengths[0] <= 4
    assert caches[0].lens.tolist() == caches[1].lens.tolist() and caches[0].length == caches[1].length


def test_a_hook_is_a_reason_and_runs_at_every_step(made, model):
    calls = []
    model.decoder.blocks[0].register_forward_hook(lambda *_: calls.append(None))
    result = generate(model, torch.randint(VOCAB, (2, 5)), NEW)
    assert result.no_cuda_graph == "decoder.blocks.0 has forward hooks, which a replay would leave out"
    assert len(calls) == NEW and made.captures == 0


def test_control_flow_on_data_is_a_reason(made, model):
    class Careful(torch.nn.Module):
        def forward(self, x):
            return x * 2.0 if x.sum() > 0 else x

    prompt = torch.randint(VOCAB, (2, 5))
    model.head = torch.nn.Sequential(Careful(), model.head)
    model.head.out_features = VOCAB
    result = generate(model, prompt, NEW)
    assert made.captures == 0
    assert result.no_cuda_graph == ("the step cannot be captured: operation not permitted when stream is capturing")
    assert result.tolist() == generate(model, prompt, NEW, cuda_graph=False).tolist()


def test_other_reasons(made, model, monkeypatch):
    prompt = torch.randint(VOCAB, (2, 5))
    reasons = [generate(model, prompt, 16).no_cuda_graph]
    with torch.autocast("cpu"):
        reasons.append(generate(model, prompt, NEW).no_cuda_graph)
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    reasons.append(generate(model, prompt, NEW).no_cuda_graph)
    for reason, part in zip(reasons, ("here are 15", "autocast", "on 'cpu'"), strict=True):
        assert reason is not None and part in reason
    assert made.captures == 0
    with pytest.raises(TypeError, match="cuda_graph: expected bool, got int"):
        generate(model, prompt, NEW, cuda_graph=1)
