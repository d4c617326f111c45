"""The shapes on which the tests of FlashAttention have found bugs, with this package's own rule.

Facts of the lists, no code: Dao-AILab/flash-attention, tests/test_flash_attn.py, commit 0251105a: its causal, varlen,
splitkv, kvcache and overflow tests. One table of cases: what the interpreter computes in reasonable time runs
everywhere, the rest on a GPU. Shapes that test_forward.py has are not repeated here.
"""

import pytest
import torch

from fastattn.testing import check_attention, check_kvcache
from tests.support.attention_cases import BFLOAT, HALF, make_qkv
from tests.support.pairwise import pairwise

SMALL = 113 * 217
"""Scores per head that the interpreter computes."""


def cases(shapes, *axes, small=SMALL):
    """Every shape with every value of each axis and dtype, these in pairs; ``gpu``: too large for the interpreter."""
    found = []
    for (q_len, kv_len), *values in pairwise(shapes, *axes, (HALF, BFLOAT)):
        marks = ()
        if q_len * kv_len > small:
            reason = f"{q_len}x{kv_len} scores: too slow in the interpreter"
            marks = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=reason))
        label = "-".join([f"{q_len}x{kv_len}", *(str(value) for value in values[:-1])])
        found.append(pytest.param((q_len, kv_len), *values, marks=marks, id=label))
    return found


def both_ways(shapes):
    return [pair for shape in shapes for pair in ((shape, shape[::-1]) if shape[0] != shape[1] else (shape,))]


# Lengths one off a tile, primes, and far more keys than queries; (left, right) of a window or None.
CAUSAL = both_ways([(3, 799), (127, 512), (113, 211), (256, 512), (1023, 1024), (97, 97), (200, 200), (2048, 2048)])


@pytest.mark.parametrize(("lengths", "window", "dim", "dtype"), cases(CAUSAL, (None, (37, 5)), (64, 128)))
def test_causal(lengths, window, dim, dtype, device, backend):
    """More queries than keys leaves rows that see nothing."""
    if torch.cuda.is_available():
        q, k, v = make_qkv(device, lengths, dims=(dim, dim), heads=(9, 3), batch=4, dtype=dtype)
    else:
        q, k, v = make_qkv(device, lengths, dims=(dim // 4 - 1,) * 2, heads=(1, 1), dtype=dtype)
    check_attention(q, k, v, backend=backend, causal=True, window=window)


# Room for the longest sequence of each kind; the lengths are drawn, with an empty one in the middle and at the end.
VARLEN = [(1, 147), (113, 203), (128, 217), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024)]


@pytest.mark.parametrize(("lengths", "causal", "dtype"), cases(VARLEN, (True, False)))
def test_varlen(lengths, causal, dtype, device, backend):
    bounds = []
    for name, longest in zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True):
        drawn = torch.randint(max(1, longest - 20), longest + 1, (4,))
        drawn[1] = 0 if name == "cu_seqlens_k" else drawn[1]
        drawn[3] = 0
        bounds.append((name, torch.cat([torch.zeros(1), drawn.cumsum(0)]).int().to(device)))
    q, k, v = (
        torch.randn(int(bound[-1]), heads, 16).to(device, dtype)
        for heads, bound in ((2, bounds[0][1]), (1, bounds[1][1]), (1, bounds[1][1]))
    )
    check_attention(q, k, v, backend=backend, causal=causal, **dict(bounds))


# (Lq, capacity): many splits over few and many keys.
CACHES = [
    (1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (1, 131072), (16, 131072),
    (128, 128),
]  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "num_splits", "heads", "dtype"), cases(CACHES, (None, 5), ((6, 6), (6, 1)), small=4096)
)
def test_cache(lengths, num_splits, heads, dtype, device, backend):
    """Contiguous or, where a length is a multiple of 16, on pages of 16 in random order; half of it filled before."""
    q_len, capacity = lengths
    q = torch.randn(2, heads[0], q_len, 59).to(device, dtype)
    caches = [torch.randn(2, capacity, heads[1], 59).to(device, dtype) for _ in "kv"]
    new = [torch.randn(2, heads[1], min(q_len, capacity // 2), 59).to(device, dtype) for _ in "kv"]
    table = None
    if capacity % 16 == 0:
        pages = torch.randperm(2 * capacity // 16)
        caches = [cache.view(-1, 16, heads[1], 59)[pages.to(device)] for cache in caches]
        table = pages.argsort().view(2, -1).int().to(device)
    lens = torch.tensor([capacity // 2, 0], dtype=torch.int32, device=device)
    check_kvcache(
        q, *caches, *new, cache_lens=lens, block_table=table, num_splits=num_splits, backend=backend
    )  # fmt: skip


def test_more_queries_than_keys_overflow_nothing(device, backend):
    """cu_seqlens of 76, 34 and 146 queries against one key each: gradients were NaN once."""
    q, k, v = (torch.randn(n, 2, 64).to(device, HALF) for n in (256, 3, 3))
    bounds = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 76, 110, 256], [0, 1, 2, 3])]
    for causal in (False, True):
        check_attention(
            q * 5, k * 3, v * 3, backend=backend, causal=causal, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1]
        )
