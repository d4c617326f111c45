"""Packed documents over a divided sequence, which shards may cut, are the documents in one process."""

import itertools

import pytest
import torch

from fastattn.distributed.layout import BALANCES, Documents, View, pairs_of, parts, pieces
from fastattn.flops import allowed_pairs
from tests.support import ranks_work as work

STRATEGIES = ("ring", "all_gather", "ulysses")
CAUSAL = {"causal": True}
DOCUMENTS = (0, 5, 5, 6, 20, 31, 35)  # of 37 tokens: the last two are of none, and the second document is empty
KEYS = (0, 3, 9, 9, 20, 28, 30)
CASES = {
    "plain": {},
    "causal": {"options": CAUSAL, "kv_heads": 2},
    "window": {"options": {"window": (4, 2)}},
    "sinks_and_softcap": {"options": {"causal": True, "window": (6, None), "softcap": 2.0}, "sinks": True},
    "alibi": {"options": CAUSAL, "alibi": True},
    "slopes_of_documents": {"options": CAUSAL, "slopes_of_documents": True, "kv_heads": 1},
    "dropout": {"options": {"causal": True, "dropout_p": 0.3}, "kv_heads": 2},
    "other_keys": {"options": CAUSAL, "key_documents": KEYS, "kv_len": 33},
    "offset": {
        "options": {"causal": True, "window": (7, None), "q_offset": 1, "dropout_p": 0.2},
        "key_documents": KEYS,
    },
    "offsets": {
        "options": {"window": (7, 3), "q_offset": torch.tensor([2, 0, -1, 9, -4, 1]), "dropout_p": 0.2},
        "slopes_of_documents": True,
    },
    "used": {
        "options": {"causal": True, "seqused_k": torch.tensor([2, 6, 0, 7, 8, 1])},
        "key_documents": KEYS,
        "kv_len": 33,
        "alibi": True,
        "kv_heads": 2,
    },
    "used_from": {
        "options": {
            "seqused_k": torch.tensor([3, 0, 1, 9, 11, 3]),
            "kv_start": torch.tensor([1, 0, 0, 12, 2, 0]),
            "q_offset": torch.tensor([2, 0, 1, 9, -4, 1]),
            "window": (9, 2),
        },
    },
    "one": {"options": CAUSAL, "documents": (0, 37)},
    "many": {"options": CAUSAL, "documents": tuple(range(38)), "slopes_of_documents": True},
}
SIZES = dict(zip(CASES, itertools.cycle((2, 3, 4, "2x2")), strict=False))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole(ranks, strategy, name):
    turn = [*CASES].index(name) + STRATEGIES.index(strategy)  # each case with some of the shards
    for balance in (BALANCES[turn % 4], BALANCES[(turn + 1) % 4])[: 1 if name == "many" else 2]:
        case = {"documents": DOCUMENTS, **CASES[name], "strategy": strategy, "balance": balance}
        size = SIZES[name] if strategy != "ulysses" or SIZES[name] != "2x2" else 4
        work.check(case, ranks.run(work.attend, case, ranks=size))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends(ranks, backend, needs_cpu_library):
    for name, balance in (("dropout", "documents"), ("window", "striped"), ("offset", "zigzag")):
        case = {"documents": DOCUMENTS, **CASES[name], "strategy": "ring", "balance": balance, "backend": backend}
        work.check(case, ranks.run(work.attend, case, ranks=3))


def test_ranks_of_other_documents_get_no_message(ranks):
    piece = 2 * 16 * (8 + 8) * 4  # heads, tokens, numbers, bytes
    for strategy in ("ring", "all_gather"):
        options = {"strategy": strategy, "causal": True, "cu_seqlens_q": torch.tensor([0, 16, 40, 64])}
        assert ranks.run(work.traffic, options) == [(0, 0), (0, 0), (piece, 1), (piece, 1)]


def test_varlen_inside_of_a_division(ranks):
    assert all(ranks.run(work.packed_inside, [5, 6], ranks=3))
    for good, text in ranks.answers(work.packed_inside, [6, 6], ranks=2):
        assert not good and "seqused_k: expected 0 to the 5 keys of sequence 0, got 6" in text


def lengths_of(starts):
    return [b - a for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("ranks_and_length", [(4, 4096), (7, 1000)])
def test_work_is_even(ranks_and_length):
    count, length = ranks_and_length
    g = torch.Generator().manual_seed(0)
    starts = (0, *sorted(torch.randint(1, length, (9,), generator=g).tolist()), length)
    view = View(None, None, 0, Documents(starts, starts))
    whole = sum(allowed_pairs(n, n, None, 0) for n in lengths_of(starts))
    loads = {}
    for balance in BALANCES:
        cut = pieces(balance, length, count, starts)
        assert sorted(t for own in cut for piece in own for t in range(length)[piece.positions]) == [*range(length)]
        keys = [piece for own in cut for piece in own]
        each = [sum(pairs_of(part) for x in own for y in keys for part in parts(x, y, view)) for own in cut]
        assert sum(each) == whole
        loads[balance] = max(each) * count / whole
    assert loads["documents"] < min(loads["contiguous"], loads["zigzag"]) and loads["documents"] < 1.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"cu_seqlens_q": torch.tensor([0, 13])},
            "cu_seqlens_q: expected at most 12, the tokens of all ranks, at the end",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 5, 4])}, "cu_seqlens_q: expected to rise from 0"),
        ({"cu_seqlens_q": [0, 12]}, "cu_seqlens_q: expected a Tensor, got list"),
        ({"cu_seqlens_k": torch.tensor([0, 12])}, "cu_seqlens_k: expected None without cu_seqlens_q, got a Tensor"),
        ({"cu_seqlens_q": torch.tensor([0, 12]), "bias": torch.zeros(6, 12)}, "bias: expected None with cu_seqlens_q"),
        (
            {"cu_seqlens_q": torch.tensor([0, 12]), "seqused_k": torch.tensor([13])},
            "seqused_k: expected 0 to the 12 keys of sequence 0, got 13",
        ),
        ({"balance": "documents"}, "'striped' without cu_seqlens_q, got 'documents'"),
    ],
)
def test_refusals(ranks, options, text):
    for good, answer in ranks.answers(work.call_with, options, ranks=2):
        assert not good and text in answer, answer


def test_documents_that_differ(ranks):
    for good, answer in ranks.answers(work.differing, "documents", ranks=2):
        assert not good and "expected the same options on every rank" in answer and "documents " in answer
