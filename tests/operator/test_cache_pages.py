"""Which entries of a block table must name a page: those that a call reads or writes, counted by hand."""

import itertools

import pytest
import torch

from fastattn import attention_with_kvcache
from tests.support.pairwise import pairwise

PAGE, PAGES = 4, 5


def pages_in_use(length, new, q_len, left, kv_start):
    """Of a causal call: columns of the table with a position that is written, or that some query sees."""
    end = length + new
    used = {*range(length, end)}
    for position in range(end - q_len, end):
        first = 0 if left is None else max(0, position - left)
        used |= {*range(max(first, kv_start), position + 1)}
    return {position // PAGE for position in used}


@pytest.mark.parametrize(
    ("length", "new", "q_len", "left", "kv_start"),
    pairwise([4, 7, 8, 11, 15], [0, 1, 4, 5], [1, 2, 4], [None, 0, 3, 4, 8], [0, 3, 4]),
    ids=str,
)
def test_pages_in_use_must_exist_and_others_need_not(length, new, q_len, left, kv_start):
    q, cache = torch.randn(2, 1, q_len, 16), torch.randn(2 * PAGES, PAGE, 1, 16)
    added = [torch.randn(2, 1, new, 16) for _ in "kv"] if new else [None, None]
    used = pages_in_use(length, new, q_len, left, kv_start)
    for column, nowhere in itertools.product(range(PAGES), (-1, 2 * PAGES)):
        table = torch.arange(2 * PAGES, dtype=torch.int32).view(2, -1)
        table[1, column] = nowhere

        def call(table=table):
            return attention_with_kvcache(
                q, cache.clone(), cache.clone(), *added, cache_lens=torch.tensor([length, length]), block_table=table,
                window=(left, 0), kv_start=torch.tensor([0, kv_start]), backend="reference",
            )  # fmt: skip

        if column in used:
            text = rf"block_table: expected pages from 0 to {2 * PAGES - 1}, got {nowhere} at \[1, {column}\]"
            with pytest.raises(ValueError, match=text):
                call()
        else:
            assert call().isfinite().all()
