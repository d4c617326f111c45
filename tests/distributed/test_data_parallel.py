"""A model whose parameters are divided among ranks, by PyTorch's FSDP2, is the model."""

import pytest
import torch

import fastattn
from fastattn.distributed import clip_grad_norm_
from fastattn.testing import assert_parity
from tests.support import ranks_data_parallel as work
from tests.support.ranks_tensor_parallel import train_step


@pytest.mark.parametrize(
    ("way", "ranks_used"), [("plain", 2), ("compiled", 2), ("hsdp", 4), ("with_heads", 4), ("on_shards", 4)]
)
def test_a_step_of_training_and_generate(ranks, way, ranks_used):
    layers = work.layers_of(way)
    _, exact = train_step(*work.make_lm(torch.float64, layers))
    model, tokens = work.make_lm(layers=layers)
    _, eager = train_step(model, tokens)
    expected = fastattn.generate(model, torch.arange(6).view(2, 3), 5).tokens.tolist()
    for gradients, generated in ranks.run(work.step, way, ranks=ranks_used):
        assert gradients.keys() == exact.keys()
        for name, gradient in gradients.items():
            assert_parity(gradient, exact[name], eager[name], name)
        assert generated == expected


@pytest.mark.parametrize("name", ["encoder_decoder", "converted"])
def test_methods_beside_forward(ranks, name):
    expected = work.methods(None, name)
    for found in ranks.run(work.methods, name, ranks=2):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", ["plain", "with_heads"])
def test_a_checkpoint_loads_on_another_number_of_ranks(ranks, way, tmp_path):
    ranks.run(work.save, str(tmp_path), way, ranks=4)
    exact, eager = work.trained(torch.float64), work.trained(torch.float32)
    for found in ranks.run(work.load, str(tmp_path), ranks=2):
        for name, weight in found.items():
            assert_parity(weight, exact[name], eager[name], name)


def test_blocks_as_stages_of_a_pipeline(ranks):
    exact_loss, exact = train_step(*work.make_lm(torch.float64))
    loss, eager = train_step(*work.make_lm())
    first, last = ranks.run(work.pipeline_step, ranks=2)
    assert_parity(last[0], exact_loss, loss, "loss")
    gradients = first[1] | last[1]
    assert gradients.keys() == {*exact, "head.weight"}
    gradients["embedding.weight"] += gradients.pop("head.weight")  # which is tied to it, on another rank
    for name, gradient in gradients.items():
        assert_parity(gradient, exact[name], eager[name], name)


@pytest.mark.parametrize("way", ["heads", "with_heads"])
def test_gradients_are_clipped_together(ranks, way):
    """Of parameters some of which are divided in two ways, some in one and some not at all."""
    expected = {}
    for dtype in (torch.float64, torch.float32):
        model, tokens = work.make_lm(dtype)
        train_step(model, tokens)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        expected[dtype] = norm, {name: p.grad for name, p in model.named_parameters()}
    (exact_norm, exact), (eager_norm, eager) = expected.values()
    assert exact_norm > 0.1
    for norm, gradients in ranks.run(work.clipped, way, ranks=4 if way == "with_heads" else 2):
        assert_parity(norm, exact_norm, eager_norm, "norm")
        for name, gradient in gradients.items():
            assert_parity(gradient, exact[name], eager[name], name)


@pytest.mark.parametrize("count", [None, 0, 2], ids=["one tensor", "none", "two"])
def test_clipping_takes_the_parameters_that_torch_takes(count):
    def clipped(function):
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(count or 1)]
        for parameter in parameters:
            parameter.grad = torch.tensor([3.0, 4.0, 0.0])
        norm = function(parameters[0] if count is None else parameters[:count], 1.0)
        return norm, [parameter.grad for parameter in parameters]

    torch.testing.assert_close(clipped(clip_grad_norm_), clipped(torch.nn.utils.clip_grad_norm_), rtol=0, atol=0)
