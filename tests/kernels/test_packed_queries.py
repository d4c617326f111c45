"""attention_with_kvcache with cu_seqlens_q: entries that each ask with a number of queries of their own."""

import dataclasses
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import attention_with_kvcache, explain_with_kvcache
from fastattn.testing import assert_parity, calls
from fastattn.testing.cache import run_step
from tests.support.attention_cases import BFLOAT, DOUBLE, HALF, SINGLE

NAN = torch.nan
HEADS, KV_HEADS, DIM = 2, 1, 16
LENS, QUERIES, CAPACITY = (37, 0, 9, 20), (1, 17, 0, 3), 60
"""A step, a prompt, an entry that is left alone, a chunk: few rows and many for a key head."""
BACKENDS = ["triton", "cpu", "reference"]


@dataclasses.dataclass
class Problem:
    """Caches with NaN where no entry has anything, and what they hold after the call."""

    q: torch.Tensor
    caches: list[torch.Tensor]
    new: list[torch.Tensor] | None
    table: torch.Tensor | None
    lens: torch.Tensor
    starts: torch.Tensor
    after: list[torch.Tensor]
    keys: list[tuple[torch.Tensor, torch.Tensor]]
    """(n, Hk, D) and (n, Hk, Dv) of each entry after the call"""

    def run(self, **options):
        given = {"cache_lens": self.lens, "block_table": self.table, "cu_seqlens_q": self.starts, **options}
        return attention_with_kvcache(self.q, *self.caches, *(self.new or (None, None)), **given)

    def copy(self):
        return dataclasses.replace(self, caches=[x.clone() for x in self.caches])


def make(device, page=0, new=True, dtype=SINGLE, v_dim=DIM, rest=3, lens=LENS, queries=QUERIES, kind=torch.int32):
    total, batch = sum(queries), len(lens)
    content = [torch.randn(batch, CAPACITY, KV_HEADS, d).to(device, dtype) for d in (DIM, v_dim)]
    pages = -(-CAPACITY // page) if page else 0
    table = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages).int().to(device) if page else None
    shape = (batch * pages + 2, page) if page else (batch, CAPACITY)
    caches = [torch.full((*shape, KV_HEADS, x.shape[-1]), NAN).to(device, dtype) for x in content]
    after, rows, keys = [x.clone() for x in caches], [[], []], []
    for entry, (held, asked) in enumerate(zip(lens, queries, strict=True)):
        first, end = (held, held + asked) if new else (held - min(held, asked), held)
        for cache, later, own, appended in zip(caches, after, content, rows, strict=True):
            for j in range(end):
                place = (table[entry, j // page], j % page) if table is not None else (entry, j)
                later[place] = own[entry, j]
                if j < held:
                    cache[place] = own[entry, j]
            appended.append(own[entry, first:end])
        keys.append(tuple(own[entry, :end] for own in content))
    behind = [torch.full((rest, KV_HEADS, x.shape[-1]), NAN).to(device, dtype) for x in content]
    fresh = [torch.cat([*own, more]) for own, more in zip(rows, behind, strict=True)] if new else None
    q = torch.cat([torch.randn(total, HEADS, DIM), torch.full((rest, HEADS, DIM), NAN)]).to(device, dtype)
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=kind, device=device)
    return Problem(q, caches, fresh, table, torch.tensor(lens, dtype=kind, device=device), starts, after, keys)


def check(problem, backend, num_splits=None, **options):
    """Hold out and lse to the rule, and the caches to what they should hold, to the bit."""
    out, lse = problem.run(backend=backend, num_splits=num_splits, return_lse=True, **options)
    bits = {2: torch.int16, 4: torch.int32}[problem.q.element_size()]
    for cache, expected in zip(problem.caches, problem.after, strict=True):
        assert torch.equal(cache.view(bits), expected.view(bits))
    orders = calls.orders_of(DIM, problem.q.device)
    for entry, (first, end) in enumerate(itertools.pairwise(problem.starts.tolist())):
        if first == end:
            continue

        def step(dtype, order=None, rows=slice(first, end), entry=entry):
            own = (problem.q[rows], *problem.keys[entry])
            q, k, v = (x.transpose(0, 1)[None].to(dtype) for x in own)
            q, k = (x if order is None else x[..., order] for x in (q, k))
            return run_step(q, k, v, entry, options)

        exact = step(DOUBLE)
        for index, (ours, dtype) in enumerate(((out.transpose(0, 1)[None], problem.q.dtype), (lse[None], SINGLE))):
            plain = [step(dtype, order)[index] for order in orders]
            assert_parity(ours[:, :, first:end], exact[index], plain, f"entry {entry}", exact[index + 2])
    used = int(problem.starts[-1])
    assert (out[used:] == 0).all() and (lse[:, used:] == -torch.inf).all()


def terms(device):
    return {
        "plain": {},
        "not causal": {"causal": False},
        "window": {"window": (11, 0), "softcap": 2.0},
        "everything": {
            "window": (30, 1), "causal": False, "sinks": torch.tensor([0.3, 2.0]).to(device), "scale": -0.4,
            "alibi_slopes": torch.rand(4, 2, generator=torch.Generator().manual_seed(2)).to(device),
        },
    }  # fmt: skip


PLACES = {"plain": (0, 1), "not causal": (3, 2), "window": (16, 3), "everything": (16, 2)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("term", PLACES)
def test_terms(term, backend, device):
    page, num_splits = PLACES[term]
    check(make(device, page, v_dim=24), backend, num_splits=num_splits, **terms(device)[term])


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("page", [0, 48])
def test_dtypes_and_nothing_appended(dtype, page, device, backend):
    check(make(device, page, new=False, dtype=dtype, kind=torch.int64), backend)


@pytest.mark.parametrize("new", [True, False])
def test_the_pages_of_an_entry_without_queries_are_not_asked_for(new, device, backend):
    whole = make(device, 16, new)
    freed = whole.copy()
    assert freed.table is not None and QUERIES[2] == 0
    freed.table = freed.table.clone()
    freed.table[2] = -1
    assert torch.equal(freed.run(backend=backend), whole.run(backend=backend))


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("queries", [1, 20])
def test_equal_numbers_are_the_call_without_starts(queries, page, device, backend):
    """Bit for bit."""
    packed = make(device, page, rest=0, lens=LENS[:3], queries=(queries,) * 3)
    plain = packed.copy()
    out, lse = packed.run(backend=backend, return_lse=True)
    rows = (x.unflatten(0, (3, queries)).transpose(1, 2) for x in (plain.q, *(plain.new or ())))
    q, k, v = rows
    expected, expected_lse = attention_with_kvcache(
        q, *plain.caches, k, v, cache_lens=plain.lens, block_table=plain.table, backend=backend, return_lse=True
    )
    assert torch.equal(out, expected.transpose(1, 2).flatten(0, 1))
    assert torch.equal(lse, expected_lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("page", [0, 16])
def test_an_entry_alone_has_the_bits_it_has_in_company(page):
    backend = "cpu"
    try:
        whole = make("cpu", page, rest=0)
        out, lse = whole.run(backend=backend, return_lse=True)
    except ValueError as error:
        pytest.skip(str(error))
    for entry, (first, end) in enumerate(itertools.pairwise(whole.starts.tolist())):
        one = slice(entry, entry + 1)
        caches = whole.caches if whole.table is not None else [x[one] for x in whole.caches]
        alone, alone_lse = attention_with_kvcache(
            whole.q[first:end], *caches, cache_lens=whole.lens[one] + end - first, backend=backend, return_lse=True,
            block_table=None if whole.table is None else whole.table[one],
            cu_seqlens_q=torch.tensor([0, end - first]),
        )  # fmt: skip
        assert torch.equal(alone, out[first:end]) and torch.equal(alone_lse, lse[:, first:end])


def test_pages_are_read_where_they_are(device):
    """Room for 2**27 keys of each of two entries, of which few are used: no copy of it fits into memory."""
    problem = make("cpu", 16, lens=(20, 7), queries=(40, 2), new=False)
    assert problem.table is not None
    wide = torch.cat([problem.table, problem.table[:, :1].expand(-1, (1 << 23) - problem.table.shape[1])], 1)
    try:
        ours = problem.run(backend="cpu", block_table=wide)
    except ValueError as error:
        pytest.skip(str(error))
    assert torch.equal(ours, problem.run(backend="cpu"))


def test_autograd_knows_that_the_caches_changed_and_has_no_gradient():
    problem = make("cpu")
    version = problem.caches[0]._version
    problem.q.requires_grad_()
    out = problem.run()
    assert problem.caches[0]._version > version
    with pytest.raises(RuntimeError, match="attention_with_kvcache has no gradient"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [0, 16])
def test_a_compiled_step(page):
    """Bit-equal to eager, caches included, and compiled once for all numbers of queries."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for queries in (QUERIES, (0, 3, 16, 2)):
        ours = make("cpu", page, queries=queries)
        eager = ours.copy()
        given = {"cache_lens": ours.lens, "block_table": ours.table, "cu_seqlens_q": ours.starts, "return_lse": True}
        results = compiled(ours.q, *ours.caches, *(ours.new or ()), **given)
        assert all(map(torch.equal, results, eager.run(return_lse=True)))
        for cache, expected in zip(ours.caches, eager.caches, strict=True):
            assert torch.equal(cache.nan_to_num(), expected.nan_to_num())
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device, backend):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, uninitialised memory included
    problem = make(device, 16, rest=0, lens=(5, 3), queries=(1, 2))
    caches = [t.nan_to_num() for t in problem.caches]
    q, k, v = (t.transpose(0, 1)[None] for t in (problem.q, *(problem.new or ())))
    append = torch.ops.fastattn.kv_cache_append.default
    torch.library.opcheck(append, (*caches, k, v, problem.lens, problem.table, problem.starts, None, None, backend))
    args = (
        None,
        None,
        problem.lens,
        problem.table,
        None,
        None,
        9,
        0,
        0.25,
        5.0,
        1,
        True,
        problem.starts,
        *[None] * 6,
        backend,
    )
    torch.library.opcheck(torch.ops.fastattn.attention_kvcache.default, (q, *caches, k, v, *args))


def test_explain():
    problem = make("cpu")
    given = {"cache_lens": problem.lens, "cu_seqlens_q": problem.starts}
    why = explain_with_kvcache(problem.q, *problem.caches, *(problem.new or ()), **given)
    assert "its own appended, lengths per batch entry, packed queries of 4 entries" in why.call
    assert why.reasons["torch"] == ["it has no packed queries"]


ROWS = torch.zeros(5, 4, 16)
NEW, CACHE = torch.zeros(5, 2, 16), torch.zeros(2, 32, 2, 16)
STARTS, LENGTHS = torch.tensor([0, 4, 5], dtype=torch.int32), torch.tensor([28, 31])


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"q": ROWS[None]}, ValueError, r"q: expected 3 dimensions \(total, heads, head_dim\) with cu_seqlens_q"),
        ({"q": 1}, TypeError, "q: expected a Tensor, got int"),
        ({"k": NEW[:4], "v": NEW}, ValueError, r"k.shape: expected \(total_q, Hk, D\) == \(5, 2, 16\), got \(4, 2"),
        ({"k": NEW, "v": NEW[None]}, ValueError, "v: expected 3 dimensions"),
        ({"cu_seqlens_q": STARTS.float()}, TypeError, "cu_seqlens_q.dtype: expected int32 or int64"),
        ({"cu_seqlens_q": STARTS + 1}, ValueError, "cu_seqlens_q: expected to rise from 0 to at most 5, the number"),
        ({"cu_seqlens_q": STARTS[:2]}, ValueError, r"k_cache.shape\[0\]: expected the batch entries == 1, got 2"),
        ({"cache_lens": LENGTHS[:1]}, ValueError, r"cache_lens.shape: expected \(B,\) == \(2,\), got \(1,\)"),
        (
            {"cache_lens": LENGTHS + torch.tensor([1, 0]), "k": NEW, "v": NEW}, ValueError,
            r"cache_lens: expected 0 to 28 \(the cache holds 32, 4 are appended\), got 29 for batch entry 0",
        ),
        ({"cache_lens": 32, "k": NEW, "v": NEW}, ValueError, "4 are appended., got 32 for batch entry 0"),
        ({"block_table": torch.zeros(1, 2).int()}, ValueError, r"block_table.shape: expected .* with B == 2"),
        (
            {"block_table": torch.tensor([[0], [0]]).int(), "k": NEW, "v": NEW}, ValueError,
            "block_table: expected one batch entry to write each page, got page 0 twice",
        ),
        ({"backend": "torch"}, ValueError, "it has no packed queries"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(changes, error, text):
    given = {"q": ROWS, "k_cache": CACHE.clone(), "v_cache": CACHE.clone(), "cache_lens": LENGTHS} | {
        "cu_seqlens_q": STARTS, **changes
    }  # fmt: skip
    with pytest.raises(error, match=text):
        attention_with_kvcache(**given)
