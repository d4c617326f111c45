"""Windows, softcap, ALiBi slopes and sinks: each alone, in pairs, and all at once, with every other argument."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.backends.reference import blockwise
from fastattn.testing import assert_parity, check_attention

Q_LEN, KV_LEN, HEADS, KV_HEADS, DIM = 37, 71, 2, 1, 24


def terms(device):
    """Name -> arguments: one of each kind, learned where that is possible."""
    generator = torch.Generator().manual_seed(1)
    return {
        "causal": {"causal": True},
        "window": {"window": (30, 4)},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.tensor([0.5, -0.06], device=device, requires_grad=True)},
        "sinks": {"sinks": torch.randn(HEADS, generator=generator).to(device).requires_grad_()},
        "mask": {"mask": (torch.rand(1, 1, 1, KV_LEN, generator=generator) > 0.3).to(device)},
        "bias": {"bias": torch.randn(1, HEADS, Q_LEN, 1, generator=generator).to(device).requires_grad_()},
        "dropout": {"dropout_p": 0.2},
        "offset": {"q_offset": torch.tensor([-9], device=device)},
    }


NAMES = list(terms("cpu"))


def qkv(device, dtype):
    return (
        torch.randn(1, HEADS, Q_LEN, DIM).to(device, dtype),
        torch.randn(1, KV_HEADS, KV_LEN, DIM).to(device, dtype),
        torch.randn(1, KV_HEADS, KV_LEN, DIM).to(device, dtype),
    )


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_every_pair_of_arguments(pair, backend, device):
    cases = terms(device)
    check_attention(*qkv(device, torch.float32), backend=backend, **cases[pair[0]], **cases[pair[1]])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_all_at_once(dtype, backend, device):
    options = {name: value for case in terms(device).values() for name, value in case.items()}
    check_attention(*qkv(device, dtype), backend=backend, **options)


WINDOWS = [(0, 0), (5, 0), (None, -3), (-2, 9), (3, -3), (-40, None), (40, -40), (200, 200), (None, None)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_window(window, device, backend):
    """Sides may be negative, open, beyond both ends, or leave nothing visible."""
    check_attention(*qkv(device, torch.float32), backend=backend, window=window)
    check_attention(*qkv(device, torch.float32), backend="reference", window=window, q_offset=-11)


def test_window_is_the_mask_it_describes(device):
    q, k, v = qkv(device, torch.float32)
    distance = torch.arange(Q_LEN)[:, None] + 6 - torch.arange(KV_LEN)
    mask = ((distance <= 12) & (distance >= -3)).to(device)
    ours = fastattn.attention(q, k, v, window=(12, 3), q_offset=6, backend="reference")
    exact, masked = (
        fastattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask=mask, backend="reference")
        for dtype in (torch.float64, torch.float32)
    )
    assert_parity(ours, exact, masked)


def test_causal_is_a_window_open_to_the_left(device, backend):
    q, k, v = qkv(device, torch.float32)
    causal = fastattn.attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(causal, fastattn.attention(q, k, v, window=(None, 0), backend=backend))


def test_sink_is_a_key_without_a_value(device):
    """One more key whose score is the sink and whose value is 0, appended by hand."""
    q, k, v = qkv(device, torch.float32)
    sinks = torch.randn(HEADS, device=device)
    k_all, v_all = (F.pad(t.repeat_interleave(2, 1), (0, 0, 0, 1)) for t in (k, v))  # the added key scores 0 ...
    bias = torch.zeros(1, HEADS, Q_LEN, KV_LEN + 1, device=device)
    bias[..., -1] = sinks[:, None]  # ... plus the sink
    exact, plain = (
        fastattn.attention(
            *(x.to(dtype) for x in (q, k_all, v_all)), bias=bias.to(dtype), return_lse=True, backend="reference"
        )
        for dtype in (torch.float64, torch.float32)
    )
    ours = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend="reference")
    for name, *results in zip(("out", "lse"), ours, exact, plain, strict=True):
        assert_parity(*results, name)


def test_rows_that_see_nothing_keep_the_sink(device, backend):
    q, k, v = qkv(device, torch.float32)
    sinks = torch.tensor([0.3, -1.0], device=device)
    out, lse = fastattn.attention(q, k, v, window=(2, 2), q_offset=-500, sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    expected = sinks[None, :, None].expand_as(lse)
    assert_parity(lse, expected.double(), expected, "lse")


def test_alibi_slopes_may_differ_per_batch_entry(device, backend):
    q, k, v = (t.expand(3, -1, -1, -1) for t in qkv(device, torch.float32))
    slopes = torch.rand(3, HEADS, device=device).requires_grad_()
    check_attention(q, k, v, alibi_slopes=slopes, causal=True, backend=backend)
    check_attention(q, k, v, alibi_slopes=slopes, causal=True, backend="reference")


def test_gradcheck_in_float64():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    slopes = torch.rand(2, generator=generator, dtype=torch.float64).requires_grad_()
    sinks = torch.randn(2, generator=generator, dtype=torch.float64).requires_grad_()

    def call(q, k, v, slopes, sinks):
        return fastattn.attention(
            q, k, v, window=(3, 1), softcap=1.5, alibi_slopes=slopes, sinks=sinks, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradcheck(call, (q, k, v, slopes, sinks))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"window": 5}, TypeError, r"window: expected \(left, right\)"),
        ({"window": (1, 2, 3)}, TypeError, r"window: expected \(left, right\)"),
        ({"window": (1.5, 0)}, TypeError, r"window: expected \(left, right\)"),
        ({"window": (1 << 40, 0)}, ValueError, "window: expected sides of at most"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected a positive"),
        ({"softcap": torch.tensor(1.0)}, TypeError, "softcap: expected a float"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks.shape: expected \(2,\).* got \(3,\)"),
        ({"sinks": torch.zeros(HEADS, dtype=torch.int64)}, TypeError, "sinks.dtype: expected a floating-point"),
        ({"sinks": 1.0}, TypeError, "sinks: expected a Tensor, got float"),
        ({"alibi_slopes": torch.zeros(2, HEADS)}, ValueError, r"alibi_slopes.shape: expected \(2,\) or \(1, 2\)"),
        (
            {"alibi_slopes": torch.zeros(HEADS, device="meta")},
            ValueError,
            "alibi_slopes.device: expected cpu, got",
        ),
        ({"q_offset": 1 << 40}, ValueError, "q_offset: expected at most"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        fastattn.attention(*qkv("cpu", torch.float32), **options)


def test_pytorch_backend_refuses_each_with_its_name():
    for name, text in (("window", "no window"), ("softcap", "softcap"), ("alibi", "alibi_slopes"), ("sinks", "sinks")):
        with pytest.raises(ValueError, match=text):
            fastattn.attention(*qkv("cpu", torch.float32), backend="torch", **terms("cpu")[name])


def test_work_falls_with_the_window(monkeypatch):
    """The reference touches only the keys that a block of queries can see."""
    seen = []
    original = blockwise.scores

    def counting(q, k, *args):
        seen.append(q.shape[2] * k.shape[2])
        return original(q, k, *args)

    monkeypatch.setattr(blockwise, "scores", counting)
    q = torch.randn(1, 1, 2048, 8)
    fastattn.attention(q, q, q, window=(63, 0))
    assert sum(seen) < 2048 * 2048 / 8
