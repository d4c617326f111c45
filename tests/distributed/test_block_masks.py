"""Block masks over a divided sequence are block masks of the whole, and their empty tiles cost no message."""

import pytest
import torch

from fastattn import BlockMask
from fastattn.block_mask import BLOCK
from fastattn.distributed.blocks import cut
from fastattn.distributed.layout import Piece
from tests.distributed.test_context_parallel import BALANCES, STRATEGIES
from tests.support import ranks_work as work

ODD = {"tiles": (1, 1), "q_len": 300, "kv_len": 300, "q_heads": 2, "kv_heads": 1, "batch": 1}
CASES = {
    "plain": {},
    "causal_dropout": {"options": {"causal": True, "dropout_p": 0.3}},
    "heads_and_window": {"tiles": (1, 2), "options": {"window": (150, 40)}, "sinks": True},
    "more_keys_bias": {"tiles": (1, 2), "q_len": 140, "kv_len": 270, "bias": (0, 1, 1, 1), "mask": True},
    "batch_softcap": {"tiles": (2, 1), "batch": 2, "q_len": 170, "kv_len": 140, "options": {"softcap": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole(ranks, strategy, name):
    turn = [*CASES].index(name) + STRATEGIES.index(strategy)  # each case with two of the shards, and of the meshes
    for number in (turn, turn + 1):
        sizes = (2, 4, 3) if strategy == "ulysses" else (2, "2x2", 3)
        case = {**ODD, **CASES[name], "strategy": strategy, "balance": BALANCES[number % 3]}
        work.check(case, ranks.run(work.attend, case, ranks=sizes[(number // 2) % 3]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends(ranks, backend, needs_cpu_library):
    case = {**ODD, **CASES["heads_and_window"], "strategy": "ring", "balance": "zigzag", "backend": backend}
    work.check(case, ranks.run(work.attend, case, ranks=3))


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (Piece(0, 128), Piece(128, 172)),
        (Piece(0, 300), Piece(256, 44)),
        (Piece(37, 200), Piece(129, 171)),
        (Piece(1, 100, 3), Piece(1, 150, 2)),
        (Piece(0, 2, 150), Piece(299, 1)),
    ],
)
def test_a_part_is_the_part_of_the_mask(rows, keys):
    dense = work.in_tiles(2, 2, 300, 300, torch.Generator().manual_seed(1))
    part = cut(BlockMask.from_mask(dense), rows, keys)
    assert torch.equal(part.to_dense(), dense[:, :, rows.positions, keys.positions])
    again = BlockMask.from_mask(dense[:, :, rows.positions, keys.positions])
    assert len(part.tensors.pool) == len(again.tensors.pool)  # tiles that are empty or full in the part are not kept
    assert torch.equal(part.tensors.table.clamp(max=2), again.tensors.table.clamp(max=2))


def test_a_part_is_made_once():
    mask = BlockMask.from_mask(torch.ones(10, 10, dtype=torch.bool))
    assert cut(mask, Piece(0, 5), Piece(5, 5)) is cut(mask, Piece(0, 5), Piece(5, 5))


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_empty_tiles_are_not_sent(ranks, strategy):
    piece = 2 * BLOCK * (8 + 8) * 4  # heads, tokens, numbers, bytes
    found = ranks.run(work.traffic_of_blocks, strategy, [[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert found == [(piece, 1), (0, 0), (2 * piece, 2), (0, 0)]


def test_the_choice_counts_the_tiles_that_are_not_empty(ranks):
    text, costs, dense = ranks.run(work.choice_of_blocks, ranks=2)[0]
    assert "block mask, 75.0% of its tiles empty" in text
    for name, cost in costs.items():
        assert 0.0 < cost.compute <= dense[name].compute
    assert costs["ulysses"].compute == dense["ulysses"].compute / 4


# Errors


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("dense", "block_mask: expected a fastattn.BlockMask or None, got Tensor; a dense mask goes to mask="),
        ("length", "(B, Hq, Lq, Lk) == (1, 2, 12, 12), got (1, 1, 6, 12)"),
        ("heads", "block_mask.shape: expected (B or 1, Hq or 1, Lq, Lk)"),
        ("documents", "block_mask: expected None with cu_seqlens_q, got a BlockMask"),
        ("other", "expected the same options on every rank"),
    ],
)
def test_refusals(ranks, kind, text):
    for good, answer in ranks.answers(work.refused_blocks, kind, ranks=2):
        assert not good and text in answer, answer
