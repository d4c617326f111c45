"""A mesh of two dimensions: keys and values go along the first, tokens and heads change places along the second."""

import pytest
import torch

import fastattn.distributed as fd
from tests.distributed.test_context_parallel import BALANCES, CASES
from tests.support import ranks_work as work

STRATEGIES = ("ring", "all_gather")
MORE = {
    "a_rank_without_heads": {"q_heads": 1, "kv_heads": 1, "options": {"causal": True}, "bias": (0, 1, 1, 1)},
    "three_heads": {"q_heads": 3, "kv_heads": 1, "options": {"causal": True, "dropout_p": 0.4}},
}


@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole(ranks, strategy, name):
    # Each case and strategy with one of the shards, which the cases take in turn.
    balance = BALANCES[([*CASES, *MORE].index(name) + STRATEGIES.index(strategy)) % 3]
    case = {**CASES, **MORE}[name] | {"strategy": strategy, "balance": balance}
    work.check(case, ranks.run(work.attend, case, ranks="2x2"))


@pytest.mark.parametrize("balance", BALANCES)
def test_everything_by_the_choice(ranks, balance):
    for name in ("everything", "dropout_with_the_rest", "tiny"):
        case = {**CASES[name], "strategy": None, "balance": balance}
        work.check(case, ranks.run(work.attend, case, ranks="2x2"))


def test_the_same_bits_each_time(ranks):
    case = {**CASES["everything"], "strategy": "ring", "balance": "zigzag"}
    assert all(ranks.run(work.attend_twice, case, ranks="2x2"))


@pytest.mark.parametrize("length", [0, 3, 17])
def test_shard_and_unshard(ranks, length):
    for balance in BALANCES:
        found = ranks.run(work.round_trip, length, balance, ranks="2x2")
        assert all(same for _, same in found) and sum(n for n, _ in found) == length


def test_the_choice_says_why_not(ranks):
    choices = ranks.run(work.explained, {"balance": "zigzag", "causal": True}, ranks="2x2")
    assert len({str(choice) for choice in choices}) == 1
    assert choices[0].refused == {"ulysses": "the second dimension of the mesh divides heads"}
    slow = ranks.run(work.explained, {"balance": "zigzag", "link": fd.Link(bandwidth=1e6)}, ranks="2x2")[0]
    row, width = 2 * 8192, 64 * 2  # tokens of a row of the mesh, bytes of a vector
    swapped = row * 3 * 4 * width // 2 + row // 2 * 8 * width // 2  # q, k, v of 4 heads there; out of 8 back
    assert slow.costs["all_gather"].bytes == swapped + row * 2 * 4 * width  # and keys and values of the other row


def test_refusals(ranks):
    for good, text in ranks.answers(work.call_with, {"strategy": "ulysses"}, ranks="2x2"):
        assert not good and "strategy: expected 'ring', 'all_gather' or None, got 'ulysses'" in text


@pytest.mark.parametrize("kind", ["length", "error"])
def test_ranks_that_differ_are_refused_on_every_rank(ranks, kind):
    texts = {
        "length": "q.shape[2]: expected [7, 6, 6, 6] tokens on ranks 0 to 3",
        "error": "sinks.shape: expected (2,)",
    }
    for rank, (good, answer) in enumerate(ranks.answers(work.differing, kind, ranks="2x2")):
        assert not good and texts[kind] in answer, answer
        if kind == "error" and rank != 1:
            assert answer.startswith(f"RuntimeError: context parallel, rank {rank} of 4: rank 1 raised")
    assert torch.is_tensor(ranks.run(work.small_call, ranks="2x2")[0])
