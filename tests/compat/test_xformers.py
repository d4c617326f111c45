"""xformers' attention by a dense softmax with its conventions, and its bias classes where it is installed."""

import importlib
import inspect
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import fastattn.compat
from fastattn.compat import xformers as xops
from fastattn.testing import assert_parity

PACKAGE = "xformers"
B, M, N, H, K, KV = 2, 13, 19, 4, 16, 8
Q_LENGTHS, K_LENGTHS = [3, 1, 5], [7, 4, 6]


def named(name, **attributes):
    """An object of a class of this name, as a caller's own copy of xformers' would be."""
    bias = type(name, (), {})()
    vars(bias).update(attributes)
    return bias


def lengths(sizes, starts=None, ends=None):
    """What xformers keeps about the sequences of one dimension."""
    starts = [0, *itertools.accumulate(sizes)] if starts is None else starts
    info = SimpleNamespace(seqstart=torch.tensor(starts, dtype=torch.int32), seqstart_py=starts, max_seqlen=max(sizes))
    info.seqlen_py = sizes if ends is None else ends
    info.seqlen = torch.tensor(info.seqlen_py, dtype=torch.int32)
    return info


def band(rows, columns, left=math.inf, right=math.inf, top_left=False):
    """bool (rows, columns): which keys a query sees within so many to both sides of its position."""
    position = torch.arange(rows)[:, None] + (0 if top_left else columns - rows)
    distance = torch.arange(columns) - position
    return (distance <= right) & (distance >= -left)


def weights(q, k, bias, scale):
    """(softmax, log-sum-exp) of q (B, H, M, K) over k (B, H, N, K), 0 where nothing is seen."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse


def check(results, q, k, v, bias=0.0, scale=None):
    """``results`` of q, k, v (B, L, H, D) against the definition; ``bias`` broadcasts to (B, H, M, N)."""

    def dense(dtype):
        a, b, c = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        p, lse = weights(a, b, bias if isinstance(bias, float) else bias.to(dtype), scale)
        return (p @ c).transpose(1, 2), lse

    exact, plain = dense(torch.float64), dense(q.dtype)
    for name, a, b, c in zip(("out", "lse"), results, exact, plain, strict=False):
        assert_parity(a, b, c, name)


def forbidding(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


BIAS = torch.randn(B, H, M, N)
BIASES = {
    "none": (None, torch.zeros(M, N)),
    "tensor": (BIAS, BIAS),
    "broadcast": (BIAS[:1, :, :1], BIAS[:1, :, :1]),
    "causal": (xops.LowerTriangularMask(), forbidding(band(M, N, right=0, top_left=True))),
    "bottom right": (xops.LowerTriangularFromBottomRightMask(), forbidding(band(M, N, right=0))),
    "local": (xops.LocalAttentionFromBottomRightMask(4, 2), forbidding(band(M, N, 4, 2))),
    "causal local": (
        named("LowerTriangularFromBottomRightLocalAttentionMask", _window_size=5), forbidding(band(M, N, 4, 0))
    ),
    "causal and tensor": (
        named("LowerTriangularMaskWithTensorBias", _bias=BIAS), BIAS + forbidding(band(M, N, right=0, top_left=True))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_dense_layouts(name):
    attn_bias, dense = BIASES[name]
    q, k, v = torch.randn(B, M, H, K), torch.randn(B, N, H, K), torch.randn(B, N, H, KV)
    results = xops.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias, scale=0.3)
    assert results[0].shape == (B, M, H, KV) and results[1].shape == (B, H, M)
    check(results, q, k, v, dense, 0.3)
    for function in (xops.memory_efficient_attention, xops.memory_efficient_attention_forward):
        check((function(q, k, v, attn_bias, 0.0, 0.3, op=("any", "op")),), q, k, v, dense, 0.3)
    if not isinstance(attn_bias, torch.Tensor) and name != "causal and tensor":  # one head, without its dimension
        out, lse = xops.memory_efficient_attention_forward_requires_grad(q[:, :, 0], k[:, :, 0], v[:, :, 0], attn_bias)
        assert out.shape == (B, M, KV) and lse.shape == (B, M)
        check((out[:, :, None], lse[:, None]), q[:, :, :1], k[:, :, :1], v[:, :, :1], dense)


def test_tensor_bias_of_one_head():
    q, k = torch.randn(B, M, K), torch.randn(B, N, K)
    out = xops.memory_efficient_attention(q, k, k, BIAS[:, 0])
    check((out[:, :, None],), q[:, :, None], k[:, :, None], k[:, :, None], BIAS[:, :1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bias", [None, (B, 2, 3, M, N), (1, 1, 1, M, N), (B, 2, 1, M, N)], ids=str)
def test_groups(bias, learned):
    """(B, M, G, H, K); heads of a group may be one, expanded: then the gradient of each expanded head is its own."""
    q = torch.randn(B, M, 2, 3, K)
    k, v = (torch.randn(B, N, 2, 1, d).expand(-1, -1, -1, 3, -1) for d in (K, KV))
    leaves = [x.detach().requires_grad_(learned) for x in (q, k, v)]
    attn_bias = None if bias is None else torch.randn(bias)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(*leaves, attn_bias)
    assert out.shape == (B, M, 2, 3, KV) and lse.shape == (B, 2, 3, M)
    dense = 0.0 if attn_bias is None else attn_bias.expand(-1, 2, 3, -1, -1).flatten(1, 2)
    flat = [x.detach().flatten(2, 3) for x in (q, k, v)]
    check((out.flatten(2, 3), lse.flatten(1, 2)), *flat, dense)
    if learned:
        dout = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, leaves[2:], dout)

        def expected(dtype):
            own = dense if isinstance(dense, float) else dense.to(dtype)
            p, _ = weights(*(x.transpose(1, 2).to(dtype) for x in flat[:2]), own, None)
            return (p.mT @ dout.flatten(2, 3).transpose(1, 2).to(dtype)).transpose(1, 2).unflatten(2, (2, 3))

        assert_parity(gradient, expected(torch.float64), expected(torch.float32), "dv")


def diagonal(bands, columns, places):
    """(queries, columns): the bands of each sequence, key n of sequence s standing at ``places[s][n]``."""
    seen = torch.zeros(sum(Q_LENGTHS), columns, dtype=torch.bool)
    row = 0
    for own, place in zip(bands, places, strict=True):
        seen[row : row + len(own), place] = own
        row += len(own)
    return forbidding(seen)


PACKED_PLACES = [range(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(K_LENGTHS)])]
GAPS = [2, 10, 20]  # in a dimension of 30
GAPPY_PLACES = [range(a, a + n) for a, n in zip(GAPS, K_LENGTHS, strict=True)]
PAGES, FIRST = torch.tensor([[4, 1, 0], [3, 5, 8], [2, 6, 7]], dtype=torch.int32), [1, 2, 0]  # pages of 4


def in_pages(starts):
    return [
        [int(PAGES[s, n // 4]) * 4 + n % 4 for n in range(start, start + size)]
        for s, (start, size) in enumerate(zip(starts, K_LENGTHS, strict=True))
    ]


def paged(starts):
    ends = [a + n for a, n in zip(starts, K_LENGTHS, strict=True)]
    return {"k_seqinfo": lengths(K_LENGTHS, [*starts, -1], ends), "block_tables": PAGES, "page_size": 4}


PADDED = {"k_seqinfo": lengths(K_LENGTHS, [0, 10, 20, 30])}
PADDED_PLACES = [range(a, a + n) for a, n in zip((0, 10, 20), K_LENGTHS, strict=True)]
GAPPY = {"k_seqinfo": lengths(K_LENGTHS, [*GAPS, 30])}
PACKED = {"k_seqinfo": lengths(K_LENGTHS)}
WINDOW, SIDES, CAUSAL, TOP = (
    {"_window_size": 3},
    {"window_left": 2, "window_right": 1},
    {"right": 0},
    {"top_left": True},
)
DIAGONALS = {  # attributes, columns, where keys are, band
    "BlockDiagonalMask": (PACKED, 17, PACKED_PLACES, {}),
    "BlockDiagonalCausalMask": (PACKED, 17, PACKED_PLACES, CAUSAL | TOP),
    "BlockDiagonalCausalFromBottomRightMask": (PACKED, 17, PACKED_PLACES, CAUSAL),
    "BlockDiagonalCausalLocalAttentionMask": (PACKED | WINDOW, 17, PACKED_PLACES, CAUSAL | TOP | {"left": 2}),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (PACKED | WINDOW, 17, PACKED_PLACES, CAUSAL | {"left": 2}),
    "BlockDiagonalPaddedKeysMask": (PADDED, 30, PADDED_PLACES, {}),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (PADDED, 30, PADDED_PLACES, CAUSAL),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (PADDED | SIDES, 30, PADDED_PLACES, {"left": 2, "right": 1}),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (PADDED | WINDOW, 30, PADDED_PLACES, CAUSAL | {"left": 2}),
    "BlockDiagonalGappyKeysMask": (GAPPY, 30, GAPPY_PLACES, {}),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (GAPPY, 30, GAPPY_PLACES, CAUSAL),
    "PagedBlockDiagonalPaddedKeysMask": (paged([0, 0, 0]), 36, in_pages([0, 0, 0]), {}),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": (paged([0, 0, 0]), 36, in_pages([0, 0, 0]), CAUSAL),
    "PagedBlockDiagonalGappyKeysMask": (paged(FIRST), 36, in_pages(FIRST), {}),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": (paged(FIRST), 36, in_pages(FIRST), CAUSAL),
}  # fmt: skip


@pytest.mark.parametrize("name", DIAGONALS)
def test_sequences(name):
    attributes, columns, places, sides = DIAGONALS[name]
    attn_bias = named(name, q_seqinfo=lengths(Q_LENGTHS), **attributes)
    bands = [band(m, n, **sides) for m, n in zip(Q_LENGTHS, K_LENGTHS, strict=True)]
    q, k, v = torch.randn(1, sum(Q_LENGTHS), H, K), torch.randn(1, columns, H, K), torch.randn(1, columns, H, KV)
    dense = diagonal(bands, columns, places)
    used = torch.zeros(columns, dtype=torch.bool)
    used[[n for place in places for n in place]] = True
    results = xops.memory_efficient_attention_forward_requires_grad(
        q, *(x.masked_fill(~used[:, None, None], torch.nan) for x in (k, v)), attn_bias
    )
    assert results[1].shape == (1, H, sum(Q_LENGTHS))
    check(results, q, k, v, dense)
    groups = [x.unflatten(2, (2, 2)) for x in (q, k, v)]
    assert torch.equal(
        xops.memory_efficient_attention(*groups, attn_bias).flatten(2, 3),
        xops.memory_efficient_attention(q, k, v, attn_bias),
    )


@pytest.mark.parametrize("name", [*DIAGONALS, "LowerTriangularFromBottomRightLocalAttentionMask"])
def test_the_definitions_are_xformers(name):
    """Its classes, from the same lengths, say what the table above says."""
    try:
        theirs = importlib.import_module("xformers.ops.fmha.attn_bias")
    except ImportError:
        pytest.skip("xformers is not installed: pip install --no-deps xformers")
    if name not in DIAGONALS:
        bias = theirs.LowerTriangularFromBottomRightLocalAttentionMask(5)
        assert torch.equal(bias.materialize((M, N)), BIASES["causal local"][1])
        return
    attributes, columns, places, sides = DIAGONALS[name]
    kind, cpu = getattr(theirs, name), torch.device("cpu")
    queries = theirs._SeqLenInfo.from_seqlens(Q_LENGTHS, device=cpu)
    if "Paged" in name and "Gappy" in name:
        ends = [a + n for a, n in zip(FIRST, K_LENGTHS, strict=True)]
        starts, seqlen = (torch.tensor(x, dtype=torch.int32) for x in ([*FIRST, -1], ends))
        keys = theirs._GappySeqInfo(starts, max(K_LENGTHS), min(K_LENGTHS), [*FIRST, -1], seqlen, ends)
    elif "Paged" in name:
        keys = theirs._PaddedSeqLenInfo.from_seqlens_padded(K_LENGTHS, 12, device=cpu)
    elif "Gappy" in name:
        keys = theirs._GappySeqInfo.from_seqlens_gappy([*GAPS, 30], K_LENGTHS, False, device=cpu)
    elif "Padded" in name:
        keys = theirs._PaddedSeqLenInfo.from_seqlens_padded(K_LENGTHS, 10, device=cpu)
    else:
        keys = theirs._SeqLenInfo.from_seqlens(K_LENGTHS, device=cpu)
    rest = {key: value for key, value in attributes.items() if key != "k_seqinfo"}
    bias = kind(q_seqinfo=queries, k_seqinfo=keys, **rest)
    bands = [band(m, n, **sides) for m, n in zip(Q_LENGTHS, K_LENGTHS, strict=True)]
    dense = diagonal(bands, columns, places)
    notional = (sum(Q_LENGTHS), 36 if "Paged" in name else columns)
    assert torch.equal(bias.materialize(notional), dense)
    q, k = torch.randn(1, sum(Q_LENGTHS), H, K), torch.randn(1, columns, H, K)
    check((xops.memory_efficient_attention(q, k, k, bias),), q, k, k, dense)


def test_own_classes():
    xs = [torch.randn(2, 3, H, K), torch.randn(1, 5, H, K)]
    mask, x = xops.BlockDiagonalMask.from_tensor_list(xs)
    assert x.shape == (1, 11, H, K) and all(torch.equal(a, b) for a, b in zip(mask.split(x), xs, strict=True))
    causal = mask.make_causal()
    parts = causal.split(xops.memory_efficient_attention(x, x, x, causal))
    for part, own in zip(parts, xs, strict=True):
        check((part,), own, own, own, forbidding(band(own.shape[1], own.shape[1], right=0)))
    mask = xops.BlockDiagonalMask.from_seqlens(Q_LENGTHS, K_LENGTHS, device="cpu").make_causal_from_bottomright()
    q, k = torch.randn(1, sum(Q_LENGTHS), H, K), torch.randn(1, sum(K_LENGTHS), H, K)
    bands = [band(m, n, right=0) for m, n in zip(Q_LENGTHS, K_LENGTHS, strict=True)]
    check((xops.memory_efficient_attention(q, k, k, mask),), q, k, k, diagonal(bands, 17, PACKED_PLACES))


def test_without_a_usable_accelerator_a_mask_is_on_the_cpu(monkeypatch):
    """As with a CUDA build of PyTorch where no GPU is."""

    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    assert xops.BlockDiagonalMask.from_seqlens([2, 3]).q_seqinfo.seqstart.device.type == "cpu"


def test_dropout_is_applied_as_given():
    q = torch.randn(1, 6, H, K)
    torch.manual_seed(1)
    dropped = xops.memory_efficient_attention(q, q, q, p=0.5)
    torch.manual_seed(1)
    t = q.transpose(1, 2)
    assert torch.equal(dropped, fastattn.attention(t, t, t, dropout_p=0.5).transpose(1, 2))


Q = torch.randn(B, M, H, K)
PACK = named("BlockDiagonalMask", q_seqinfo=lengths(Q_LENGTHS), **PACKED)
BAD = {
    "subclass": ({"attn_bias": named("MyMask")}, NotImplementedError, "attn_bias: expected .*LowerTri.*, got MyMask"),
    "rank of bias": ({"attn_bias": BIAS[0]}, ValueError, r"attn_bias: expected 4 dimensions.*got shape \(4, 13, 19\)"),
    "boolean": ({"attn_bias": torch.ones(B, H, M, M, dtype=torch.bool)}, TypeError, "got torch.bool"),
    "output": ({"output_dtype": torch.float16}, NotImplementedError, "output_dtype: expected query.dtype"),
    "rank": ({"query": Q[0, 0]}, ValueError, r"query: expected \(B, M, H, K\)"),
    "ranks": ({"key": Q[0]}, ValueError, "key: expected"),
    "heads": ({"key": Q[:, :, :1]}, ValueError, r"key.shape\[2:-1\].*== \(4,\), got \(1,\).*expand them"),
    "batch": ({"attn_bias": PACK}, ValueError, "query: expected one batch entry with a BlockDiagonalMask, got 2"),
    "length": (
        dict.fromkeys(("query", "key", "value"), Q[:1]) | {"attn_bias": PACK}, ValueError,
        r"query.shape\[1\]: expected 9 as in attn_bias, got 13",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        xops.memory_efficient_attention(**{"query": Q, "key": Q, "value": Q, **change})


def test_signatures_are_xformers():
    """Order and defaults as in xformers 0.0.35: calls by position mean the same."""
    names = [name for name in xops.__all__ if name.startswith("memory")]
    for name in names:
        found = inspect.signature(getattr(xops, name)).parameters
        assert list(found) == ["query", "key", "value", "attn_bias", "p", "scale", "op", "output_dtype"]
        assert [p.default for p in found.values()][3:] == [None, 0.0, None, None, None]
        assert [p.name for p in found.values() if p.kind is p.KEYWORD_ONLY] == ["op", "output_dtype"]


def test_install_answers_the_imports(absent):
    before = set(sys.modules)
    with fastattn.compat.install("xformers"), fastattn.compat.install("xformers"):
        ops, fmha, attn_bias = (
            importlib.import_module(f"xformers.{name}") for name in ("ops", "ops.fmha", "ops.fmha.attn_bias")
        )
        assert sys.modules["xformers"].ops is ops and ops.fmha is fmha and fmha.attn_bias is attn_bias
        assert ops.memory_efficient_attention is xops.memory_efficient_attention
        assert attn_bias.BlockDiagonalMask is xops.BlockDiagonalMask
    assert set(sys.modules) == before
    with pytest.raises(ValueError, match="package: expected one of flash_attn, xformers, got 'apex'"):
        fastattn.compat.install("apex")


def test_install_never_hides_the_real_one(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, "xformers", type(sys)("xformers"))
    with pytest.raises(RuntimeError, match="expected no package xformers, found one"):
        fastattn.compat.install("xformers")
