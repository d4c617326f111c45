"""A model whose heads are divided among ranks is the model."""

import re

import pytest
import torch

import fastattn
import fastattn.distributed as fd
from fastattn.testing import assert_parity
from tests.support import ranks_tensor_parallel as work

NAMES = ("rope", "of_heads", "alibi", "encoder_decoder")


@pytest.mark.parametrize(
    ("name", "vocabulary"), [*((name, False) for name in NAMES), ("untied", True)], ids=[*NAMES, "vocabulary"]
)
def test_a_step_of_training(ranks, name, vocabulary):
    loss, gradients = work.train_step(*work.make_model(name, torch.float64))
    eager_loss, eager = work.train_step(*work.make_model(name))
    for their_loss, theirs in ranks.run(work.divided_step, name, vocabulary, ranks=2):
        assert_parity(their_loss, loss, eager_loss, "loss")
        assert theirs.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert_parity(theirs[parameter], gradient, eager[parameter], parameter)


@pytest.mark.parametrize("name", NAMES)
def test_generate(ranks, name):
    assert ranks.run(work.generated, name, ranks=2) == [work.generated(None, name)] * 2


def config(**changes):
    return fastattn.nn.CausalLMConfig(vocab_size=9, d_model=32, num_layers=1, num_heads=4, **changes)


@pytest.mark.parametrize(
    ("changes", "ranks", "vocabulary", "text"),
    [
        ({}, 3, False, "blocks.0.self_attn.num_heads: expected a multiple of 3 ranks, got 4"),
        ({"num_kv_heads": 1}, 2, False, "num_kv_heads: expected a multiple of 2 ranks, got 1"),
        ({"tie_embeddings": False}, 2, True, "head.out_features: expected a multiple of 2 ranks, got 9"),
        ({"tie_embeddings": True}, 1, True, "model.head.weight: expected one that is not tied to an embedding"),
    ],
)
def test_refusals(changes, ranks, vocabulary, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fd.tensor_parallel_plan(fastattn.nn.CausalLM(config(**changes)), ranks, vocabulary=vocabulary)


def test_nothing_to_divide():
    with pytest.raises(ValueError, match=r"expected one with fastattn\.nn\.Attention or FeedForward, got Linear"):
        fd.tensor_parallel_plan(torch.nn.Linear(2, 2), 2)
    block = fastattn.nn.Block(config())
    with pytest.raises(
        TypeError, match=r"model\.head: expected a torch\.nn\.Linear with vocabulary=True, got NoneType"
    ):
        fd.tensor_parallel_plan(block, 2, vocabulary=True)
