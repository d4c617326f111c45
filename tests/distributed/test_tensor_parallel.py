"""A model whose heads are divided among ranks is the model."""

import re

import pytest
import torch

import fastattn
import fastattn.distributed as fd
from fastattn.testing import assert_parity
from tests.support import ranks_work as work


def test_a_step_of_training(ranks):
    loss, gradients = work.train_step(*work.make_model(torch.float64))
    eager_loss, eager = work.train_step(*work.make_model())
    for their_loss, theirs in ranks.run(work.tensor_parallel_step, ranks=2):
        assert_parity(their_loss, loss, eager_loss, "loss")
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_parity(theirs[name], gradient, eager[name], name)


def config(**changes):
    return fastattn.nn.CausalLMConfig(vocab_size=9, d_model=32, num_layers=1, num_heads=4, **changes)


@pytest.mark.parametrize(
    ("changes", "ranks", "text"),
    [
        ({}, 3, "blocks.0.self_attn.num_heads: expected a multiple of 3 ranks, got 4"),
        ({"num_kv_heads": 1}, 2, "num_kv_heads: expected a multiple of 2 ranks, got 1"),
        ({"sinks": True}, 2, "expected attention without sinks"),
        ({"qk_norm": True}, 2, "expected attention without qk_norm"),
        ({"position": fastattn.nn.ALiBi()}, 2, "expected attention without ALiBi positions"),
    ],
)
def test_refusals(changes, ranks, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fd.tensor_parallel_plan(fastattn.nn.CausalLM(config(**changes)), ranks)


def test_nothing_to_divide():
    with pytest.raises(ValueError, match=r"expected one with fastattn\.nn\.Attention or FeedForward, got Linear"):
        fd.tensor_parallel_plan(torch.nn.Linear(2, 2), 2)
