"""The Triton kernels against the specification: out, lse and every gradient of one call, by the one rule.

On a GPU the compiled kernels run; elsewhere Triton's interpreter runs the same source. The interpreter is slow, so axes
are combined pairwise: every value of an axis occurs in several cases, not in all.
"""

import pytest
import torch

from fastattn import attention, reference
from fastattn.kernels import config
from fastattn.testing import assert_parity, check_attention
from tests.support.attention_cases import (
    BFLOAT,
    DOUBLE,
    DTYPE_NAMES,
    HALF,
    INF,
    KERNEL_DTYPES,
    LAYOUTS,
    LENGTHS,
    SINGLE,
    broadcast_shapes,
    make_bias,
    make_mask,
    make_qkv,
    relayout,
    shape_id,
)

MHA, GQA, MQA = (2, 2), (4, 2), (3, 1)
TOP_LEFT, BOTTOM_RIGHT = {"causal": True, "q_offset": 0}, {"causal": True}
NOT_CAUSAL = {}

# (lengths, (D, Dv), (Hq, Hk), dtype, causal)
CASES = [
    ((1, 1), (64, 64), MHA, HALF, NOT_CAUSAL),
    ((1, 1), (16, 16), GQA, BFLOAT, BOTTOM_RIGHT),
    ((1, 128), (128, 128), GQA, HALF, BOTTOM_RIGHT),
    ((1, 128), (59, 59), MQA, BFLOAT, NOT_CAUSAL),
    ((1, 128), (40, 40), MHA, SINGLE, TOP_LEFT),
    ((128, 1), (80, 80), MHA, BFLOAT, BOTTOM_RIGHT),
    ((128, 1), (64, 64), MQA, SINGLE, TOP_LEFT),
    ((113, 203), (64, 64), GQA, BFLOAT, BOTTOM_RIGHT),
    ((113, 203), (111, 111), MHA, HALF, NOT_CAUSAL),
    ((113, 203), (256, 256), MHA, HALF, BOTTOM_RIGHT),
    ((203, 113), (40, 40), MQA, HALF, BOTTOM_RIGHT),
    ((203, 113), (16, 16), MHA, SINGLE, NOT_CAUSAL),
    ((128, 217), (16, 16), MHA, BFLOAT, NOT_CAUSAL),
    ((128, 217), (80, 80), MQA, HALF, TOP_LEFT),
    ((217, 128), (59, 59), GQA, SINGLE, TOP_LEFT),
    ((108, 256), (128, 128), MHA, BFLOAT, NOT_CAUSAL),
    ((108, 256), (40, 40), GQA, HALF, BOTTOM_RIGHT),
    ((256, 108), (64, 64), MHA, HALF, BOTTOM_RIGHT),
    ((239, 1), (16, 16), MQA, HALF, BOTTOM_RIGHT),
    ((239, 1), (111, 111), GQA, BFLOAT, NOT_CAUSAL),
    ((1, 239), (256, 256), MHA, BFLOAT, BOTTOM_RIGHT),
    ((1, 239), (80, 80), GQA, SINGLE, NOT_CAUSAL),
    ((127, 513), (64, 64), MHA, SINGLE, TOP_LEFT),
    ((127, 513), (59, 59), MHA, BFLOAT, BOTTOM_RIGHT),
    ((513, 127), (40, 40), MHA, HALF, BOTTOM_RIGHT),
    # Dv is not D; neither a power of two nor even.
    ((65, 100), (64, 16), MHA, HALF, BOTTOM_RIGHT),
    ((65, 100), (40, 111), GQA, BFLOAT, NOT_CAUSAL),
    ((100, 65), (59, 128), MHA, SINGLE, TOP_LEFT),
    ((33, 70), (1, 1), MHA, HALF, BOTTOM_RIGHT),
    ((33, 70), (1, 33), MQA, SINGLE, NOT_CAUSAL),
    ((33, 70), (17, 1), GQA, BFLOAT, TOP_LEFT),
    ((33, 70), (8, 256), MHA, HALF, NOT_CAUSAL),
]


def case_id(value):
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, dict):
        return "full" if not value else "top_left" if value.get("q_offset") == 0 else "bottom_right"
    return shape_id(value)


@pytest.mark.parametrize(("lengths", "dims", "heads", "dtype", "causal"), CASES, ids=case_id)
def test_shapes(device, backend, lengths, dims, heads, dtype, causal):
    if (backend, device) == ("triton", "cpu"):  # where tiles are half as large, too
        lengths = [(n + 1) // 2 for n in lengths]
    check_attention(*make_qkv(device, lengths, dims=dims, heads=heads, dtype=dtype), backend=backend, **causal)


FULL = (2, 2, 33, 70)  # B, H, Lq, Lk: an inner tile and a tail


def qkv_for(device, full, dtype=HALF, **options):
    batch, heads, *lengths = full
    return make_qkv(device, lengths, batch=batch, heads=(heads, heads), dtype=dtype, **options)


# Each shape that broadcasts, of either; every dimension is broadcast by neither, by either and by both.
PAIRS = [(bits, (bits * 7 + 3) % 16) for bits in range(16)]


@pytest.mark.parametrize(("mask_bits", "bias_bits"), PAIRS, ids=lambda bits: f"{bits:04b}")
def test_every_broadcast_shape_of_mask_and_bias(device, backend, mask_bits, bias_bits):
    shapes = broadcast_shapes(FULL)
    causal = {"causal": True, "q_offset": None if mask_bits % 8 in (0, 5) else -7}
    check_attention(
        *qkv_for(device, FULL, dtype=(HALF, BFLOAT)[mask_bits % 2]),
        backend=backend,
        mask=make_mask(device, shapes[mask_bits], keep=0.5),
        bias=make_bias(device, shapes[bias_bits], requires_grad=True),
        **(causal if mask_bits.bit_count() % 2 == 0 else {}),
    )


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [(HALF, BFLOAT), (HALF, DOUBLE), (BFLOAT, HALF), (SINGLE, HALF), (SINGLE, DOUBLE)],
    ids=DTYPE_NAMES.get,
)
def test_bias_of_any_dtype(device, backend, dtype, bias_dtype):
    bias = make_bias(device, (1, 2, 33, 70), bias_dtype, requires_grad=True)
    check_attention(*make_qkv(device, (33, 70), dtype=dtype), backend=backend, bias=bias)


@pytest.mark.parametrize("ndim", [0, 1, 2, 3])
def test_mask_and_bias_of_fewer_dimensions_align_at_the_right(device, backend, ndim):
    full = (2, 33, 70)
    mask, bias = make_mask(device, full[ndim:]), make_bias(device, full[3 - ndim :], requires_grad=True)
    check_attention(*make_qkv(device, (33, 70)), backend=backend, mask=mask, bias=bias)


@pytest.mark.parametrize("layout", ["mT", "stepped", "expanded", "offset"])
def test_mask_and_bias_of_any_strides(device, backend, layout):
    def relaid(x):
        if layout == "mT":
            return x.mT.contiguous().mT
        if layout == "stepped":
            return x.repeat_interleave(2, 3).repeat_interleave(3, 2)[..., 1::3, 1::2]
        if layout == "expanded":  # stride 0 along heads and queries, but of full size
            return x[:, :1, :1].expand(x.shape)
        return torch.nn.functional.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2]

    mask, bias = relaid(make_mask(device, (1, 2, 33, 70))), relaid(make_bias(device, (1, 2, 33, 70)))
    check_attention(*make_qkv(device, (33, 70)), backend=backend, causal=True, mask=mask, bias=bias.requires_grad_())


# Every layout occurs in every place.
LAYOUT_TRIPLES = [(LAYOUTS[i], LAYOUTS[(i + 2) % 6], LAYOUTS[(i * 5 + 1) % 6]) for i in range(6)]


@pytest.mark.parametrize("layouts", LAYOUT_TRIPLES, ids="-".join)
@pytest.mark.parametrize("dims", [(16, 16), (59, 40)], ids=shape_id)
def test_any_strides(device, backend, layouts, dims):
    q, k, v = make_qkv(device, (33, 70), heads=(2, 1) if dims == (16, 16) else (1, 1), dims=dims)
    q, k, v = (relayout(x, layout) for x, layout in zip((q, k, v), layouts, strict=True))
    check_attention(q, k, v, backend=backend, causal=True)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_inputs(device, backend, dim):
    """Stride 0 along one dimension of q, k and v; gradients still have an element per position."""
    q, k, v = make_qkv(device, (33, 33), batch=2)
    q, k, v = (x.narrow(dim, 0, 1).expand_as(x) for x in (q, k, v))
    check_attention(q, k, v, backend=backend)


@pytest.mark.parametrize("q_offset", [0, 3, 37, 38, 69, 200, -1, -30, -32, -33, -200, -(2**30)])
def test_causal_with_any_offset(device, backend, q_offset):
    """From everything forbidden, through tiles without a visible key, to everything allowed."""
    check_attention(*make_qkv(device, heads=(1, 1)), backend=backend, causal=True, q_offset=q_offset)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_causal_with_an_offset_per_batch_entry(device, backend, dtype):
    limits = torch.iinfo(torch.int32)
    offsets = torch.tensor([0, 37, -20, limits.max, limits.min], dtype=dtype, device=device)
    q, k, v = make_qkv(device, (33, 70), heads=(1, 1), batch=len(offsets))
    check_attention(q, k, v, backend=backend, causal=True, q_offset=offsets)


def test_offset_beyond_32_bits_in_a_tensor(device, backend):
    q, k, v = make_qkv(device, (33, 70), batch=2)
    offsets = torch.tensor([2**40, -(2**40)], device=device)
    check_attention(q, k, v, backend=backend, causal=True, q_offset=offsets)


def test_offsets_may_be_strided(device, backend):
    q, k, v = make_qkv(device, (33, 70), batch=3)
    offsets = torch.tensor([5, 999, -10, 999, 40, 999], device=device)[::2]
    check_attention(q, k, v, backend=backend, causal=True, q_offset=offsets)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "sizes", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 7), (0, 0, 0)], ids=["Lq=0", "Lk=0", "L=0", "B=0", "B=L=0"]
)
def test_empty_tensors(device, backend, sizes, causal):
    batch, q_len, kv_len = sizes
    bias = make_bias(device, (1, 2, q_len, kv_len), requires_grad=True)
    mask = make_mask(device, (batch, 1, 1, kv_len))
    q, k, v = make_qkv(device, (q_len, kv_len), batch=batch)
    check_attention(q, k, v, backend=backend, causal=causal, mask=mask, bias=bias)
    check_attention(q, k, v, backend=backend, causal=causal, dropout_p=0.5)


def forbidden_rows(device, way):
    """Options under which the rows 0 to 9 of a problem of LENGTHS see no key, but all others see some."""
    rows = (torch.arange(LENGTHS[0], device=device) < 10)[:, None]
    if way == "mask":
        return {"mask": ~rows}
    if way == "bias":
        return {"bias": torch.zeros(LENGTHS[0], 1, device=device).masked_fill(rows, -INF)}
    if way == "full bias":
        return {"bias": torch.randn(1, 2, *LENGTHS).to(device).masked_fill(rows, -INF).requires_grad_()}
    if way == "causal":
        return {"causal": True, "q_offset": -10}
    # Causal leaves these rows their first keys, and the mask forbids those: neither alone empties them.
    return {"causal": True, "q_offset": 5, "mask": (torch.arange(LENGTHS[1], device=device) > 14) | ~rows}


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("mask", HALF), ("bias", BFLOAT), ("full bias", SINGLE), ("causal", BFLOAT), ("mask and causal", HALF)],
    ids=lambda value: DTYPE_NAMES.get(value, value),
)
def test_rows_with_nothing_allowed(device, backend, way, dtype):
    q, k, v = make_qkv(device, dtype=dtype)
    options = forbidden_rows(device, way)
    check_attention(q, k, v, backend=backend, **options)
    q.requires_grad_()
    out, lse = attention(q, k, v, backend=backend, return_lse=True, **options)
    (dq,) = torch.autograd.grad(out.sum() + lse[:, :, 10:].sum(), q)
    assert not out[:, :, :10].any() and not dq[:, :, :10].any()
    assert torch.equal(lse[:, :, :10], torch.full_like(lse[:, :, :10], -INF))
    assert out[:, :, 10:].any(-1).all() and dq[:, :, 10:].any(-1).all() and lse[:, :, 10:].isfinite().all()


def test_a_gradient_into_lse_of_an_empty_row_goes_nowhere(device, backend):
    q, k, v = (x.requires_grad_() for x in make_qkv(device))
    _, lse = attention(q, k, v, backend=backend, return_lse=True, **forbidden_rows(device, "mask"))
    for gradient in torch.autograd.grad(lse, (q, k, v), torch.ones_like(lse)):
        assert gradient.isfinite().all()
    nothing = torch.zeros(LENGTHS[0], 1, dtype=torch.bool, device=device)
    (dq,) = torch.autograd.grad(attention(q, k, v, backend=backend, return_lse=True, mask=nothing)[1].sum(), q)
    assert not dq.any()


def test_everything_masked(device, backend):
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    check_attention(*make_qkv(device), backend=backend, mask=mask)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.98])
def test_masks_that_leave_whole_tiles_empty_or_full(device, backend, keep):
    mask = make_mask(device, (1, 1, *LENGTHS), keep)
    mask[:, :, :, :64] = False  # the first key tile: the running maximum starts at -inf and must recover
    mask[:, :, 20:] = True
    check_attention(*make_qkv(device), backend=backend, mask=mask)


def test_minus_infinity_in_the_bias_forbids(device, backend):
    bias = make_bias(device, (1, 2, *LENGTHS))
    bias[torch.rand(bias.shape) < 0.5] = -INF
    check_attention(*make_qkv(device), backend=backend, bias=bias.requires_grad_())


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=DTYPE_NAMES.get)
def test_the_lowest_finite_bias_leaves_no_weight(device, backend, dtype):
    """What many models add in place of -inf. Exact wherever a row has something else to attend to."""
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(1, 2, *LENGTHS, dtype=dtype, device=device)
    bias[torch.rand(bias.shape) < 0.5] = lowest
    check_attention(*make_qkv(device, dtype=dtype), backend=backend, bias=bias)
    out = attention(*make_qkv(device, dtype=dtype), backend=backend, bias=torch.full_like(bias, lowest))
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.3], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_any_scale(device, backend, scale, biased):
    options = {"bias": make_bias(device, (2, 1, 70), requires_grad=True)} if biased else {}
    check_attention(*make_qkv(device), backend=backend, scale=scale, causal=True, **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("factor", [30.0, -30.0])
def test_large_scores(device, backend, dtype, factor):
    """Scores of hundreds: exp overflows without the running maximum, and a row attends to one key."""
    q, k, v = make_qkv(device, (65, 100), heads=(1, 1), dtype=dtype)
    check_attention(q * factor, k, v, backend=backend)


def test_scores_that_grow_along_the_keys(device, backend):
    """Each key tile raises the maximum, so every rescaling of the accumulator counts."""
    q, k, v = make_qkv(device, (33, 200), heads=(1, 1))
    q, k = q.abs(), k.abs() * torch.linspace(-3, 3, 200, device=device)[:, None]
    for keys in (k, k.flip(2)):
        check_attention(q, keys.to(HALF), v, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "dropout_p"), [(HALF, 0.1), (SINGLE, 0.1), (BFLOAT, 0.5), (HALF, 0.9), (SINGLE, 0.9), (BFLOAT, 1.0)],
    ids=lambda value: DTYPE_NAMES.get(value, value),
)  # fmt: skip
def test_dropout(device, backend, dtype, dropout_p):
    """The check rebuilds the mask with `reference.dropout_keep`, from the same seed."""
    check_attention(*make_qkv(device, heads=(1, 1), dtype=dtype), backend=backend, dropout_p=dropout_p)


def test_dropout_with_everything_else(device, backend):
    check_attention(
        *make_qkv(device, heads=(2, 1), batch=2, dims=(16, 24)),
        backend=backend,
        dropout_p=0.3,
        causal=True,
        q_offset=torch.tensor([35, -9], device=device),
        mask=make_mask(device, (2, 1, 1, LENGTHS[1])),
        bias=make_bias(device, (1, 2, *LENGTHS), requires_grad=True),
        scale=0.3,
    )


def test_dropout_with_an_explicit_mask(device, backend):
    """Without the rule's helper: drop the weights by hand, then multiply."""
    q, k, v = make_qkv(device, (33, 70), dtype=SINGLE)
    torch.manual_seed(5)
    out = attention(q, k, v, dropout_p=0.25, backend=backend)
    torch.manual_seed(5)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)
    keep = reference.dropout_keep(seed, 0.25, 1, 2, (0, 33), (0, 70))

    def by_hand(dtype):
        weights = torch.softmax(q.to(dtype) @ k.to(dtype).mT / 4.0, -1)
        return (weights * keep / 0.75) @ v.to(dtype)

    assert_parity(out, by_hand(torch.float64), by_hand(SINGLE))


def test_dropout_of_one_drops_everything(device, backend):
    q, k, v = make_qkv(device)
    out, lse = attention(q, k, v, dropout_p=1.0, return_lse=True, backend=backend)
    assert not out.any()
    assert torch.equal(lse, attention(q, k, v, return_lse=True, backend=backend)[1])


def test_dropout_of_zero_draws_nothing(device, backend):
    """Neither the result nor the generator's state shows that dropout was asked for."""
    q, k, v = make_qkv(device)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    with_zero = attention(q, k, v, dropout_p=0.0, backend=backend)
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())
    assert torch.equal(with_zero, attention(q, k, v, backend=backend))


TILES = [(16, 16), (16, 128), (128, 16), (64, 64), (128, 128)]


@pytest.mark.parametrize("tile", TILES, ids=shape_id)
def test_any_tile_size(device, backend, tile):
    options = {
        "causal": True,
        "q_offset": 10,
        "mask": make_mask(device, (1, 1, 50, 70)),
        "bias": make_bias(device, (2, 50, 1), requires_grad=True),
        "dropout_p": 0.2,
    }
    with config.override(config.LaunchConfig(*tile, num_warps=4, num_stages=1)):
        check_attention(*make_qkv(device, (50, 70)), backend=backend, **options)


@pytest.mark.parametrize("tile", TILES, ids=shape_id)
@pytest.mark.parametrize("lengths", [(48, 48), (70, 40)], ids=shape_id)
def test_any_tile_size_on_the_diagonal(device, backend, tile, lengths):
    """Tile edges that fall on, before and behind the diagonal and the ends."""
    q, k, v = make_qkv(device, lengths, heads=(1, 1), batch=3)
    offsets = torch.tensor([0, -16, 17], device=device)
    with config.override(config.LaunchConfig(*tile, num_warps=4, num_stages=1)):
        check_attention(q, k, v, backend=backend, causal=True, q_offset=offsets)


@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
@pytest.mark.parametrize("lengths", [(40, 100), (40, 20), (40, 64)], ids=shape_id)
def test_tiles_in_turn_and_pipelined(device, backend, lengths, pipelined):
    """Several inner tiles, none, and nothing but inner tiles for some rows."""
    tile = config.LaunchConfig(32, 32, num_warps=4, num_stages=1, pipelined=pipelined)
    with config.override(tile):
        check_attention(*make_qkv(device, lengths), backend=backend, dropout_p=0.2)
        check_attention(*make_qkv(device, lengths), backend=backend, causal=True, q_offset=60, softcap=5.0)


def test_lse_does_not_change_the_output(device, backend):
    q, k, v = make_qkv(device)
    alone = attention(q, k, v, causal=True, backend=backend)
    with_lse, _ = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert torch.equal(alone, with_lse)


def test_training_does_not_change_the_output(device, backend):
    q, k, v = make_qkv(device)
    inference = attention(q, k, v, causal=True, backend=backend)
    training = attention(*(x.clone().requires_grad_() for x in (q, k, v)), causal=True, backend=backend)
    assert torch.equal(inference, training)


def test_forward_is_deterministic_and_independent_of_the_batch(device, backend):
    q, k, v = make_qkv(device, batch=3)
    together = attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(together, attention(q, k, v, causal=True, backend=backend))
    alone = attention(q[1:2], k[1:2], v[1:2], causal=True, backend=backend)
    assert torch.equal(together[1:2], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="70,000 programs: the interpreter runs them in turn")
def test_more_than_65535_batch_times_heads(device, backend):
    check_attention(*make_qkv(device, (3, 5), batch=1100, heads=(64, 64)), backend=backend, causal=True)
