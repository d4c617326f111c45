"""A model whose parameters are divided among ranks, by PyTorch's FSDP2, is the model."""

import pytest
import torch

import fastattn
from fastattn.testing import assert_parity
from tests.support import ranks_data_parallel as work
from tests.support.ranks_tensor_parallel import train_step


@pytest.mark.parametrize(("way", "ranks_used"), [("plain", 2), ("compiled", 2), ("hsdp", 4), ("with_heads", 4)])
def test_a_step_of_training_and_generate(ranks, way, ranks_used):
    _, exact = train_step(*work.make_lm(torch.float64))
    model, tokens = work.make_lm()
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


def test_a_checkpoint_loads_on_another_number_of_ranks(ranks, tmp_path):
    ranks.run(work.save, str(tmp_path), ranks=4)
    exact, eager = work.trained(torch.float64), work.trained(torch.float32)
    for found in ranks.run(work.load, str(tmp_path), ranks=2):
        for name, weight in found.items():
            assert_parity(weight, exact[name], eager[name], name)
