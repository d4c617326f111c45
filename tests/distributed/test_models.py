"""A model whose sequence is divided among ranks is the model: loss, gradients, outputs, without a change of it."""

import pytest
import torch

import fastattn
import fastattn.distributed as fd
from fastattn.testing import assert_parity
from tests.support import ranks_models as work

STRATEGIES = ("ring", "all_gather", "ulysses")
BALANCES = ("contiguous", "zigzag", "striped")
# Each model, strategy, balance and number of ranks with some of the others.
STEPS = [
    ("rope", "ring", "zigzag", 2), ("rope", "all_gather", "striped", 3), ("rope", None, "contiguous", 3),
    ("learned", "ring", "striped", 2), ("sinusoidal", "ulysses", "zigzag", 3), ("alibi", "ring", "zigzag", 3),
    ("sinks", "ring", "zigzag", "2x2"),
    ("alibi", "ulysses", "striped", 2), ("sinks", "all_gather", "zigzag", 3), ("sinks", "ulysses", "contiguous", 2),
]  # fmt: skip


def check_step(parts, expected, eager):
    for loss, gradients in parts:
        assert_parity(loss, expected[0], eager[0], "loss")
        assert gradients.keys() == expected[1].keys()
        for name, gradient in gradients.items():
            assert_parity(gradient, expected[1][name], eager[1][name], name)


@pytest.mark.parametrize(("name", "strategy", "balance", "count"), STEPS)
def test_a_step_of_training(ranks, name, strategy, balance, count):
    parts = ranks.run(work.divided_step, name, strategy, balance, ranks=count)
    check_step(parts, work.whole_step(name, torch.float64), work.whole_step(name))
    assert all(torch.equal(loss, parts[0][0]) for loss, _ in parts)


@pytest.mark.parametrize(
    ("name", "strategy", "balance", "count"),
    [
        ("rope", "ring", "documents", 3),
        ("learned", "ulysses", "zigzag", 2),
        ("alibi", "all_gather", "contiguous", "2x2"),
    ],
)
def test_packed_documents(ranks, name, strategy, balance, count):
    parts = ranks.run(work.divided_packed_step, name, strategy, balance, ranks=count)
    check_step(parts, work.whole_packed_step(name, torch.float64), work.whole_packed_step(name))


@pytest.mark.parametrize("way", ["plain", "checkpoint", "compile"])
def test_as_a_property_of_the_model(ranks, way):
    count = 1 if way == "compile" else 2  # each process that compiles takes seconds to begin
    parts = ranks.run(work.divided_step, "rope", "ring", "zigzag", way, ranks=count)
    check_step(parts, work.whole_step("rope", torch.float64), work.whole_step("rope"))


@pytest.mark.parametrize("balance", BALANCES)
def test_padded_sequences_of_an_encoder(ranks, balance):
    def whole(dtype):
        model, x, lengths = work.make_encoder(dtype)
        return model(x, lengths=lengths).detach()

    for out in ranks.run(work.encode, balance, ranks=3):
        assert_parity(out[0], whole(torch.float64)[0], whole(torch.float32)[0])
        assert_parity(out[1, :11], whole(torch.float64)[1, :11], whole(torch.float32)[1, :11])


def test_layers_of_torch(ranks):
    def whole(dtype):
        model, x = work.make_layers(dtype)
        return model(x).detach()

    for out in ranks.run(work.run_layers, "zigzag", ranks=3):
        assert_parity(out, whole(torch.float64), whole(torch.float32))


@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
def test_a_call_with_a_block_mask(ranks, balance):
    def whole(dtype):
        qkv, block_mask, dout = work.make_block_mask_call(dtype)
        out = fastattn.attention(*qkv, block_mask=block_mask)
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    exact, plain = whole(torch.float64), whole(torch.float32)
    for found in ranks.run(work.run_block_mask, balance, ranks=3):
        for name, *results in zip(("out", "dq", "dk", "dv"), found, exact, plain, strict=True):
            assert_parity(*results, name)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_of_divided_heads_and_tokens(ranks, packed):
    exact, plain = (
        work.drop_out(qkv, 0, packed, options)
        for qkv, options in (work.make_dropout_call(packed, dtype) for dtype in (torch.float64, torch.float32))
    )
    for heads, found in ranks.run(work.divided_dropout, packed, ranks="2x2"):
        assert_parity(found, *(x.chunk(2, 1)[heads] for x in (exact, plain)))


@pytest.mark.parametrize(
    ("kind", "balance", "count"), [("llama", "zigzag", 2), ("llama", "documents", 3), ("mistral", "striped", 3)]
)
def test_models_of_transformers(ranks, kind, balance, count):
    pytest.importorskip("transformers")
    parts = ranks.run(work.divided_llama, kind, balance, ranks=count)
    check_step(parts, work.whole_llama(kind, torch.float64), work.whole_llama(kind))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("weights", "need_weights: expected a sequence that is not divided among processes, got True"),
        ("cache", "k_cache: expected a sequence that is not divided among processes, got a KV cache"),
        ("last", "last: expected a sequence that is not divided"),
        ("length", "tokens: expected [5, 4] on ranks 0 to 1, as shard cuts them with balance='contiguous', got [4, 5]"),
        ("mask", "mask, bias: expected all 8 keys in the last dimension, got 4 on rank 0"),
    ],
)
def test_refusals(ranks, kind, text):
    for good, answer in ranks.answers(work.refused_inside, kind, ranks=2):
        assert not good and text in answer, answer


def test_an_error_ends_it(ranks):
    assert all(ranks.run(work.outside_after_an_error, ranks=2))


def test_a_batch_of_different_lengths(ranks):
    batch = {"tokens": torch.zeros(1, 4), "labels": torch.zeros(1, 5)}
    for good, answer in ranks.answers(work.shard_a_batch, batch, ranks=2):
        assert not good and "batch: expected the same length in dimension -1 of each, got {'tokens': 4" in answer


def test_what_there_is_not():
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, got str"):
        fd.context_parallel("cp")  # pyright: ignore[reportArgumentType]
