"""Attention over a divided sequence is attention over the whole, by the one rule, on every rank and strategy."""

import itertools
from typing import Any

import pytest
import torch

import fastattn.distributed as fd
from tests.support import ranks_work as work
from tests.support.pairwise import pairwise

STRATEGIES = ("ring", "all_gather", "ulysses")
BALANCES = ("contiguous", "zigzag", "striped")
CAUSAL = {"causal": True}
CASES = {
    "plain": {},
    "causal": {"options": CAUSAL},
    "window": {"options": {"window": (6, 3)}},
    "causal_window": {"options": {"causal": True, "window": (7, None)}},
    "gqa": {"options": CAUSAL, "kv_heads": 2},
    "one_key_head": {"options": {"window": (9, 0)}, "kv_heads": 1, "v_dim": 5},
    "bias": {"options": CAUSAL, "bias": (1, 1, 1, 1), "kv_heads": 2},
    "bias_by_key": {"bias": (0, 1, 0, 1)},
    "bias_by_row": {"bias": (1, 0, 1, 0), "options": CAUSAL},
    "mask": {"mask": True, "options": CAUSAL},
    "alibi": {"alibi": True, "options": CAUSAL},
    "alibi_both_sides": {"alibi": True, "kv_heads": 2},
    "softcap": {"options": {"softcap": 2.0, "causal": True}},
    "sinks": {"sinks": True, "options": {"window": (5, 0)}},
    "everything": {
        "options": {"causal": True, "window": (19, None), "softcap": 3.0, "scale": 0.3}, "bias": (0, 1, 1, 1),
        "mask": True, "alibi": True, "sinks": True, "kv_heads": 2,
    },
    "dropout": {"options": {"causal": True, "dropout_p": 0.3}, "kv_heads": 2},
    "dropout_with_the_rest": {
        "options": {"window": (19, 4), "dropout_p": 0.5, "softcap": 3.0}, "bias": (0, 1, 1, 1), "mask": True,
        "sinks": True, "q_heads": 6, "kv_heads": 2,
    },
    "kv_start": {"options": {"causal": True, "kv_start": torch.tensor([22, 3])}, "kv_len": 38},
    "kv_start_with_the_rest": {
        "options": {"window": (19, 4), "dropout_p": 0.5, "kv_start": torch.tensor([37, 14])}, "bias": (0, 1, 1, 1),
        "mask": True, "sinks": True, "kv_len": 37, "kv_heads": 2,
    },
    "offsets": {"options": {"window": (6, 3), "q_offset": torch.tensor([-3, 6])}, "kv_len": 41},
    "offsets_out_of_sight": {"options": {"causal": True, "q_offset": torch.tensor([-60, 50])}, "alibi": True},
    "offsets_with_the_rest": {
        "options": {
            "causal": True, "window": (17, None), "q_offset": torch.tensor([7, -2]), "kv_start": torch.tensor([0, 14]),
            "dropout_p": 0.2,
        }, "bias": (1, 1, 1, 1), "mask": True, "sinks": True, "alibi": True, "kv_heads": 2,
    },
    "alibi_to_one_side": {"options": {"window": (15, -3)}, "alibi": True, "kv_heads": 1},
    "more_keys": {"q_len": 11, "kv_len": 30, "options": CAUSAL},
    "more_queries": {"q_len": 23, "kv_len": 9, "options": CAUSAL},
    "offset": {"options": {"causal": True, "q_offset": -7}},
    "tiny": {"q_len": 3, "kv_len": 2},
    "six_heads": {"q_heads": 6, "kv_heads": 2, "options": CAUSAL},
    "half": {"dtype": torch.bfloat16, "options": CAUSAL, "kv_heads": 2},
    "double": {"dtype": torch.float64, "options": CAUSAL, "sinks": True},
}  # fmt: skip
SIZES = dict(zip(CASES, itertools.cycle((2, 3, 4)), strict=False))


@pytest.mark.parametrize(("name", "strategy", "balance"), pairwise(CASES, STRATEGIES, BALANCES))
def test_the_whole(ranks, strategy, balance, name):
    case = {**CASES[name], "strategy": strategy, "balance": balance}
    work.check(case, ranks.run(work.attend, case, ranks=SIZES[name]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_than_tokens_and_heads(ranks, strategy):
    case = {"strategy": strategy, "balance": "zigzag", "q_len": 3, "kv_len": 3, "q_heads": 2, "kv_heads": 1}
    work.check(case, ranks.run(work.attend, case))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_keys_or_no_queries(ranks, strategy):
    for sizes in ({"kv_len": 0}, {"q_len": 0}):
        case = {"strategy": strategy, "balance": "zigzag", "mask": True, "bias": (0, 1, 1, 1), "sinks": True, **sizes}
        work.check(case, ranks.run(work.attend, case, ranks=2))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends(ranks, strategy, backend, needs_cpu_library):
    for name in ("everything", "dropout_with_the_rest"):
        case = {**CASES[name], "strategy": strategy, "balance": "zigzag", "backend": backend}
        work.check(case, ranks.run(work.attend, case, ranks=3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank(ranks, strategy):
    case = {**CASES["everything"], "strategy": strategy, "balance": "zigzag"}
    work.check(case, ranks.run(work.attend, case, ranks=1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_bits_each_time(ranks, strategy):
    case = {**CASES["everything"], "strategy": strategy, "balance": "zigzag"}
    assert all(ranks.run(work.attend_twice, case))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_out_alone(ranks, strategy):
    assert all(ranks.run(work.out_alone, strategy, ranks=3))
    assert strategy == "ulysses" or all(ranks.run(work.out_alone, strategy, ranks="2x2"))


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_what_no_row_sees_is_not_sent(ranks, strategy):
    piece = 2 * 16 * (8 + 8) * 4  # heads, tokens, numbers, bytes
    alone = {"strategy": strategy, "window": (3, 3)}
    assert [n for _, n in ranks.run(work.traffic, alone)] == [1, 2, 2, 1]  # neighbours
    assert ranks.run(work.traffic, {"strategy": strategy, "window": (16, 0)}) == [(0, 0), *[(piece, 1)] * 3]
    assert ranks.run(work.traffic, {"strategy": strategy, "causal": True}) == [(i * piece, i) for i in range(4)]
    # Zigzag: the front run of every other rank, and the back run of those before which one's own back run lies.
    even = ranks.run(work.traffic, {"strategy": strategy, "causal": True, "balance": "zigzag"})
    assert even == [((3 + 3 - i) * piece // 2, 3 + 3 - i) for i in range(4)]
    late = {"strategy": strategy, "causal": True, "kv_start": torch.tensor([31])}  # the first rank's keys are before it
    assert [n for _, n in ranks.run(work.traffic, late)] == [0, 0, 1, 2]
    # A key stands where rows of the second rank begin to see it; those before it see no key at all.
    ahead = {"strategy": strategy, "causal": True, "q_offset": torch.tensor([-16])}
    assert [n for _, n in ranks.run(work.traffic, ahead)] == [0, 1, 2, 3]


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("length", [0, 1, 5, 16])
def test_shard_and_unshard(ranks, balance, length):
    found = ranks.run(work.round_trip, length, balance)
    assert all(same for _, same in found) and sum(n for n, _ in found) == length


@pytest.mark.parametrize("size", [3, "2x2"])
def test_headers_are_exchanged_where_a_rank_has_a_new_one(ranks, size):
    """19 and 20 tokens, or 37 and 38, are the same number on the first rank: it knows its header, another does not."""
    first, second = (19, 20) if size == 3 else (37, 38)
    for found in ranks.run(work.calls_of_lengths, [first, first, second, first, first], ranks=size):
        assert all(right for right, _ in found)
        assert [new for _, new in found[1:]] == [False, True, True, False]


# Errors


@pytest.mark.parametrize("function", [fd.shard, fd.unshard])
@pytest.mark.parametrize("dim", [-3, 2, 7])
def test_a_dimension_that_x_does_not_have(function, dim):
    """Named before anything is sent: no rank waits for another."""
    no_mesh: Any = None
    with pytest.raises(ValueError, match=f"^dim: expected a dimension of x, -2 to 1, got {dim}$"):
        function(torch.zeros(4, 3), mesh=no_mesh, dim=dim)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("length", "q.shape[2]: expected [7, 6, 6] tokens on ranks 0 to 2 with balance='contiguous', got [6, 7, 6]"),
        ("dtype", "q, k, v: expected the same sizes, except lengths, on every rank"),
        ("heads", "q (1, 4, 6, 8) k (1, 4, 6, 8) v (1, 4, 6, 8) float32 on rank 1"),
        ("start", "expected the same options on every rank, got strategy=None"),
        ("start beyond", "kv_start: expected 0 to 18, got 19 for batch entry 0"),
        ("options", "causal=True"),
        ("keys", "mask, bias: expected all 18 keys in the last dimension, got 24 on rank 1"),
        ("error", "ValueError: sinks.shape: expected (2,) for 2 query heads, got (3,)"),
    ],
)
def test_ranks_that_differ_are_refused_on_every_rank(ranks, kind, text):
    for rank, (good, answer) in enumerate(ranks.answers(work.differing, kind, ranks=3)):
        assert not good and text in answer, answer
        if kind == "error" and rank != 1:
            assert answer.startswith(f"RuntimeError: context parallel, rank {rank} of 3: rank 1 raised")
    assert ranks.run(work.small_call, ranks=3)  # and the group goes on


@pytest.mark.parametrize("when", ["call", "backward"])
def test_a_rank_that_raises_does_not_hang_the_others(ranks, when):
    found = ranks.answers(work.missing, when)
    assert "on purpose" in found[2][1]
    named = 0
    for rank in (0, 1, 3):
        good, text = found[rank]
        assert not good and text.startswith("RuntimeError: context parallel, rank"), text
        named += "rank 2 raised, ended, or did not make this call" in text
    assert named  # those behind it in the ring may be waiting for one who waits


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 1.1}, "dropout_p: expected"),
        ({"strategy": "star"}, "strategy: expected one of 'ring', 'all_gather', 'ulysses' or None, got 'star'"),
        ({"balance": "even"}, "balance: expected one of 'contiguous', 'zigzag', 'striped', 'documents', got 'even'"),
        ({"q_offset": torch.zeros(2, dtype=torch.int64)}, "q_offset.shape: expected (B,) == (1,), got (2,)"),
        ({"seqused_k": torch.ones(1, dtype=torch.int64)}, "seqused_k: expected None without cu_seqlens_q"),
        ({"is_causal": True}, "unexpected keyword argument 'is_causal'; here it is causal"),
        ({"backend": "torch", "strategy": "ring"}, "backend 'torch' cannot serve this call: it does not return lse"),
    ],
)
def test_refusals(ranks, options, text):
    for good, answer in ranks.answers(work.call_with, options, ranks=2):
        assert not good and text in answer


# The choice


def test_the_choice_and_its_reasons(ranks):
    choices = ranks.run(work.explained, {"causal": True, "balance": "zigzag"})
    assert len({str(choice) for choice in choices}) == 1
    choice = choices[0]
    assert choice.strategy == min(choice.costs, key=lambda name: choice.costs[name].seconds)
    text = str(choice)
    assert "4 ranks, zigzag; whole q (1, 8, 32768, 64)" in text and "<- chosen" in text and "hops" in text
    why = text.splitlines()[-1]  # of the others, what they take and what of it is more
    assert why.startswith(f"  {choice.strategy} takes {choice.costs[choice.strategy].seconds * 1e3:.3f} ms; ")
    assert all(f"{x} {choice.costs[x].seconds * 1e3:.3f} ms (" in why for x in choice.costs if x != choice.strategy)
    assert "more waiting" in why or "more work" in why
    asked = ranks.run(work.explained, {"strategy": "ulysses"})[0]
    assert asked.strategy == "ulysses" and "<- asked for" in str(asked) and " takes " not in str(asked)


def test_the_choice_follows_the_link(ranks):
    slow, near = fd.Link(bandwidth=1e8), {"window": (64, 0)}
    assert ranks.run(work.explained, {**near, "link": slow})[0].strategy != "ulysses"
    late = fd.Link(latency=1.0, bandwidth=1e15)
    assert ranks.run(work.explained, {"link": late, "balance": "zigzag"})[0].strategy == "all_gather"


def test_bytes_of_the_model_are_those_that_are_sent(ranks):
    for strategy, options in itertools.product(("ring", "all_gather"), ({"causal": True}, {"window": (3, 3)}, {})):
        sent = max(n for n, _ in ranks.run(work.traffic, {**options, "strategy": strategy}))
        choice = ranks.run(work.model_of_traffic, options)[0]
        assert choice.costs[strategy].bytes == sent
