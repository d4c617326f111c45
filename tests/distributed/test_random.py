"""Calls drawn at random: mesh, strategy, shards, lengths and features, against the whole in one process."""

import itertools
import random

import pytest
import torch

from fastattn.distributed.layout import BALANCES
from tests.distributed.test_context_parallel import STRATEGIES
from tests.support import ranks_work as work


def draw(seed):
    """(case, ranks) of `tests.support.ranks_work.attend`; any of them is a call that is taken."""
    rng = random.Random(seed)
    ranks = rng.choice([1, 2, 3, 4, "2x2"])
    kv_heads = rng.choice([1, 2, 3])
    case = {
        "seed": seed, "strategy": rng.choice(STRATEGIES if ranks != "2x2" else STRATEGIES[:2]),
        "q_heads": kv_heads * rng.choice([1, 2]), "kv_heads": kv_heads, "v_dim": rng.choice([4, 8]),
        "q_len": rng.randrange(1, 45), "kv_len": rng.randrange(1, 45), "balance": rng.choice(BALANCES[:3]),
        "sinks": rng.random() < 0.3,
    }  # fmt: skip
    options = {"causal": rng.random() < 0.6}
    if rng.random() < 0.4:
        options["window"] = tuple(rng.choice([None, rng.randrange(12)]) for _ in range(2))
    if rng.random() < 0.3:
        options["q_offset"] = rng.randrange(-5, 20)
    if rng.random() < 0.3:
        options["softcap"] = 2.5
    if rng.random() < 0.3:
        options["dropout_p"] = 0.3
    case["alibi"] = rng.random() < 0.3
    kind = rng.randrange(4)
    if kind == 0:
        case |= {"bias": tuple(rng.randrange(2) for _ in range(4)), "mask": rng.random() < 0.5}
    if kind == 1:
        case |= {"tiles": (1, rng.choice([1, case["q_heads"]])), "q_len": case["q_len"] + 120, "batch": 1}
    if kind == 2:  # documents of some lengths, 0 among them, and tokens of none
        cuts = sorted(rng.randrange(case["q_len"] + 1) for _ in range(rng.randrange(1, 6)))
        case |= {"documents": (0, *cuts), "kv_len": case["q_len"], "balance": rng.choice(BALANCES)}
    entries = len(case["documents"]) - 1 if "documents" in case else case.get("batch", 2)
    if rng.random() < 0.3:
        options["kv_start"] = torch.tensor([rng.randrange(8) for _ in range(entries)]).clamp(max=case["kv_len"])
        if "documents" in case:
            longest = max(b - a for a, b in itertools.pairwise(case["documents"]))
            options["kv_start"].clamp_(max=longest)
        options["q_offset"] = torch.tensor([rng.randrange(-5, 20) for _ in range(entries)])
    if "documents" in case and rng.random() < 0.3:
        lengths = [b - a for a, b in itertools.pairwise(case["documents"])]
        options["seqused_k"] = torch.tensor([rng.randrange(n + 1) for n in lengths])
    return case | {"options": options}, ranks


@pytest.mark.parametrize("seed", range(24))
def test_a_call(ranks, seed):
    case, size = draw(seed)
    case["dtype"] = torch.float64 if seed % 4 == 3 else torch.float32
    work.check(case, ranks.run(work.attend, case, ranks=size))
