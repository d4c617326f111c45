"""seqused_k: packed sequences that use the first of their keys; the others count for nothing and cost nothing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import attention_varlen, explain_varlen
from fastattn.backends.cpu import library
from fastattn.testing import check_attention
from tests.operator.test_varlen import LENGTHS, cumulative, packed
from tests.support.attention_cases import BFLOAT, HALF, SINGLE, count_tiles

HEADS, KV_HEADS = 2, 1
ROOM = 45
"""Keys of each sequence of "few" in memory."""
BACKENDS = ["triton", "cpu", "reference"]


def with_room(device, dtype=SINGLE, rest=7, poison=torch.nan, kind=torch.int32):
    """What `packed` gives, each sequence with `ROOM` keys in memory, `poison` behind those that it uses; those too."""
    (q, k, v), bounds = packed(device, "few", dtype, heads=(HEADS, KV_HEADS))
    lengths = LENGTHS["few"][1]
    slots = [x.new_full((len(lengths) * ROOM + rest, *x.shape[1:]), poison) for x in (k, v)]
    first = bounds["cu_seqlens_k"].tolist()
    for number, n in enumerate(lengths):
        for x, slot in zip((k, v), slots, strict=True):
            slot[number * ROOM : number * ROOM + n] = x[first[number] : first[number] + n]
    room = {
        "cu_seqlens_q": bounds["cu_seqlens_q"].to(kind), "cu_seqlens_k": cumulative([ROOM] * 4, device, kind),
        "seqused_k": torch.tensor(lengths, dtype=kind, device=device),
    }  # fmt: skip
    used = torch.cat([torch.arange(number * ROOM, number * ROOM + n) for number, n in enumerate(lengths)])
    return ((q, k, v), bounds), ((q, *slots), room), used.to(device)


def terms(device):
    learned = {"alibi_slopes": (4, HEADS), "sinks": (HEADS,)}
    leaves = {name: torch.randn(shape).to(device).requires_grad_() for name, shape in learned.items()}
    return {
        "causal": {"causal": True},
        "window": {"window": (11, 4), "alibi_slopes": leaves["alibi_slopes"]},
        "offsets": {"q_offset": torch.arange(4, device=device) * 3 - 4, "sinks": leaves["sinks"], "causal": True},
        "dropout": {"dropout_p": 0.3, "softcap": 2.0},
    }


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=str)
def test_the_rule(dtype, device, backend):
    check_attention(*with_room(device, dtype, poison=0.5)[1][0], backend=backend, causal=True,
                    **with_room(device)[1][1])  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("term", terms("cpu"))
def test_it_is_the_call_without_the_unused_keys(term, backend, device):
    """Bit for bit, with NaN in unused keys, lengths of either type; their gradients are 0."""
    tight, roomy, used = with_room(device, kind=torch.int64 if term == "causal" else torch.int32)
    options = terms(device)[term]
    learned = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for qkv, bounds in (tight, roomy):
        leaves = [x.detach().requires_grad_() for x in qkv]
        torch.manual_seed(3)
        out, lse = attention_varlen(*leaves, **bounds, **options, backend=backend, return_lse=True)
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + seen.sum(), [*leaves, *learned])])
    (out, lse, dq, dk, dv, *others), (our_out, our_lse, our_dq, our_dk, our_dv, *our_others) = results
    for expected, ours in zip((out, lse, dq, *others), (our_out, our_lse, our_dq, *our_others), strict=True):
        assert torch.equal(ours, expected)
    for expected, ours in ((dk, our_dk), (dv, our_dv)):
        assert torch.equal(ours[used], expected)
        unused = torch.ones(len(ours), dtype=torch.bool, device=device)
        unused[used] = False
        assert (ours[unused] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend, device):
    _, ((q, k, v), bounds), _ = with_room(device, poison=0.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention_varlen(*leaves, **bounds, causal=True, backend=backend)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    _, dk, dv = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    unused = slice(LENGTHS["few"][1][0], ROOM)
    assert (dk[unused] == 0).all() and (dv[unused] == 0).all() and dk.abs().sum() > 0


@pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")
def test_unused_keys_are_not_even_packed():
    """Room for 2**29 keys: the memory that they would take packed, nobody has."""
    q, k = torch.randn(3, HEADS, 16), torch.randn(1, KV_HEADS, 16).expand(1 << 29, -1, -1)
    starts, ends = cumulative([1, 2]), cumulative([1 << 28] * 2)
    used = torch.tensor([3, 5])
    out = attention_varlen(q, k, k, starts, ends, seqused_k=used, causal=True, backend="cpu")
    expected = attention_varlen(q, k[:8], k[:8], starts, cumulative([3, 5]), causal=True, backend="cpu")
    assert torch.equal(out, expected)


def test_unused_tiles_are_not_visited(monkeypatch):
    counts = count_tiles(monkeypatch)
    for qkv, bounds in with_room("cpu")[:2]:
        counts.append(0)
        attention_varlen(*qkv, **bounds, backend="triton")
    assert counts[-1] == counts[-2] > 0


@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_all_lengths_without_a_graph_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True, backend=counter)
    _, (qkv, bounds), _ = with_room("cpu")
    leaves = [x.requires_grad_() for x in qkv]
    counts = []
    for less in (0, 3):
        own = bounds | {"seqused_k": (bounds["seqused_k"] - less).clamp(min=0)}
        ours, expected = (f(*leaves, **own, causal=True) for f in (compiled, attention_varlen))
        assert torch.equal(ours, expected)
        gradients = (torch.autograd.grad(x.sum(), leaves) for x in (ours, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    torch._dynamo.reset()


def test_explain_and_errors():
    _, ((q, k, v), bounds), _ = with_room("cpu")
    assert "4 packed sequences, some of their keys" in explain_varlen(q, k, v, **bounds).call
    for used, text in (([9, 20, 46, 0], "expected 0 to the 45 keys of sequence 2, got 46"),
                       ([9, -1, 0, 0], "expected 0 to the 45 keys of sequence 1, got -1")):  # fmt: skip
        with pytest.raises(ValueError, match=f"seqused_k: {text}"):
            attention_varlen(q, k, v, **bounds | {"seqused_k": torch.tensor(used)})
    with pytest.raises(ValueError, match=r"seqused_k.shape: expected \(sequences,\) == \(4,\), got \(3,\)"):
        attention_varlen(q, k, v, **bounds | {"seqused_k": bounds["seqused_k"][1:]})
