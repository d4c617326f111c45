"""Calls over a KV cache for the tests: a cache with NaN wherever nothing was written, and what is appended."""

import dataclasses

import torch

from fastattn import attention_with_kvcache
from fastattn.testing import check_kvcache
from tests.support.attention_cases import SINGLE

NAN = float("nan")


@dataclasses.dataclass
class Problem:
    """A cache that holds ``lens`` tokens and NaN elsewhere, and the tokens to append."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    table: torch.Tensor | None
    lens: torch.Tensor

    def run(self, **options):
        given = {"cache_lens": self.lens, "block_table": self.table, **options}
        return attention_with_kvcache(self.q, self.k_cache, self.v_cache, self.k, self.v, **given)

    def copy(self):
        return dataclasses.replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())


def make_problem(
    device, lens=(37, 0, 1), *, new=1, q_len=1, heads=(4, 2), dims=(16, 16), dtype=SINGLE, page=0, capacity=96,
    strided=False,
):  # fmt: skip
    batch, (q_heads, kv_heads), (dim, v_dim) = len(lens), heads, dims
    if page:
        capacity = -(-capacity // page) * page
    q = torch.randn(batch, q_heads, q_len, dim).to(device, dtype)
    keys = torch.randn(batch, kv_heads, capacity, dim).to(device, dtype)
    values = torch.randn(batch, kv_heads, capacity, v_dim).to(device, dtype)
    table = None
    shape = (batch, capacity, kv_heads)
    if page:
        needed = batch * capacity // page
        table = torch.randperm(3 * needed)[:needed].view(batch, -1).to(device, torch.int32)
        shape = (3 * needed, page, kv_heads)
    caches = []
    for content in (keys, values):
        width = content.shape[3]
        if strided:  # nothing is adjacent, and the storage starts with something else
            cache = torch.full((*shape[:2], kv_heads + 1, 2 * width + 3), NAN, device=device, dtype=dtype)
            cache = cache[:, :, 1:, 3::2]
        else:
            cache = torch.full((*shape, width), NAN, device=device, dtype=dtype)
        caches.append(cache)
    for entry, n in enumerate(lens):
        for cache, content in zip(caches, (keys, values), strict=True):
            rows = content[entry, :, :n].transpose(0, 1)
            if table is None:
                cache[entry, :n] = rows
            else:
                for j in range(n):
                    cache[table[entry, j // page], j % page] = rows[j]
    k = v = None
    if new:
        k, v = (torch.stack([x[b, :, n : n + new] for b, n in enumerate(lens)]) for x in (keys, values))
        if strided:
            k, v = k.mT.contiguous().mT, v.transpose(1, 2).contiguous().transpose(1, 2)
    lens = torch.tensor(lens, device=device, dtype=torch.int32)
    return Problem(q, caches[0], caches[1], k, v, table, lens)


def check(problem, backend, num_splits=None, cache_lens=None, **options):
    """Hold a call to the rule, and see that it wrote what it should and nothing else."""
    check_kvcache(
        problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v, block_table=problem.table, backend=backend,
        cache_lens=problem.lens if cache_lens is None else cache_lens, num_splits=num_splits, **options,
    )  # fmt: skip
