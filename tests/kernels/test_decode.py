"""Attention over a KV cache: parity, what is written and read, splits, errors, torch.compile."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import attention_with_kvcache, reference
from fastattn.spec import CacheSpec
from fastattn.spec.cache_operands import cached
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DOUBLE, DTYPE_NAMES, HALF, SINGLE
from tests.support.cache_problems import NAN, check, make_problem
from tests.support.pairwise import pairwise

PAGES = (0, 1, 48, 64)


# --- Parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q_len", "page", "num_splits"), pairwise([1, 3, 17], PAGES, [1, 2, 5]))
def test_parity(q_len, page, num_splits, device, backend):
    """Lengths 0, 1, some and all of the cache; more splits than tiles for most of them."""
    new = min(q_len, 3)
    full = -(-96 // max(page, 1)) * page - new if page else 96 - new
    lens = (full, 0, 1) if q_len < 17 else (37, 0)
    check(make_problem(device, lens, new=new, q_len=q_len, page=page), backend, num_splits=num_splits)


@pytest.mark.parametrize(
    ("dims", "dtype", "page"), pairwise([(64, 64), (59, 16), (128, 64), (16, 59)], [HALF, BFLOAT, SINGLE], [0, 16])
)
def test_dtypes_and_head_dims(dims, dtype, page, device, backend):
    check(make_problem(device, (50, 33), q_len=2, new=2, dims=dims, dtype=dtype, page=page), backend, num_splits=2)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("q_len", [1, 3])
def test_grouped_heads(heads, q_len, device, backend):
    check(make_problem(device, (45, 3), heads=heads, q_len=q_len), backend, num_splits=2)


def terms(device):
    return {
        "not causal": {"causal": False},
        "window": {"window": (11, 0)},
        "window beyond": {"window": (4, 3), "causal": False},
        "negative window": {"window": (40, -5), "causal": False},
        "nothing visible": {"window": (None, -500), "causal": False},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, -0.06], device=device)},
        "alibi per entry": {"alibi_slopes": torch.rand(3, 4, generator=torch.Generator().manual_seed(2)).to(device)},
        "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], device=device)},
        "scale": {"scale": -0.4},
        "everything": {
            "window": (60, 1), "causal": False, "softcap": 3.0, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]).to(device),
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, -0.06], device=device),
        },
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize(("num_splits", "page"), [(1, 0), (3, 16)])
@pytest.mark.parametrize("term", terms("cpu"))
def test_terms(term, num_splits, page, backend, device):
    problem = make_problem(device, (70, 0, 12), new=2, q_len=5, page=page)
    check(problem, backend, num_splits, **terms(device)[term])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize(("new", "q_len"), [(0, 1), (0, 4), (5, 1), (3, 20), (20, 3)])
@pytest.mark.parametrize("page", [0, 16])
def test_what_is_appended_need_not_be_what_asks(new, q_len, page, backend, device):
    check(make_problem(device, (31, 5), new=new, q_len=q_len, page=page), backend)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("page", [0, 48])
def test_any_strides(page, backend, device):
    check(make_problem(device, (31, 5), new=3, q_len=3, dims=(16, 24), page=page, strided=True), backend)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE, DOUBLE], ids=DTYPE_NAMES.get)
def test_reference(dtype, page, device):
    check(make_problem(device, (50, 0, 7), new=3, q_len=4, dtype=dtype, page=page), "reference")


def test_tall_tiles(device, backend):
    """More rows than a decode step has take another tile."""
    check(make_problem(device, (50,), new=20, q_len=20, heads=(4, 1)), backend, num_splits=2)


@pytest.mark.parametrize(("q_len", "causal"), [(1, True), (4, False), (8, True)])
@pytest.mark.parametrize("as_int", [True, False])
def test_pytorch_kernel(q_len, causal, as_int):
    """Where it is exact, PyTorch's kernel on a slice of the cache serves small calls, with NaN beyond the slice."""
    new = q_len if q_len != 4 else 2
    problem = make_problem("cpu", (0 if q_len == 8 else 30,) * 2, new=new, q_len=q_len, dims=(16, 24))
    lens = int(problem.lens[0]) if as_int else problem.lens
    chosen, named = problem.copy(), problem.copy()
    options = {"cache_lens": lens, "causal": causal}
    assert torch.equal(chosen.run(**options), named.run(**options, backend="torch"))
    check(problem, None, lse=False, **options)


# --- What counts, and what does not ----------------------------------------------------------------------------------


def test_splits_change_rounding_alone(device, backend):
    problem = make_problem(device, (90, 40), new=0, q_len=2)
    for num_splits in (1, 2, 3, 20):
        check(problem, backend, num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_repeats_are_bit_equal(num_splits, device, backend):
    problem = make_problem(device, (90, 40), q_len=2, page=16, dtype=HALF)
    first = problem.copy().run(num_splits=num_splits, backend=backend, return_lse=True)
    again = problem.copy().run(num_splits=num_splits, backend=backend, return_lse=True)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_steps_are_full_causal_attention(backend, device):
    length, prefill = 24, 10
    q = torch.randn(1, 4, length, 16, device=device)
    k, v = (torch.randn(1, 2, length, 16, device=device) for _ in "kv")
    caches = [torch.full((1, 32, 2, 16), NAN, device=device) for _ in "kv"]
    lens = torch.zeros(1, dtype=torch.int64, device=device)
    outs = []
    for start, stop in ((0, prefill), *((i, i + 1) for i in range(prefill, length))):
        part = (t[:, :, start:stop] for t in (q, k, v))
        q_part, k_part, v_part = part
        outs.append(attention_with_kvcache(q_part, *caches, k_part, v_part, cache_lens=lens, backend=backend))
        lens += stop - start
    expected, eager = (
        fastattn.attention(q.to(t), k.to(t), v.to(t), causal=True, backend="reference") for t in (DOUBLE, SINGLE)
    )
    assert_parity(torch.cat(outs, 2), expected, eager)


@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference", None])
def test_a_prompt_is_attention_among_its_own_tokens(backend, page, device):
    """Bit for bit, whatever stands in the rest of the cache; and the cache has the prompt then."""
    problem = make_problem(device, (0, 0), new=21, q_len=21, page=page)
    slopes = torch.rand(4, device=device)
    options = {"alibi_slopes": slopes, "window": (7, 0), "softcap": 3.0, "backend": backend, "return_lse": True}
    results = problem.run(cache_lens=0, **options)
    for got, expected in zip(
        results, fastattn.attention(problem.q, problem.k, problem.v, causal=True, **options), strict=True
    ):
        assert torch.equal(got, expected)
    for cache, new in ((problem.k_cache, problem.k), (problem.v_cache, problem.v)):
        for entry in range(2):
            rows = cached(cache, problem.table, slice(entry, entry + 1), 21)
            assert torch.equal(rows[0], new[entry])


def test_cache_lens_is_not_modified(device, backend):
    problem = make_problem(device)
    before = problem.lens.clone()
    problem.run(backend=backend)
    assert torch.equal(problem.lens, before)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference", None])
def test_empty_batch(backend, device):
    q, cache = torch.zeros(0, 2, 1, 16, device=device), torch.zeros(0, 32, 2, 16, device=device)
    for lens in (3, torch.zeros(0, dtype=torch.int32, device=device)):
        assert attention_with_kvcache(q, cache, cache, cache_lens=lens, backend=backend).shape == q.shape


@pytest.mark.parametrize("gone", ["unwritten", "-1"])
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_pages_before_a_window_may_be_gone(backend, gone, device):
    """Their entries in the table point to memory that was never written, or to none."""
    problem = make_problem(device, (80,), page=16)
    expected = problem.copy().run(window=(20, 0), backend=backend)
    assert problem.table is not None
    used = set(problem.table.flatten().tolist())
    unwritten = next(i for i in range(problem.k_cache.shape[0]) if i not in used)
    problem.table[0, :3] = -1 if gone == "-1" else unwritten
    assert torch.equal(problem.run(window=(20, 0), backend=backend), expected)


# --- Lengths and pages that the host cannot see ----------------------------------------------------------------------


def surrounded(shape, device):
    """(whole buffer full of NaN, view in its middle with finite numbers), two pages or batch entries on either side."""
    whole = torch.full((shape[0] + 4, *shape[1:]), NAN, device=device)
    whole[2:-2] = torch.randn(shape).to(device)
    return whole, whole[2:-2]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("page", [0, 16, 48])
def test_the_kernel_reads_nothing_outside_the_cache(page, num_splits, device):
    decode = pytest.importorskip("fastattn.kernels.decode")
    q = torch.randn(3, 2, 1, 16).to(device)
    shape = (4, page, 2, 16) if page else (3, 48, 2, 16)
    (_, k), (_, v) = surrounded(shape, device), surrounded(shape, device)
    table = torch.tensor([[0, 99, 2], [-7, 1, 2**31 - 1], [3, 3, 3]]).int().to(device) if page else None
    lens = torch.tensor([1 << 40, 47, -5], device=device)

    def call(table, lens):
        out, lse = torch.empty(3, 2, 1, 16, device=device), torch.empty(3, 2, 1, device=device)
        spec = CacheSpec(
            q, k, v, None, None, None, None, lens, table, added=1, length=None, left=None, right=0, scale=0.25,
            softcap=None, num_splits=num_splits, return_lse=True,
        )  # fmt: skip
        decode.attention_kvcache(out, lse, spec)
        return out, lse

    out, lse = call(table, lens)
    valid_table = None if table is None else table.clamp(0, 3)
    capacity = 3 * page if page else 48
    expected, expected_lse = call(valid_table, torch.tensor([capacity - 1, 47, -1], device=device))
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert out.isfinite().all() and (out[2] == 0.0).all() and (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("page", [0, 16])
def test_nothing_is_written_outside_the_cache(page, backend, device):
    if backend == "triton":
        append = pytest.importorskip("fastattn.kernels.append").kv_cache_append
    else:
        append = reference.kv_cache_append
    shape = (4, page, 2, 16) if page else (3, 48, 2, 16)
    (k_whole, k_cache), (v_whole, v_cache) = surrounded(shape, device), surrounded(shape, device)
    k, v = torch.randn(3, 2, 3, 16).to(device), torch.randn(3, 2, 3, 16).to(device)
    table = torch.tensor([[0, 1, 2], [-7, 3, 4], [99, -1, 4]]).int().to(device) if page else None
    before = k_whole.clone(), v_whole.clone()
    append(k_cache, v_cache, k, v, torch.tensor([46, 15 if page else 1 << 40, -2], device=device), table)
    for whole, old, new in zip((k_whole, v_whole), before, (k, v), strict=True):
        changed = (whole != old) & ~(whole.isnan() & old.isnan())
        old, changed = old[2:-2], changed[2:-2].nonzero()[:, :2].unique(dim=0).tolist()
        if page:  # entry 0: the last two slots of page 2; entry 1: all but one row, in page 3; entry 2: no valid page
            assert changed == [[2, 14], [2, 15], [3, 0], [3, 1]]
            assert torch.equal(whole[4, 14], new[0, :, 0]) and torch.equal(whole[5, 1], new[1, :, 2])
        else:  # entry 0: two rows fit; entry 1: none; entry 2: positions -2, -1 and 0
            assert changed == [[0, 46], [0, 47], [2, 0]]
            assert torch.equal(whole[4, 0], new[2, :, 2])


# --- Errors ----------------------------------------------------------------------------------------------------------


Q, CACHE, PAGED = torch.zeros(2, 4, 1, 16), torch.zeros(2, 32, 2, 16), torch.zeros(5, 16, 2, 16)
NEW, TABLE = torch.zeros(2, 2, 1, 16), torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
BUFFER = torch.zeros(2, 33, 2, 16)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"q": 1}, TypeError, "q: expected a Tensor, got int"),
        ({"q": Q[0]}, ValueError, "q: expected 4 dimensions"),
        ({"q": Q[:, :, :0]}, ValueError, r"q.shape\[2\]: expected at least one query, got 0"),
        ({"q": Q.int()}, TypeError, "q.dtype: expected float16"),
        ({"q": Q[:, :3]}, ValueError, r"q.shape\[1\]: expected a positive multiple of k_cache.shape\[2\] == 2"),
        ({"k_cache": CACHE.half()}, TypeError, "k_cache.dtype: expected q.dtype"),
        ({"k_cache": CACHE.to("meta")}, ValueError, "k_cache.device: expected q.device == cpu, got meta"),
        ({"k_cache": CACHE[..., :8]}, ValueError, r"k_cache.shape\[3\]: expected q.shape\[3\] == 16, got 8"),
        ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, ValueError, r"k_cache.shape\[0\]: expected q.shape\[0\] == 2"),
        ({"v_cache": CACHE[:, :16]}, ValueError, r"v_cache.shape\[:3\]: expected k_cache.shape\[:3\]"),
        ({"k": NEW}, ValueError, "v: expected k and v together or neither"),
        ({"v": NEW}, ValueError, "k: expected k and v together or neither"),
        ({"k": NEW, "v": NEW[:, :1]}, ValueError, r"v.shape: expected \(B, Hk, Lnew, D\) == \(2, 2, 1, 16\)"),
        ({"k": NEW, "v": NEW.half()}, TypeError, "v.dtype: expected q.dtype"),
        ({"k": NEW, "v": NEW, "k_cache": CACHE[:1].expand(2, -1, -1, -1)}, ValueError, "k_cache: .* place of its own"),
        ({"k": NEW, "v": NEW, "v_cache": nn.Parameter(CACHE)}, ValueError, "v_cache.requires_grad: expected False"),
        (
            {"k": CACHE.transpose(1, 2)[:, :, 30:31], "v": NEW},
            ValueError,
            "k: .* memory of its own .* got that of k_cache",
        ),
        ({"k": NEW, "v": NEW}, ValueError, "v_cache: expected memory of its own .* got that of k_cache"),
        (
            {"k": NEW, "v": NEW, "k_cache": BUFFER[:, :32], "v_cache": BUFFER[:, 1:]},
            ValueError,
            "v_cache: expected memory of its own .* got that of k_cache",
        ),
        (
            {"k": NEW, "v": NEW, "v_cache": CACHE.clone(), "q": CACHE[:, 3:5].reshape(2, 4, 1, 16)},
            ValueError,
            "q: expected memory of its own .* got that of k_cache",
        ),
        (
            {"k": NEW, "v": NEW, "k_cache": BUFFER.as_strided((2, 32, 2, 16), (1056, 16, 16, 1))},
            ValueError,
            "k_cache: expected every element in a place of its own",
        ),
        ({"mask": torch.tensor(False)}, ValueError, r"mask.shape: expected at least 1 dimension, .* got \(\)"),
        ({"bias": torch.tensor(1.0)}, ValueError, r"bias.shape: expected at least 1 dimension, .* got \(\)"),
        (
            {"block_table": TABLE[:, :0], **dict.fromkeys(("k_cache", "v_cache"), PAGED)},
            ValueError,
            r"block_table.shape: expected \(B, max_pages\) with B == 2 and at least one page, got \(2, 0\)",
        ),
        ({"rotary_interleaved": True}, ValueError, "rotary_interleaved: expected False without rotary_cos and"),
        ({"cache_lens": 2.0}, TypeError, "cache_lens: expected an int or an integer tensor, got float"),
        ({"cache_lens": True}, TypeError, "cache_lens: expected an int or an integer tensor, got bool"),
        ({"cache_lens": torch.zeros(2)}, TypeError, "cache_lens.dtype: expected int32 or int64"),
        ({"cache_lens": torch.zeros(3).int()}, ValueError, r"cache_lens.shape: expected \(B,\) == \(2,\), got \(3,\)"),
        ({"cache_lens": -1}, ValueError, "cache_lens: expected 0 to 32 .* got -1 for batch entry 0"),
        ({"cache_lens": 33}, ValueError, "cache_lens: expected 0 to 32 .* got 33"),
        (
            {"cache_lens": torch.tensor([3, 32]), "k": NEW, "v": NEW, "v_cache": CACHE.clone()},
            ValueError,
            "0 to 31 .* got 32 for batch entry 1",
        ),
        ({"block_table": TABLE.long(), **dict.fromkeys(("k_cache", "v_cache"), PAGED)}, TypeError, "expected int32"),
        ({"block_table": TABLE[:1], **dict.fromkeys(("k_cache", "v_cache"), PAGED)}, ValueError, "block_table.shape"),
        ({"block_table": TABLE + 1, **dict.fromkeys(("k_cache", "v_cache"), PAGED)}, ValueError, r"got 5 at \[1, 1\]"),
        ({"block_table": TABLE - 1, **dict.fromkeys(("k_cache", "v_cache"), PAGED)}, ValueError, r"got -1 at \[0, 0\]"),
        (
            {"block_table": TABLE, **dict.fromkeys(("k_cache", "v_cache"), PAGED[:, :0])},
            ValueError,
            r"k_cache.shape\[1\]: expected a page size of at least 1, got 0",
        ),
        (
            {"block_table": TABLE * 0, "k": NEW, "v": NEW, "k_cache": PAGED, "v_cache": PAGED.clone()},
            ValueError,
            "block_table: expected one batch entry to write each page, got page 0 twice",
        ),
        ({"causal": 1}, TypeError, "causal: expected a bool"),
        ({"window": 3}, TypeError, r"window: expected \(left, right\)"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks.shape"),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "alibi_slopes.shape"),
        ({"scale": torch.ones(())}, TypeError, "scale: expected a float"),
        ({"num_splits": 0}, ValueError, "num_splits: expected 1 to 1024 or None, got 0"),
        ({"num_splits": 2.0}, TypeError, "num_splits: expected an int or None"),
        ({"backend": "flash"}, ValueError, "backend: expected one of .*'triton'.* got 'flash'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve this call: it has no KV cache"),
        ({"backend": "torch", "softcap": 1.0, "return_lse": True}, ValueError, "no softcap; it does not return lse"),
        ({"backend": "torch", "window": (3, 0)}, ValueError, "it has no window"),
        ({"backend": "torch", "cache_lens": torch.tensor([3, 4])}, ValueError, "one length for all batch entries"),
        ({"backend": "torch", "q": torch.zeros(2, 4, 3, 16)}, ValueError, "its causal mask is top-left only"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(changes, error, text):
    given = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_lens": 20, **changes}
    before = [t.clone() for t in (given["k_cache"], given["v_cache"])]
    with pytest.raises(error, match=text):
        attention_with_kvcache(**given)
    for cache, old in zip((given["k_cache"], given["v_cache"]), before, strict=True):
        assert cache.is_meta or torch.equal(cache, old)


def test_autocast_is_named_where_it_made_the_dtype():
    text = r"k_cache.dtype: expected q.dtype == torch.bfloat16 \(set by autocast\), or int8 .* got torch.float32"
    with torch.autocast("cpu", BFLOAT), pytest.raises(TypeError, match=text):
        attention_with_kvcache(Q, CACHE, CACHE, cache_lens=3)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_made_under_inference_mode_is_read_outside_and_appended_to_inside(name):
    caches = {"k_cache": CACHE.clone(), "v_cache": CACHE.clone()}
    with torch.inference_mode():
        caches[name] = torch.zeros_like(CACHE)
        inside = attention_with_kvcache(Q, **caches, k=NEW + 1, v=NEW + 1, cache_lens=3)
    assert torch.equal(attention_with_kvcache(Q, **caches, cache_lens=4), inside)
    with pytest.raises(ValueError, match=rf"{name}: .* made under torch.inference_mode\(\); .* pass {name}.clone\(\)"):
        attention_with_kvcache(Q, **caches, k=NEW, v=NEW, cache_lens=4)


@pytest.mark.parametrize(
    ("k_cache", "v_cache"),
    [
        torch.zeros(2, 2, 32, 2, 16).unbind(0),
        torch.zeros(2, 2, 32, 2, 16).unbind(1),
        torch.zeros(2, 32, 2, 2, 16).unbind(2),
        torch.zeros(2, 32, 2, 32).chunk(2, 3),
        [x.unflatten(2, (2, -1)) for x in torch.zeros(2, 32, 48).split([32, 16], 2)],
        [BUFFER[:, :16], BUFFER[:, 16:32]],
    ],
    ids=["whole", "entry", "token", "head", "head dims that differ", "halves"],
)  # fmt: skip
def test_one_buffer_may_hold_keys_and_values(k_cache, v_cache):
    k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, v_cache.shape[3])
    own = k_cache.clone(), v_cache.clone()
    out = attention_with_kvcache(Q + 1, k_cache, v_cache, k, v, cache_lens=7)
    assert torch.equal(out, attention_with_kvcache(Q + 1, *own, k, v, cache_lens=7))
    assert torch.equal(k_cache, own[0]) and torch.equal(v_cache, own[1])


def test_triton_says_why_not():
    big = torch.zeros(2, 32, 2, 600)
    with pytest.raises(ValueError, match="D up to 576 and Dv up to 512, got D = 16, Dv = 600"):
        attention_with_kvcache(Q, CACHE, big, cache_lens=3, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        attention_with_kvcache(Q.double(), CACHE.double(), CACHE.double(), cache_lens=3, backend="triton")


def test_unused_table_entries_may_be_anything():
    table = torch.tensor([[0, -1], [2, 99]], dtype=torch.int32)
    assert attention_with_kvcache(Q, PAGED, PAGED, cache_lens=16, block_table=table).isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_is_refused_not_missing(name, backend):
    given = {"q": Q, "k": NEW, "v": NEW}
    given[name] = given[name].clone().requires_grad_()
    out = attention_with_kvcache(**given, k_cache=CACHE.clone(), v_cache=CACHE.clone(), cache_lens=3, backend=backend)
    with pytest.raises(RuntimeError, match="attention_with_kvcache has no gradient"):
        out.sum().backward()
    with torch.no_grad():
        call = {"k_cache": CACHE.clone(), "v_cache": CACHE.clone(), "cache_lens": 3, "backend": backend}
        assert not attention_with_kvcache(**given, **call).requires_grad


def test_autograd_knows_that_the_caches_changed():
    cache = torch.zeros(2, 32, 2, 16)
    version = cache._version
    attention_with_kvcache(Q, cache, torch.zeros_like(cache), NEW, NEW, cache_lens=3)
    assert cache._version > version
    with torch.inference_mode():
        attention_with_kvcache(Q, CACHE.clone(), CACHE.clone(), NEW, NEW, cache_lens=3)


def test_autocast_casts_what_is_new():
    caches = [CACHE.bfloat16() for _ in "kv"]
    with torch.autocast("cpu", dtype=BFLOAT):
        out = attention_with_kvcache(Q, *caches, NEW, NEW, cache_lens=torch.tensor([3, 5]))
    assert out.dtype == BFLOAT


# --- Splits and launches ---------------------------------------------------------------------------------------------


def test_the_number_of_splits():
    decode = pytest.importorskip("fastattn.kernels.decode")
    assert decode.choose_splits(programs=8, keys=1 << 17, block_n=64, multiprocessors=132, split_programs=2) == 33
    assert decode.choose_splits(programs=1, keys=1 << 17, block_n=64, multiprocessors=132, split_programs=2) == 128
    assert decode.choose_splits(programs=8, keys=512, block_n=64, multiprocessors=132, split_programs=2) == 2
    assert decode.choose_splits(programs=1024, keys=1 << 17, block_n=64, multiprocessors=132, split_programs=2) == 1
    assert decode.choose_splits(programs=1, keys=0, block_n=64, multiprocessors=132, split_programs=2) == 1


def test_cross_attention_is_split_among_programs(device, monkeypatch):
    """Few queries over the keys of an encoder, which stand still: as many programs as the device has room for."""
    decode = pytest.importorskip("fastattn.kernels.decode")
    started, partial = [], []

    def start(kernel, programs, arguments, cfg, start=decode.replay.start):
        started.append((kernel, programs))
        start(kernel, programs, arguments, cfg)
        if kernel is decode.decode_kernel:
            partial.append(arguments[5])

    monkeypatch.setattr(decode.replay, "start", start)
    monkeypatch.setattr(decode.launch, "multiprocessors", lambda device: 6)
    problem = make_problem(device, (1021,), new=0, q_len=3, heads=(4, 2), capacity=1024)
    check(problem, "triton", causal=False)
    splits = partial[0].out.shape[0]
    assert splits > 1
    assert started == [(decode.decode_kernel, 2 * splits), (decode.combine_kernel, 3 * 4)]  # key heads; rows
    assert partial[0].statistics[0].isfinite().all()  # each split of each row has keys


COUNT_SPECIALISATIONS = """
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from fastattn.kernels import append, decode, launch
from fastattn.spec import CacheSpec

backend, keys = make_backend(GPUTarget("cuda", 90, 32)), {}

def launcher(function, grid):
    def catch(*args, **kwargs):
        binder = create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = binder(*args, **kwargs)
        keys.setdefault(function.__name__, set()).add(str((specialization, options)))
    return catch

def run(batch, heads, length, page, splits, q_len):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)
    table = empty(batch, length // page, dtype=torch.int32) if page else None
    k, v = (empty(batch * 7 + 1, page, heads, 64) if page else empty(batch, length, heads, 64) for _ in "kv")
    q, lens = empty(batch, 4 * heads, q_len, 64), empty(batch, dtype=torch.int64)
    new = empty(batch, heads, q_len, 64)
    append.kv_cache_append(k, v, new, new, lens, table)
    spec = CacheSpec(q, k, v, None, None, None, None, lens, table, added=q_len, length=None, left=None, right=0,
                     scale=0.1, softcap=None, num_splits=splits, return_lse=True)
    decode.attention_kvcache(q, empty(*q.shape[:3], dtype=torch.float32), spec)

with mock.patch.object(JITFunction, "__getitem__", launcher), \\
        mock.patch.object(launch, "architecture", lambda device: "sm_90"), \\
        mock.patch.object(torch.Tensor, "data_ptr", lambda self: 0):
    for page in (0, 16):
        keys.clear()
        for batch, heads, q_len in ((1, 1, 1), (2, 2, 2), (16, 8, 1), (17, 1, 3)):
            for length in (16, 48, 4096, 1 << 17):
                for splits in (2, 16, 33):
                    run(batch, heads, length, page, splits, q_len)
        assert sorted(keys) == ["append_kernel", "combine_kernel", "decode_kernel"], keys
        for name, found in keys.items():
            assert len(found) == 1, "\\n".join([name, *sorted(found)])
print("done")
"""


def test_kernels_are_compiled_once_for_all_shapes():
    pytest.importorskip("triton")
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "0", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_SPECIALISATIONS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and "done" in result.stdout, result.stderr


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("lens_kind", ["tensor", "int"])
def test_a_compiled_step(lens_kind, page):
    """Eager's result, its caches to the bit, and compiled once for all steps."""
    torch._dynamo.reset()
    problem = make_problem("cpu", (7, 7), page=page)
    eager = problem.copy()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k_cache, v_cache, k, v, lens, table):
        return attention_with_kvcache(q * 2.0, k_cache, v_cache, k, v, cache_lens=lens, block_table=table)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for count in range(4):
        lens = problem.lens + count if lens_kind == "tensor" else 7 + count
        q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        exact = [x.double() for x in (q, eager.k_cache, eager.v_cache, k, v)]
        out = compiled(q, problem.k_cache, problem.v_cache, k, v, lens, problem.table)
        plain = step(q, eager.k_cache, eager.v_cache, k, v, lens, problem.table)
        # Not the same bits: without values of lengths, PyTorch's kernel cannot be chosen.
        assert_parity(out, step(*exact, lens, problem.table), plain)
        assert torch.equal(problem.k_cache.nan_to_num(), eager.k_cache.nan_to_num())
        assert torch.equal(problem.v_cache.nan_to_num(), eager.v_cache.nan_to_num())
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_equals_eager_bit_by_bit():
    torch._dynamo.reset()
    options = {"softcap": 5.0, "window": (9, 0), "return_lse": True, "backend": "reference"}
    problem = make_problem("cpu", (7, 30), q_len=2, new=2)
    eager = problem.copy()
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager")
    ours = compiled(
        problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v, cache_lens=problem.lens, **options
    )
    assert all(map(torch.equal, ours, eager.run(**options)))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_gradient_is_refused_when_it_runs():
    torch._dynamo.reset()
    q, caches = Q.clone().requires_grad_(), [CACHE.clone() for _ in "kv"]
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, backend="aot_eager")
    out = compiled(q, *caches, cache_lens=torch.tensor([3, 4]))
    with pytest.raises(RuntimeError, match="attention_with_kvcache has no gradient"):
        out.sum().backward()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("page", [0, 16])
def test_opcheck(page, backend, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, uninitialised memory included
    problem = make_problem(device, (7, 30), page=page, q_len=2, new=2)
    caches = [t.nan_to_num() for t in (problem.k_cache, problem.v_cache)]
    new = problem.k, problem.v
    append = torch.ops.fastattn.kv_cache_append.default
    torch.library.opcheck(append, (*caches, *new, problem.lens, problem.table, None, None, None, backend))
    args = (None, None, problem.lens, problem.table, 2, None, 9, 0, 0.25, 5.0, 2, True, *[None] * 7, backend)
    attend = torch.ops.fastattn.attention_kvcache.default
    torch.library.opcheck(attend, (problem.q, *caches, *new, *args))
