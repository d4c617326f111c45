"""Attention on DTensors whose batch and heads are divided is attention, by the one rule."""

import pytest
import torch
import torch.distributed.tensor

from fastattn.testing import assert_parity
from tests.support import ranks_sharding as work

HEADS, BATCH, SAME, SUM = ("heads",), ("batch",), ("same",), ("sum",)
ALL = {
    "options": {"causal": True, "window": (19, None), "softcap": 3.0, "scale": 0.3}, "bias": (0, 1, 1, 1),
    "mask": True, "alibi": True, "sinks": True, "kv_heads": 2,
}  # fmt: skip
CASES = {
    "heads": {"places": (HEADS, HEADS, HEADS)},
    "batch": {"places": (BATCH, BATCH, BATCH), "options": {"causal": True}},
    "uneven_batch": {"places": (BATCH, BATCH, BATCH), "batch": 3, "bias": (1, 0, 0, 1)},
    "one_batch_entry": {"places": (BATCH, BATCH, BATCH), "batch": 1, "bias": (1, 1, 1, 1), "sinks": True},
    "not_divided": {"places": (SAME, SAME, SAME), "sinks": True},
    "keys_decide": {"places": (SAME, HEADS, SAME), "kv_heads": 2},
    "query_decides": {"places": (HEADS, BATCH, SAME)},
    "a_sum": {"places": (SUM, HEADS, SUM)},
    "one_key_head": {"places": (HEADS, SAME, SAME), "kv_heads": 1},
    "key_heads_do_not_divide": {"places": (HEADS, HEADS, SAME), "q_heads": 6, "kv_heads": 3},
    "all_by_heads": {**ALL, "places": (HEADS, HEADS, HEADS), "bias_places": HEADS, "mask_places": SAME},
    "all_by_batch": {**ALL, "places": (BATCH, BATCH, BATCH), "mask_places": BATCH},
    "bias_of_all": {"places": (HEADS, HEADS, HEADS), "bias": (1, 0, 1, 1), "options": {"causal": True}},
    "dropout": {
        **ALL, "places": (("batch", "heads"),) * 3, "options": {"causal": True, "dropout_p": 0.3}, "ranks": 4,
    },
    "heads_twice": {"places": (("heads", "heads"),) * 3, "kv_heads": 2, "ranks": 4, "alibi": True},
    "block_mask": {"places": (("batch", "heads"),) * 3, "mask": True, "block_mask": True, "ranks": 4},
    "half": {"places": (HEADS, HEADS, HEADS), "dtype": torch.bfloat16, "kv_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_whole(ranks, name):
    case = CASES[name]
    found = ranks.run(work.attend, case, ranks=case.get("ranks", 2))
    work.check(case, found)
    kinds = {"heads": "S(1)", "batch": "S(0)"}
    wanted = [next((p for p in at if p in kinds), None) for at in zip(*case["places"], strict=True)]
    assert found[0][1] == [kinds.get(p, "R") for p in wanted]


@pytest.mark.parametrize("name", ["all_by_heads", "dropout", "one_key_head"])
def test_compiled(ranks, name):
    case = {**CASES[name], "compiled": True}
    work.check(case, ranks.run(work.attend, case, ranks=case.get("ranks", 2)))
    if name == "all_by_heads":  # the second time for all lengths
        case |= {"q_len": 21, "kv_len": 43}
        work.check(case, ranks.run(work.attend, case, ranks=2))


def test_backends(ranks, needs_cpu_library):
    case = {**CASES["dropout"], "backend": "cpu"}
    work.check(case, ranks.run(work.attend, case))


def test_packed_sequences(ranks):
    assert ranks.run(work.packed, "reference", ranks=2) == [0.0, 0.0]


def test_the_signature_of_pytorch_and_explain(ranks):
    assert ranks.run(work.torch_signature, ranks=2) == [(True, "torch")] * 2


@pytest.mark.skipif(
    not hasattr(torch.distributed.tensor._redistribute, "NestedRedistribute"),
    reason="this PyTorch's DTensors have no second derivative",
)
def test_second_derivative(ranks):
    exact, eager = (work.second_derivative(None, dtype) for dtype in (torch.float64, torch.float32))
    for found in ranks.run(work.second_derivative, torch.float32, ranks=2):
        for name, *gradients in zip("qkv", found, exact, eager, strict=True):
            assert_parity(*gradients, name=name)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sequence", "ValueError: q.placements: expected batch or heads divided, got S(2), the sequence of (batch, "
         "heads, length, head_dim); fastattn.distributed.context_parallel_attention"),
        ("head_dim", "ValueError: q.placements: expected Shard(0), Shard(1), Replicate() or Partial()"),
        ("plain_key", "TypeError: k: expected a DTensor like the query, got a plain Tensor"),
        ("plain_query", "TypeError: k: expected a plain Tensor like the query, got a DTensor"),
        ("plain_bias", "TypeError: bias: expected a DTensor like the query, got a plain Tensor"),
        ("divided_bias", "TypeError: bias: expected a plain Tensor like the query, got a DTensor"),
        ("heads", "ValueError: q.shape[1]: expected a multiple of the 2 ranks that share the heads, got 3"),
        ("cache", "TypeError: q: expected a plain Tensor, got a DTensor"),
        ("mesh", "ValueError: k.device_mesh: expected q.device_mesh =="),
    ],
)  # fmt: skip
def test_refusals(ranks, kind, text):
    for good, answer in ranks.answers(work.refused, kind, ranks=2):
        assert not good and text in answer, answer
