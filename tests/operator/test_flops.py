"""FLOPs of the operators, as PyTorch's counter counts them when given fastattn's formulas."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import attention, attention_varlen, attention_with_kvcache
from fastattn.flops import FORMULAS, allowed_pairs
from tests.support.attention_cases import SINGLE, make_mask, make_qkv


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (5, 5), (3, 9), (9, 3), (0, 4)])
@pytest.mark.parametrize("q_offset", [-4, 0, 1, 6, 20])
@pytest.mark.parametrize(
    "left, right", [(None, None), (None, 0), (2, None), (2, 0), (1, 3), (0, 0), (-2, 1), (3, -1), (None, 10**9)]
)
def test_pairs_are_counted_by_the_position_rule(q_len, kv_len, left, right, q_offset):
    def allowed(i, j):
        position = i + q_offset
        return (left is None or j >= position - left) and (right is None or j <= position + right)

    pairs = sum(allowed(i, j) for i, j in itertools.product(range(q_len), range(kv_len)))
    assert allowed_pairs(q_len, kv_len, left, right, q_offset) == pairs


def test_pairs_are_not_counted_one_by_one():
    length = 1 << 40
    assert allowed_pairs(length, length, None, 0) == length * (length + 1) // 2


def counted(function):
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        result = function()
    return counter.get_total_flops(), result


# q (2, 4, 6, 8), k (2, 2, 8, 8), v (2, 2, 8, 10): pairs by hand
OPTIONS = [
    ({}, 6 * 8),
    ({"causal": True}, 3 + 4 + 5 + 6 + 7 + 8),  # the last query sees all
    ({"causal": True, "q_offset": 0}, 1 + 2 + 3 + 4 + 5 + 6),
    ({"window": (1, 0)}, 6 * 2),
    ({"window": (2, 1), "q_offset": 0}, 2 + 3 + 4 + 4 + 4 + 4),
    ({"causal": True, "q_offset": torch.tensor([0, 2])}, 6 * 8),
    ({"mask": make_mask("cpu", (6, 8))}, 6 * 8),
    ({"dropout_p": 0.5, "softcap": 3.0}, 6 * 8),
]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("options", "pairs"), OPTIONS, ids=lambda x: str(list(x)) if isinstance(x, dict) else str(x))
def test_attention(options, pairs, backend):
    shapes = ((2, 4, 6, 8), (2, 2, 8, 8), (2, 2, 8, 10))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    forward = 2 * (2 * 4) * pairs * (8 + 10)
    flops, out = counted(lambda: attention(q, k, v, backend=backend, **options))
    assert flops == forward
    flops, _ = counted(lambda: out.sum().backward())
    assert flops == forward * 5 // 2


@pytest.mark.parametrize(("options", "pairs"), [({}, 6 * 8), ({"causal": True}, 33), ({"window": (1, 0)}, 12)], ids=str)
def test_packed_sequences_of_mean_length(options, pairs):
    q, k, v = torch.randn(18, 4, 8, requires_grad=True), torch.randn(24, 2, 8), torch.randn(24, 2, 10)
    starts = torch.tensor([0, 6, 12, 18]), torch.tensor([0, 8, 16, 24])
    forward = 2 * (3 * 4) * pairs * (8 + 10)
    flops, out = counted(lambda: attention_varlen(q, k, v, *starts, backend="reference", **options))
    assert flops == forward
    assert counted(lambda: out.sum().backward())[0] == forward * 5 // 2
    unequal = torch.tensor([0, 1, 17, 18]), torch.tensor([0, 20, 23, 24])
    assert counted(lambda: attention_varlen(q, k, v, *unequal, backend="reference", **options))[0] == forward


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    ("lens", "options", "pairs"),
    [
        (7, {}, 8 + 9 + 10),  # three are appended
        (7, {"causal": False}, 3 * 10),
        (7, {"window": (2, None)}, 3 * 3),
        (torch.tensor([7, 5]), {}, 30 + 31 + 32),  # of the whole cache
    ],
    ids=["causal", "open", "window", "lengths on the device"],
)
def test_a_decode_step(lens, options, pairs, paged):
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 10)
    shape = (4, 16, 2) if paged else (2, 32, 2)
    caches = torch.zeros(*shape, 8), torch.zeros(*shape, 10)
    table = torch.arange(4).view(2, 2).int() if paged else None
    options = options | {"cache_lens": lens, "block_table": table, "backend": "reference"}
    flops, _ = counted(lambda: attention_with_kvcache(q, *caches, k, v, **options))
    assert flops == 2 * (2 * 4) * pairs * (8 + 10)


@pytest.mark.parametrize(("options", "pairs"), [({}, 6 * 8), ({"causal": True, "q_offset": 0}, 21)], ids=str)
def test_pytorchs_kernel(options, pairs):
    """The default on CPU, of which PyTorch's counter has no formula."""
    shapes = ((2, 4, 6, 8), (2, 2, 8, 8), (2, 2, 8, 8))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    forward = 2 * (2 * 4) * pairs * (8 + 8)
    flops, out = counted(lambda: attention(q, k, v, **options))
    assert flops == forward
    flops, _ = counted(lambda: out.sum().backward())
    assert flops == forward * 5 // 2


def test_a_layer():
    """Four projections and causal attention, each counted once; the counter knows the modules."""
    model = torch.nn.Sequential(fastattn.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model[0](torch.randn(2, 6, 32), src_mask=mask, is_causal=True)
    attention_part = 4 * (2 * 6) * 2 * 32 * 32 + 2 * (2 * 4) * 21 * (8 + 8)
    counts = counter.get_flop_counts()
    assert sum(counts["TransformerEncoderLayer.self_attn"].values()) == attention_part
    assert counter.get_total_flops() == attention_part + 2 * (2 * 6) * 2 * 32 * 48


def test_tracing_counts_the_same():
    q, k, v = make_qkv("meta", (65, 100), dtype=SINGLE)
    flops, _ = counted(lambda: attention(q, k, v, causal=True, backend="reference"))
    assert flops == 2 * 2 * sum(range(36, 101)) * 32
