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
    ("name", "vocabulary", "sequence"),
    [*((name, False, False) for name in NAMES), *((name, False, True) for name in NAMES[1:]), ("untied", True, False),
     ("untied", True, True)],
)  # fmt: skip
def test_a_step_of_training(ranks, name, vocabulary, sequence):
    check_step(ranks.run(work.divided_step, name, vocabulary, sequence, ranks=2), name)


def check_step(found, name):
    loss, gradients = work.train_step(*work.make_model(name, torch.float64))
    eager_loss, eager = work.train_step(*work.make_model(name))
    for their_loss, theirs in found:
        assert_parity(their_loss, loss, eager_loss, "loss")
        assert theirs.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert_parity(theirs[parameter], gradient, eager[parameter], parameter)


def test_a_compiled_step_with_activation_checkpointing(ranks):
    check_step(ranks.run(work.divided_step, "rope", False, True, True, ranks=2), "rope")


@pytest.mark.parametrize(
    ("name", "sequence"), [*((name, False) for name in NAMES), ("alibi", True), ("encoder_decoder", True)]
)
def test_generate(ranks, name, sequence):
    assert ranks.run(work.generated, name, sequence, ranks=2) == [work.generated(None, name)] * 2


def test_messages(ranks):
    """One sum for each attention and feed-forward, in both directions, whatever number of projections they have.

    On shards it is a gathering before and a scattered sum behind, and one more gathering at the end of the stack.
    """
    parts = 2 * 2
    assert ranks.run(work.messages, False, ranks=2)[0] == ({"all_reduce": parts}, {"all_reduce": parts})
    shards = {"all_gather_into_tensor": parts + 1, "reduce_scatter_tensor": parts}
    assert ranks.run(work.messages, True, ranks=2)[0] == (shards, shards)


LAYERS = ("encoder", "layer", "transformer")


@pytest.mark.parametrize(
    ("name", "sequence"),
    [*((name, False) for name in (*work.ATTENTION, *LAYERS)), *((name, True) for name in LAYERS)],
)
def test_drop_ins_of_torch(ranks, name, sequence):
    """Outputs, weights and every gradient, with the dropout of one process."""
    exact, eager = (work.drop_in_step(None, name, dtype) for dtype in (torch.float64, torch.float32))
    count = 4 if name == "transformer" else 2
    for found in ranks.run(work.drop_in_step, name, torch.float32, sequence, ranks=count):
        assert found.keys() == exact.keys()
        for key, x in found.items():
            assert_parity(x, exact[key], eager[key], key)


def test_drop_ins_step_by_step(ranks):
    exact, eager = (work.decoded(None, dtype) for dtype in (torch.float64, torch.float32))
    for found in ranks.run(work.decoded, ranks=2):
        assert_parity(found, exact, eager)


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


def test_refusals_of_drop_ins():
    layer = torch.nn.TransformerEncoderLayer(16, 4, 30)
    with pytest.raises(TypeError, match=r"^self_attn: expected a fastattn\.nn\.Multihead.* fastattn\.convert"):
        fd.tensor_parallel_plan(layer, 2)
    fastattn.convert(layer)
    with pytest.raises(ValueError, match=r"^self_attn\.num_heads: expected a multiple of 3 ranks, got 4"):
        fd.tensor_parallel_plan(layer, 3)
    with pytest.raises(ValueError, match=r"^linear1\.out_features: expected a multiple of 4 ranks, got 30"):
        fd.tensor_parallel_plan(layer, 4)


def test_a_cache_on_shards(ranks):
    for good, answer in ranks.answers(work.decoded, torch.float32, True, ranks=2):
        assert not good and "expected tensor_parallel_plan with sequence=False, got True" in answer, answer


def test_nothing_to_divide():
    with pytest.raises(ValueError, match=r"expected one with fastattn\.nn\.Attention, FeedForward or Multihead"):
        fd.tensor_parallel_plan(torch.nn.Linear(2, 2), 2)
    block = fastattn.nn.Block(config())
    with pytest.raises(
        TypeError, match=r"model\.head: expected a torch\.nn\.Linear with vocabulary=True, got NoneType"
    ):
        fd.tensor_parallel_plan(block, 2, vocabulary=True)
