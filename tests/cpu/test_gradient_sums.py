"""Sums that several tasks share, and operands at the edge of what views and lengths allow, on the CPU library."""

import pytest
import torch

from fastattn import BlockMask, attention
from fastattn.backends.cpu import library as cpu_library
from fastattn.testing import check_attention

pytestmark = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")

REPEATS = 15


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tiles_of_each_kind():
    """Per head and batch entry other tiles that are full and others that are partial."""
    generator = torch.Generator().manual_seed(0)
    partial = torch.rand(2, 4, 4, 4, generator=generator) < 0.5
    dropped = torch.rand(2, 4, 512, 512, generator=generator) < 0.3
    return BlockMask.from_mask(~(partial.repeat_interleave(128, 2).repeat_interleave(128, 3) & dropped))


SHARED = {  # heads of q and k, options
    "grouped heads": ((8, 4), {}),
    "block mask": ((4, 4), {"block_mask": tiles_of_each_kind()}),
    "an entry that sees nothing": ((2, 2), {"causal": True, "q_offset": torch.tensor([0, -600, 0, -600, 100, 0])}),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_bias_gradient_does_not_depend_on_the_number_of_threads(case, threads):
    heads, options = SHARED[case]
    torch.manual_seed(1)
    batch = 6 if "q_offset" in options else 2
    qkv = [torch.randn(batch, n, 512, 16) for n in (heads[0], heads[1], heads[1])]
    bias = torch.randn(1, 1, 512, 512, requires_grad=True)
    weights = torch.randn(batch, heads[0], 512, 16)

    def gradient(count):
        threads(count)
        (found,) = torch.autograd.grad(attention(*qkv, bias=bias, backend="cpu", **options), bias, weights)
        return found

    expected = gradient(1)
    for count in [2, 5] * REPEATS:
        assert torch.equal(gradient(count), expected)


@pytest.mark.parametrize("moved", ("q", "k", "v", "dout"))
def test_columns_may_lie_apart(moved):
    torch.manual_seed(2)
    inputs = {name: torch.randn(1, 2, 40, 24) for name in ("q", "k", "v", "dout")}

    def results():
        leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
        out = attention(*leaves, backend="cpu")
        return [out, *torch.autograd.grad(out, leaves, inputs["dout"])]

    expected = results()
    inputs[moved] = inputs[moved].mT.contiguous().mT
    assert inputs[moved].stride(-1) != 1
    for found, same in zip(results(), expected, strict=True):
        assert torch.equal(found, same)


@pytest.mark.parametrize("lengths", ((40, 40), (40, 0), (0, 40)))
def test_a_block_mask_without_tiles(lengths):
    torch.manual_seed(3)
    q, k = (torch.randn(1, 2, length, 8) for length in lengths)
    empty = BlockMask.from_mask(torch.zeros(*lengths, dtype=torch.bool))
    check_attention(q, k, k.clone(), block_mask=empty, backend="cpu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_sink_beside_keys_that_are_far(dtype):
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, heads, length, 16, dtype=dtype) for heads, length in ((4, 257), (2, 1), (2, 1)))
    sinks, slopes = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    check_attention(q, k, v, causal=True, alibi_slopes=slopes, sinks=sinks, backend="cpu")


@pytest.mark.parametrize("left", (3, 61, 125, 126))
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_a_key_that_windows_forbid_may_be_nan(left, softcap):
    torch.manual_seed(5)
    q, k, v = (torch.randn(1, 1, 300, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[:, :, -1] = torch.nan
        v[:, :, -1] = torch.nan
    out = attention(q, k, v, window=(left, 0), softcap=softcap, backend="cpu")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for result in (out, dq):
        assert result[:, :, :-1].isfinite().all()  # only the last row sees it
    for result in (dk, dv):  # of keys that the last row does not see
        assert result[:, :, : 299 - left].isfinite().all()
