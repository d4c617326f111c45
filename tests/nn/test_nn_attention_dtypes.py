"""MultiheadAttention where masks, parameters and caches have other dtypes than the input, and empty nested tensors."""

import pytest
import torch
from torch import nn

import fastattn.nn as fnn
from fastattn.nn.cache import KVCache
from fastattn.testing import assert_parity

HALF = [torch.bfloat16, torch.float16]
LEAST = torch.finfo(torch.float32).min


def layer(dtype=torch.float32):
    """The same weights in every dtype, which older versions of PyTorch draw differently in each."""
    torch.manual_seed(0)
    return fnn.MultiheadAttention(8, 2, batch_first=True).to(dtype).eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, "half"])
@pytest.mark.parametrize("dtype", HALF)
def test_weights_where_a_mask_holds_the_least_number(dtype, mask_dtype, autocast):
    x = torch.randn(2, 4, 8)
    mask_dtype = dtype if mask_dtype == "half" else mask_dtype
    mask = torch.zeros(4, 4, dtype=mask_dtype)
    mask[1] = mask[2, 1:] = torch.finfo(mask_dtype).min
    mask[3, 0] = float("-inf")
    ours = layer() if autocast else layer(dtype)
    x = x if autocast else x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out, weights = ours(x, x, x, attn_mask=mask)
        fused, _ = ours(x, x, x, attn_mask=mask, need_weights=False)
    eager, x = layer(dtype)(x.to(dtype), x.to(dtype), x.to(dtype))[0], x.to(dtype).double()
    assert weights is not None and weights.isfinite().all() and out.isfinite().all()
    assert (weights[:, 2, 1:] == 0).all()
    if mask_dtype == torch.float64:  # beyond float32, in which both paths add the mask: nothing is allowed
        assert (weights[:, 1] == 0).all() and (fused[:, 1] == out[:, 1]).all()
        return
    if mask_dtype == torch.float16:  # scores still count beside its least number
        assert (weights[:, 1] > 0).all()
        return
    assert (weights[:, 1] == 0.25).all()  # all alike: the mean
    double = layer(dtype).double()
    expected = double(x, x, x, attn_mask=mask.double(), need_weights=False)[0]
    plain = double(x, x, x)[0]
    for actual in (out, fused):  # allowed what the same dtype loses without a mask
        assert_parity(actual - 0, expected, (eager.double() - plain + expected).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_of_two_least_numbers_is_empty_on_both_paths(dtype):
    x, least = torch.randn(2, 4, 8, dtype=dtype), torch.full((4, 4), LEAST)
    padding = torch.full((2, 4), LEAST)
    ours = layer(dtype)
    out, weights = ours(x, x, x, attn_mask=least, key_padding_mask=padding)
    fused, _ = ours(x, x, x, attn_mask=least, key_padding_mask=padding, need_weights=False)
    assert weights is not None and (weights == 0).all()
    assert torch.equal(out, fused)


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16])
def test_a_bias_of_another_dtype_than_the_weight(bias_dtype):
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    ours, theirs = layer(), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    for m in (ours, theirs):
        m.in_proj_bias = nn.Parameter(m.in_proj_bias.to(bias_dtype))
    rounded = theirs.in_proj_bias.float()
    theirs.in_proj_bias = nn.Parameter(rounded)
    for inputs in ((x, x, x), (x, memory, memory), (x, memory, memory.clone())):
        eager = theirs(*inputs)[0]
        assert_parity(ours(*inputs)[0], theirs.double()(*(t.double() for t in inputs))[0], eager)
        theirs.float()


@pytest.mark.parametrize("outside", [False, True], ids=["all under autocast", "caches made before"])
def test_steps_under_autocast(outside):
    torch.manual_seed(0)
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    decoder = fnn.TransformerDecoder(fnn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = encoder(x, mask=causal), decoder(x, memory, tgt_mask=causal)
        with torch.autocast("cpu", enabled=not outside):
            caches = encoder.make_cache(2, 5), decoder.make_cache(memory, 5)
        steps = [
            torch.cat([stack.step(x[:, i : i + 1], cache) for i in range(5)], 1)
            for stack, cache in zip((encoder, decoder), caches, strict=True)
        ]
    exact = encoder.double()(x.double(), mask=causal), decoder.double()(x.double(), memory.double(), tgt_mask=causal)
    for actual, expected, eager, cache in zip(steps, exact, whole, caches, strict=True):
        assert isinstance(cache, KVCache) and cache.k[0].dtype == torch.bfloat16
        assert_parity(actual.bfloat16(), expected, eager.bfloat16())


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_nested_tensors_without_an_element(lengths):
    encoder = fnn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    rows = torch.nested.as_nested_tensor([torch.randn(n, 8) for n in lengths])
    with torch.no_grad():
        out = encoder.self_attn(rows, rows, rows, need_weights=False)[0]
    assert [tuple(row.shape) for row in out.unbind()] == [(0, 8)] * len(lengths)
