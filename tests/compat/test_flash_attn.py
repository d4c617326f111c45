"""flash-attention's functions by their own definition: a dense softmax written here, with its conventions."""

import inspect
import itertools
import sys

import pytest
import torch

import fastattn.compat
from fastattn.compat import flash_attn
from fastattn.testing import assert_parity

PACKAGE = "flash_attn"
HALF, SINGLE = torch.float16, torch.float32
NAN = torch.nan


def dense(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """(out, lse) of one sequence: q (Lq, Hq, D), k and v (Lk, Hk, D), lse (Hq, Lq); slopes (Hq,)."""
    q_len, kv_len, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    key = torch.arange(kv_len)
    if slopes is not None:
        s = s - slopes.to(s.dtype)[:, None, None] * (position - key).abs()
    left, right = window
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool)
    if causal:
        hidden |= key > position
    if left >= 0:
        hidden |= key < position - left
    if right >= 0:
        hidden |= key > position + right
    s = s.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hij,jhd->ihd", p, v), lse


def check(results, per_sequence, options, slopes=None, name=""):
    """(out (L, Hq, Dv), lse (Hq, L)) of each sequence, as one each, against `dense` on the same inputs."""
    exact, eager, eager_lse = [], [], []
    for number, inputs in enumerate(per_sequence):
        own = None if slopes is None else slopes[number] if slopes.ndim == 2 else slopes
        exact.append(dense(*(x.double() for x in inputs), **options, slopes=own))
        eager.append(dense(*inputs, **options, slopes=own)[0])
        eager_lse.append(dense(*(x.float() for x in inputs), **options, slopes=own)[1])
    (out, lse), expected = results, [torch.cat(x, dim) for x, dim in zip(zip(*exact, strict=True), (0, 1), strict=True)]
    assert_parity(out, expected[0], torch.cat(eager), f"{name} out")
    assert_parity(lse, expected[1], torch.cat(eager_lse, 1), f"{name} lse")


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left": {"window": (4, -1)},
    "causal window": {"causal": True, "window": (5, 5)},
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"scale": 0.7},
}


def flash(options):
    """Under flash-attention's names."""
    names = {"window": "window_size", "scale": "softmax_scale"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("lengths", [(7, 12), (12, 7)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_func(options, lengths):
    shapes = ((lengths[0], 4), (lengths[1], 2), (lengths[1], 2))
    q, k, v = (torch.randn(2, n, h, 16, dtype=HALF) for n, h in shapes)
    out, lse, weights = flash_attn.flash_attn_func(q, k, v, **flash(options), return_attn_probs=True)
    assert weights is None and out.shape == q.shape and lse.shape == (2, 4, lengths[0]) and lse.dtype == SINGLE
    check((out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), list(zip(q, k, v, strict=True)), options)
    kv = torch.stack([k, v], 2)
    alone = flash_attn.flash_attn_func(q, k, v, **flash(options), deterministic=True)
    check((alone.flatten(0, 1), lse.transpose(0, 1).flatten(1)), list(zip(q, k, v, strict=True)), options)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, **flash(options)), alone)
    square = torch.stack([k, k + 1, v], 2)
    packed = flash_attn.flash_attn_qkvpacked_func(square, **flash(options))
    assert torch.equal(packed, flash_attn.flash_attn_func(*square.unbind(2), **flash(options)))


@pytest.mark.parametrize("per_entry", [False, True])
def test_alibi_and_gradients(per_entry):
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (5, 9, 9))
    slopes = torch.rand((2, 2) if per_entry else 2)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    check(
        (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), list(zip(q, k, v, strict=True)), {"causal": True}, slopes
    )
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), dout)

    def gradients(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        rows = zip(*leaves, slopes if per_entry else [slopes] * 2, strict=True)
        outs = torch.stack([dense(*x[:3], causal=True, slopes=x[3])[0] for x in rows])
        return torch.autograd.grad(outs, leaves, dout.to(dtype))

    for name, a, b, c in zip("qkv", ours, gradients(torch.float64), gradients(SINGLE), strict=True):
        assert_parity(a, b, c, f"d{name}")


def test_dropout_is_applied_as_given():
    q = torch.randn(1, 6, 2, 8)
    torch.manual_seed(1)
    dropped = flash_attn.flash_attn_func(q, q, q, dropout_p=0.5)
    torch.manual_seed(1)
    t = q.transpose(1, 2)
    assert torch.equal(dropped, fastattn.attention(t, t, t, dropout_p=0.5).transpose(1, 2))
    assert not torch.equal(dropped, flash_attn.flash_attn_func(q, q, q))


Q_LENGTHS, K_LENGTHS = [3, 0, 8, 1], [5, 4, 8, 6]


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen(options, paged):
    q, k, v = (torch.randn(sum(n), h, 16) for n, h in ((Q_LENGTHS, 4), (K_LENGTHS, 2), (K_LENGTHS, 2)))
    cu_q, cu_k = bounds(Q_LENGTHS), bounds(K_LENGTHS)
    sequences = [
        (q[a:b], k[c:d], v[c:d])
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    ]
    keys, table = (k, v), None
    if paged:  # pages of 3, in any order, NaN where nothing is
        table = torch.randperm(16, dtype=torch.int32).view(4, 4)
        keys = tuple(torch.full((16, 3, *x.shape[1:]), NAN) for x in (k, v))
        for s, (_, *own) in enumerate(sequences):
            for cache, content in zip(keys, own, strict=True):
                for j, row in enumerate(content):
                    cache[table[s, j // 3], j % 3] = row
    result = flash_attn.flash_attn_varlen_func(
        q, *keys, cu_q, cu_k, max(Q_LENGTHS), max(K_LENGTHS), **flash(options), return_attn_probs=True,
        block_table=table,
    )  # fmt: skip
    check(result[:2], sequences, options)
    if not paged:
        kv = torch.stack([k, v], 1)
        out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 8, 8, **flash(options))
        assert torch.equal(out, flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 8, 8, **flash(options)))
        qkv = torch.stack([k, v, k], 1)
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_k, 8, **flash(options))
        expected = flash_attn.flash_attn_varlen_func(k, v, k, cu_k, cu_k, 8, 8, **flash(options))
        assert torch.equal(out, expected)


def turn(x, cos, sin, positions, interleaved):
    """One sequence (L, H, D), number by number."""
    out, half = x.clone(), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = (table[positions, i][:, None] for table in (cos, sin))
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


LENS = [13, 4, 0]
PLACES = {
    "plain": {},
    "rows": {"capacity": 32, "rows": [4, 0, 2]},
    "odd rows": {"capacity": 27, "rows": [4, 0, 2]},
    "leftpad": {"leftpad": [2, 4, 0]},
    "leftpad rows": {"leftpad": [5, 0, 0], "rows": [1, 3, 0]},
    "pages": {"pages": 16},
    "leftpad pages": {"pages": 16, "leftpad": [3, 1, 0]},
}


@pytest.mark.parametrize("rotary", [None, True, False], ids=["", "interleaved", "halves"])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "softcap"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_with_kvcache(place, options, rotary):
    options, new, q_len, dim = OPTIONS[options], 3, 3, 16
    capacity, rows = place.get("capacity", 32), torch.tensor(place.get("rows", range(3)))
    left = place.get("leftpad", [0] * 3)
    q = torch.randn(3, q_len, 4, dim)
    k, v = torch.randn(2, 3, new, 2, dim)
    content = torch.randn(2, 3, capacity, 2, dim)
    table = torch.randperm(8, dtype=torch.int32)[:6].view(3, 2) if "pages" in place else None
    caches = torch.full((2, 8, 16, 2, dim) if table is not None else (2, 5, capacity, 2, dim), NAN)

    def at(b, j):
        return (table[b, j // 16], j % 16) if table is not None else (rows[b], j)

    for b, n in enumerate(LENS):
        for j in range(n):
            caches[(slice(None), *at(b, j))] = content[:, b, j]
    cos, sin = (f(torch.rand(40, 4) * 6) for f in (torch.cos, torch.sin))
    tables = {} if rotary is None else {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    given = {"cache_batch_idx": rows if "rows" in place or table is None else None, "block_table": table}
    if "leftpad" in place:
        given["cache_leftpad"] = torch.tensor(left, dtype=torch.int32)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, **tables, cache_seqlens=torch.tensor(LENS, dtype=torch.int32), **given, **flash(options),
        return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (3, 4, q_len)
    sequences = []
    for b, n in enumerate(LENS):
        query, key = q[b], k[b]
        stored, values = (torch.stack([cache[at(b, n + j)] for j in range(new)]) for cache in caches)
        assert torch.equal(values, v[b])
        if rotary is None:
            assert torch.equal(stored, key)
        else:
            stands_still = not options
            steps = torch.arange(q_len) * (not stands_still)
            query = turn(query, cos, sin, n + steps, rotary)
            key, exact = (
                turn(*(x.to(dtype) for x in (key, cos, sin)), n + torch.arange(new), rotary)
                for dtype in (torch.float32, torch.float64)
            )
            assert_parity(stored, exact, key, "rotated keys")
        kept = [torch.cat([content[0, b, :n], key]), torch.cat([content[1, b, :n], v[b]])]
        sequences.append((query, *(x[left[b] :] for x in kept)))
    check((out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), sequences, options)


def test_with_kvcache_a_full_cache_and_one_length():
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 8)
    out = flash_attn.flash_attn_with_kvcache(q, k, v, num_splits=2)
    assert torch.equal(out, flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=20))
    short = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=7)
    lens = torch.tensor([7, 7], dtype=torch.int32)
    padded = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, cache_leftpad=torch.zeros_like(lens))
    sequences = [(q[b], k[b, :7], v[b, :7]) for b in range(2)]
    exact, eager = (torch.stack([dense(*(x.to(t) for x in s))[0] for s in sequences]) for t in (torch.float64, q.dtype))
    assert_parity(short, exact, eager, "short")
    assert_parity(padded, exact, eager, "padded")


CACHE = {"q": torch.randn(1, 1, 2, 8), "k_cache": torch.randn(1, 16, 2, 8), "v_cache": torch.randn(1, 16, 2, 8)}
ONE = torch.zeros(1, dtype=torch.int32)
NEW = torch.randn(1, 1, 2, 8)
BAD = {
    "both places": ({"cache_batch_idx": ONE, "block_table": ONE[None]}, NotImplementedError, "cache_batch_idx.*choose"),
    "q alone": ({"rotary_cos": NEW[0, 0], "rotary_sin": NEW[0, 0]}, NotImplementedError, "rotary_cos.*turn q before"),
    "one table": ({"rotary_cos": NEW[0, 0], "k": NEW, "v": NEW, "cache_seqlens": 3}, ValueError, "both or neither"),
    "no length": ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens: expected the length of the cache"),
    "k alone": ({"k": NEW, "cache_seqlens": 3}, ValueError, "k, v: expected both or neither"),
    "full": (
        {"k": NEW, "v": NEW, "cache_seqlens": 16, "cache_leftpad": ONE}, ValueError, "cache_lens: expected 0 to 15"
    ),
    "before": ({"cache_seqlens": 7, "cache_leftpad": ONE - 1}, ValueError, "kv_start: expected 0 to 16, got -1"),
    "beyond": ({"cache_seqlens": 7, "cache_leftpad": ONE + 17}, ValueError, "kv_start: expected 0 to 16, got 17"),
    "starts": ({"cache_seqlens": 7, "cache_leftpad": ONE[:0]}, ValueError, "kv_start.shape: expected .B,."),
    "window": ({"window_size": 3}, ValueError, "window_size: expected .left, right."),
    "wide": (
        {"rotary_cos": torch.ones(9, 5), "rotary_sin": torch.ones(9, 5), "k": NEW, "v": NEW, "cache_seqlens": 0},
        ValueError, "R at most D == 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        flash_attn.flash_attn_with_kvcache(**CACHE | change)


def test_packed_shapes():
    with pytest.raises(ValueError, match=r"qkv: expected \(B, L, 3, H, D\), got shape"):
        flash_attn.flash_attn_qkvpacked_func(torch.randn(1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match=r"kv: expected \(total, 2, H, D\), got shape"):
        flash_attn.flash_attn_varlen_kvpacked_func(NEW[0], torch.randn(4, 3, 2, 8), ONE, ONE, 1, 1)


def test_signatures_are_flash_attentions():
    """Order and defaults as in flash_attn 2.8: calls by position mean the same."""
    common = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    bounds_of_both = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    expected = {
        "flash_attn_func": f"q k v {common}",
        "flash_attn_kvpacked_func": f"q kv {common}",
        "flash_attn_qkvpacked_func": f"qkv {common}",
        "flash_attn_varlen_func": f"q k v {bounds_of_both} {common} block_table",
        "flash_attn_varlen_kvpacked_func": f"q kv {bounds_of_both} {common}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {common}",
        "flash_attn_with_kvcache": (
            "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
            "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
        ),
    }
    assert sorted(expected) == sorted(flash_attn.__all__)
    defaults = {"window_size": (-1, -1), "softcap": 0.0, "dropout_p": 0.0, "causal": False, "num_splits": 0}
    for name, parameters in expected.items():
        found = inspect.signature(getattr(flash_attn, name)).parameters
        assert list(found) == parameters.split()
        assert all(found[p].default == value for p, value in defaults.items() if p in found)


def imported():
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
    from flash_attn.flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func, flash_attn_varlen_func


def test_install_answers_the_import(absent):
    before = set(sys.modules)
    with fastattn.compat.install():
        assert imported() == (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func)
        assert fastattn.compat.install() is not None  # a second call changes nothing
    assert set(sys.modules) == before
    fastattn.compat.install()
    assert sys.modules["flash_attn"].__version__.startswith("2.")
    fastattn.compat.uninstall()
    fastattn.compat.uninstall()
    assert "flash_attn" not in sys.modules


def test_install_never_hides_the_real_one(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, "flash_attn", type(sys)("flash_attn"))
    with pytest.raises(RuntimeError, match="expected no package flash_attn, found one"):
        fastattn.compat.install()
    fastattn.compat.uninstall()
    assert "flash_attn" in sys.modules
