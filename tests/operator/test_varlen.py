"""attention_varlen: every sequence by itself, with every argument it takes, and nothing for padding."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import attention, attention_varlen, backends
from fastattn.kernels import launch
from fastattn.spec import make_spec
from fastattn.testing import check_attention
from tests.support.attention_cases import BFLOAT, HALF, SINGLE

HEADS, KV_HEADS, DIM = 4, 2, 16

# (query lengths, key lengths): empty ones at the ends and in between, one row, more queries than keys, tile borders.
LENGTHS = {
    "mixed": ([5, 0, 35, 1, 33], [9, 20, 0, 40, 31]),
    "empty ends": ([0, 17, 0], [0, 50, 0]),
    "one": ([40], [70]),
    "tiles": ([32, 64, 16], [32, 64, 16]),
    "few": ([5, 0, 35, 2], [9, 20, 40, 0]),
    "many": ([3] * 9, [7] * 9),
    "nothing": ([0, 0], [0, 0]),
}


def cumulative(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def packed(device, name="mixed", dtype=SINGLE, rest=(0, 0), v_dim=DIM, heads=(HEADS, KV_HEADS)):
    """q, k, v and the two cu_seqlens; ``rest`` rows of no sequence behind the last."""
    lengths = LENGTHS[name]
    q_total, kv_total = (sum(x) + more for x, more in zip(lengths, rest, strict=True))
    q = torch.randn(q_total, heads[0], DIM).to(device, dtype)
    k = torch.randn(kv_total, heads[1], DIM).to(device, dtype)
    v = torch.randn(kv_total, heads[1], v_dim).to(device, dtype)
    cu_q, cu_k = (cumulative(x, device) for x in lengths)
    return (q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def terms(device, sequences=5, heads=HEADS):
    """Name -> arguments: one of each kind, learned where that is possible."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    return {
        "causal": {"causal": True},
        "top left": {"causal": True, "q_offset": 0},
        "offsets": {"q_offset": torch.arange(sequences, device=device) * 3 - 4},
        "window": {"window": (11, 4)},
        "softcap": {"softcap": 2.0},
        "slopes": {"alibi_slopes": leaf(heads)},
        "slopes of each": {"alibi_slopes": leaf(sequences, heads)},
        "sinks": {"sinks": leaf(heads)},
        "dropout": {"dropout_p": 0.3},
        "scale": {"scale": -0.4},
    }


NAMES = list(terms("cpu"))


def overlap(pair, device):
    cases = terms(device)
    return {*cases[pair[0]]} & {*cases[pair[1]]}


PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if not overlap(pair, "cpu")]


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_arguments(pair, backend, device):
    qkv, bounds = packed(device, "few", heads=(2, 1))
    cases = terms(device, sequences=4, heads=2)
    check_attention(*qkv, backend=backend, **bounds, **cases[pair[0]], **cases[pair[1]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, causal, device, backend):
    qkv, bounds = packed(device, lengths, v_dim=24, heads=(2, 1))
    check_attention(*qkv, backend=backend, causal=causal, **bounds)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=str)
def test_dtypes_and_several_key_heads(dtype, device, backend):
    qkv, bounds = packed(device, "mixed", dtype, v_dim=24)
    check_attention(*qkv, backend=backend, causal=True, **bounds)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_rows_of_no_sequence(backend, device):
    """Room behind the last sequence, as static shapes need: output 0, lse -inf, gradients 0, whatever stands there."""
    (q, k, v), bounds = packed(device, rest=(9, 5))
    for x, rest in ((q, 9), (k, 5), (v, 5)):
        x[-rest:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sinks = torch.zeros(HEADS, device=device, requires_grad=True)
    out, lse = attention_varlen(*leaves, **bounds, sinks=sinks, return_lse=True, backend=backend)
    assert (out[-9:] == 0).all() and (lse[:, -9:] == -torch.inf).all() and out.isfinite().all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :-9].sum(), [*leaves, sinks])
    for gradient, rest in zip(gradients, (9, 5, 5), strict=False):
        assert (gradient[-rest:] == 0).all()
    assert all(g.isfinite().all() for g in gradients)


def test_room_is_held_to_the_rule(device, backend):
    qkv, bounds = packed(device, rest=(9, 5))
    check_attention(*qkv, backend=backend, causal=True, **bounds)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_a_sequence_is_what_attention_computes_from_it(backend, device):
    """Bit for bit, dropout included: sequence s is batch entry s."""
    lengths, kv_lengths = [20] * 3, [33] * 3
    q, k, v = (torch.randn(3, n, h, DIM).to(device) for n, h in ((20, HEADS), (33, KV_HEADS), (33, KV_HEADS)))
    options = {"causal": True, "dropout_p": 0.4, "backend": backend, "return_lse": True}
    torch.manual_seed(4)
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    torch.manual_seed(4)
    cu_q, cu_k = cumulative(lengths, device), cumulative(kv_lengths, device)
    ours, our_lse = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, **options)
    assert torch.equal(ours, out.transpose(1, 2).flatten(0, 1))
    assert torch.equal(our_lse, lse.transpose(0, 1).flatten(1))


def test_one_cu_seqlens_for_both(device, backend):
    (q, k, v), bounds = packed(device, "tiles")
    expected = attention_varlen(q, k, v, bounds["cu_seqlens_q"], bounds["cu_seqlens_q"], causal=True, backend=backend)
    ours = attention_varlen(q, k, v, bounds["cu_seqlens_q"].long(), causal=True, backend=backend, max_seqlen_q=64)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", ["contiguous", "packed", "heads first", "columns first"])
def test_strides(layout, device, backend):
    (q, k, v), bounds = packed(device, "mixed", HALF)
    if layout == "packed":  # a third of one projection
        q, k, v = (torch.stack([x, x * torch.nan], 1)[:, 0] for x in (q, k, v))
    elif layout == "heads first":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif layout == "columns first":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    check_attention(q, k, v, backend=backend, causal=True, **bounds)


def test_repeats_are_bit_equal(device, backend):
    (q, k, v), bounds = packed(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    slopes = torch.rand(5, HEADS, device=device, requires_grad=True)

    def run():
        out = attention_varlen(*leaves, **bounds, alibi_slopes=slopes, causal=True, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), [*leaves, slopes])]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_every_tile_has_a_slot(block):
    """The slots of `ranges.locate`: as many as are launched, in order, never fewer than a sequence has tiles."""
    generator = torch.Generator().manual_seed(0)
    for sequences in (1, 2, 7, 64):
        lengths = torch.randint(0, 4 * block, (sequences,), generator=generator).tolist()
        bounds = cumulative(lengths)
        starts = (bounds // block + torch.arange(sequences + 1)).tolist()
        for (first, after), length in zip(itertools.pairwise(starts), lengths, strict=True):
            assert after - first >= -(-length // block)
        assert starts[-1] == launch.tiles(sum(lengths), block, bounds)
        assert launch.tiles(sum(lengths), block, bounds) <= sum(-(-n // block) for n in lengths) + sequences


@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_all_lengths_without_a_graph_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q, k, v, cu_q, cu_k, longest):
        return attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=longest, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for name in ("mixed", "tiles", "many"):
        (q, k, v), bounds = packed("cpu", name)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        longest = torch.tensor(64)
        gradients = torch.autograd.grad(compiled(*leaves, *bounds.values(), longest), leaves)
        expected = torch.autograd.grad(loss(*leaves, *bounds.values(), longest), leaves)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_autocast(device):
    (q, k, v), bounds = packed(device)
    with torch.autocast(device.type if isinstance(device, torch.device) else device, dtype=BFLOAT):
        out, lse = attention_varlen(q, k, v, **bounds, return_lse=True)
    assert out.dtype == BFLOAT and lse.dtype == SINGLE and lse.shape == (HEADS, q.shape[0])


def test_no_backend_is_chosen_silently():
    (q, k, v), bounds = packed("cpu")
    with pytest.raises(ValueError, match="'torch' cannot serve this call: it has no packed sequences"):
        attention_varlen(q, k, v, **bounds, backend="torch")
    spec = make_spec(*(x.transpose(0, 1)[None] for x in (q, k, v)), causal=True, **bounds)
    assert "5 packed sequences" in str(backends.explain(spec)) and "Lk - Lq" in str(backends.explain(spec))


ONE = torch.tensor([0, 4], dtype=torch.int32)
BAD = {
    "q rank": ({"q": torch.randn(1, 4, 2, 8)}, ValueError, r"q: expected 3 dimensions \(total, heads, head_dim\)"),
    "k type": ({"k": [1]}, TypeError, "k: expected a Tensor, got list"),
    "v total": ({"v": torch.randn(5, 2, 8)}, ValueError, r"v\.shape\[:2\]: expected k\.shape\[:2\] == \(4, 2\)"),
    "head dims": ({"k": torch.randn(4, 2, 9)}, ValueError, r"k\.shape\[-1\]: expected q\.shape\[-1\] == 8, got 9"),
    "heads": ({"q": torch.randn(4, 3, 8)}, ValueError, r"expected a positive multiple"),
    "bounds type": ({"cu_seqlens_q": [0, 4]}, TypeError, "cu_seqlens_q: expected a Tensor, got list"),
    "bounds dtype": ({"cu_seqlens_q": ONE.float()}, TypeError, "cu_seqlens_q.dtype: expected int32 or int64"),
    "bounds shape": ({"cu_seqlens_k": ONE[:1]}, ValueError, r"cu_seqlens_k.shape: expected \(sequences \+ 1,\)"),
    "two counts": (
        {"cu_seqlens_k": torch.tensor([0, 2, 4])}, ValueError, r"expected cu_seqlens_q.shape == \(2,\), got \(3,\)"
    ),
    "device": ({"cu_seqlens_q": ONE.to("meta")}, ValueError, "cu_seqlens_q.device: expected cpu, got meta"),
    "not from 0": ({"cu_seqlens_q": ONE + 1}, ValueError, r"cu_seqlens_q: expected to rise from 0 to at most 4, the"),
    "too far": ({"cu_seqlens_k": ONE * 2}, ValueError, r"cu_seqlens_k: .*got \[0, 8\]"),
    "too far for the keys alone": (
        {"k": torch.randn(3, 2, 8), "v": torch.randn(3, 2, 8)}, ValueError, r"cu_seqlens_k: .* at most 3, .*\[0, 4\]"
    ),
    "falling": (
        {"cu_seqlens_q": torch.tensor([0, 3, 1]), "cu_seqlens_k": torch.tensor([0, 1, 2])}, ValueError, "expected to r"
    ),
    "max length": ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q: expected an int, a Tensor or None, got float"),
    "slopes": ({"alibi_slopes": torch.rand(2, 2)}, ValueError, r"alibi_slopes.shape: expected \(2,\) or \(1, 2\)"),
    "offsets": ({"q_offset": torch.tensor([1, 2])}, ValueError, r"q_offset.shape: expected \(B,\) == \(1,\)"),
    "mask": ({"mask": torch.ones(4, 4, dtype=torch.bool)}, TypeError, "unexpected keyword argument 'mask'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(change, error, text):
    good = {name: torch.randn(4, 2, 8) for name in "qkv"} | {"cu_seqlens_q": ONE, "cu_seqlens_k": ONE}
    attention_varlen(**good)
    with pytest.raises(error, match=text):
        attention_varlen(**(good | change))
