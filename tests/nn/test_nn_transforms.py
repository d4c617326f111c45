"""Layers under what other tools of PyTorch do with a module: per-sample gradients, quantisation, pruning, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastattn
import fastattn.nn as fnn
from tests.support.layer_checks import Pool


def small_model():
    return fnn.CausalLM(fnn.CausalLMConfig(vocab_size=20, d_model=16, num_layers=1, num_heads=2))


def small_encoder():
    return fnn.TransformerEncoder(fnn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)


CASES = {
    "CausalLM": (small_model, lambda: torch.randint(20, (3, 6))),
    "TransformerEncoder": (small_encoder, lambda: torch.randn(3, 6, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_sample(name):
    """``vmap(grad(functional_call))``, as for differential privacy, against one sample after the other."""
    make, batch = CASES[name]
    model, samples = make(), batch()
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    def alone(dtype):
        own, inputs = copy.deepcopy(model).to(dtype), samples.to(dtype) if samples.is_floating_point() else samples
        return [torch.autograd.grad(own(x[None]).square().sum(), [*own.parameters()]) for x in inputs]

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    pool = Pool()
    for index, (exact, eager) in enumerate(zip(alone(torch.float64), alone(torch.float32), strict=True)):
        for key, of_double, of_single in zip(parameters, exact, eager, strict=True):
            pool.add(key, together[key][index], of_double, of_single)
    pool.check()


@pytest.mark.filterwarnings("ignore")  # PyTorch moves its quantisation to another package
@pytest.mark.parametrize("name", CASES)
def test_dynamic_quantisation(name):
    """The linear layers compute in int8; the results are nearer to those before than another model's are."""
    make, batch = CASES[name]
    model, samples = make().eval(), batch()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    with torch.no_grad():
        ours, plain, other = (module(samples) for module in (quantised, model, make().eval()))
    assert 0 < (ours - plain).norm() < (other - plain).norm()
    if name == "CausalLM":
        assert fastattn.generate(quantised, samples, 3).tokens.shape == (3, 3)


def test_pruned_weights_are_used():
    model, x = small_encoder().eval(), torch.randn(3, 6, 16)
    zeroed = copy.deepcopy(model)
    prune.l1_unstructured(model.layers[0].self_attn, "in_proj_weight", amount=0.5)
    with torch.no_grad():
        zeroed.layers[0].self_attn.in_proj_weight.mul_(model.layers[0].self_attn.in_proj_weight_mask)
        assert torch.equal(model(x), zeroed(x))


@pytest.mark.parametrize("kind", [fnn.KVCache, fnn.DynamicCache, fnn.PagedCache, fnn.SlidingWindowCache])
def test_a_copied_cache_goes_on_by_itself(kind):
    model = small_model().eval()
    tokens = torch.randint(20, (2, 5))
    if kind is fnn.SlidingWindowCache:
        model = fnn.CausalLM(
            fnn.CausalLMConfig(vocab_size=20, d_model=16, num_layers=1, num_heads=2, window=(3, 0))
        ).eval()
    with torch.no_grad():
        cache = model.make_cache(2, 8, kind)
        model(tokens[:, :3], cache=cache)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        model(tokens[:, 3:4] + 0, cache=cache)
        expected = model(tokens[:, 4:], cache=cache)
        for other in copies:
            assert other.length == 3
            model(tokens[:, 3:4], cache=other)
            assert torch.equal(model(tokens[:, 4:], cache=other), expected)
