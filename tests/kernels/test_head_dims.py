"""Head dims in two pieces, see `tiles.pieces`: every feature holds to the rule, and no column is lost."""

import pytest
import torch

pytest.importorskip("triton")

from fastattn import BlockMask, attention
from fastattn.kernels import config, tiles
from fastattn.testing import check_attention
from tests.support.attention_cases import BFLOAT, HALF, SINGLE, make_bias, make_mask, make_qkv, shape_id
from tests.support.cache_problems import check, make_problem


def test_pieces_cover_every_head_dim_with_the_fewest_columns():
    for dim in range(1, 577):
        whole = max(16, 1 << (dim - 1).bit_length())
        widths = [tiles.piece_columns(dim, i) for i in range(tiles.pieces(dim))]
        assert all(width >= 16 and width & (width - 1) == 0 for width in widths)
        assert sum(widths) == tiles.padded_columns(dim) >= dim
        if len(widths) == 2:
            assert dim > 64 and sum(widths) < whole and tiles.first_column(dim, 1) == widths[0] < dim
        else:
            assert widths == [whole] and (whole <= 64 or dim - whole // 2 > whole // 4)
    assert {dim for dim in (64, 72, 80, 96, 97, 128, 160, 192, 193, 576) if tiles.pieces(dim) == 2} == {
        72, 80, 96, 160, 192, 576,
    }  # fmt: skip


def test_the_next_product_does_not_run_beside_the_softmax_with_pieces():
    """ptxas would let the products wait for each other."""
    for dim in (96, 128):
        assert not config.lookup("forward", "sm_90", dim, 2, in_pieces=True).pipelined
    assert config.lookup("forward", "sm_90", 128, 2).pipelined


# (D, Dv): two pieces in both, in the first, in the second; multi-head latent attention has 192 and 128.
DIMS = [(72, 72), (192, 128), (64, 80), (96, 192), (160, 64)]
LENGTHS = (33, 70)


def cumulative(device, *lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


FEATURES = {
    "causal": lambda device: {"causal": True},
    "window": lambda device: {"causal": True, "window": (20, 5)},
    "mask_and_bias": lambda device: {
        "mask": make_mask(device, LENGTHS), "bias": make_bias(device, (4, *LENGTHS), requires_grad=True),
    },
    "score_terms": lambda device: {
        "causal": True, "softcap": 5.0, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]).to(device),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, -0.06]).to(device),
    },
    "dropout": lambda device: {"dropout_p": 0.3},
    "packed": lambda device: {"cu_seqlens_q": cumulative(device, 12, 21), "cu_seqlens_k": cumulative(device, 30, 40)},
    "block_mask": lambda device: {
        "block_mask": BlockMask.from_mask(torch.ones(LENGTHS, dtype=torch.bool).tril(20).to(device)),
    },
    "kv_start": lambda device: {"causal": True, "kv_start": torch.tensor([7], device=device)},
}  # fmt: skip
CASES = [(feature, DIMS[(n + turn) % len(DIMS)]) for n, feature in enumerate(FEATURES) for turn in (0, 2)]


@pytest.mark.parametrize(("feature", "dims"), CASES, ids=lambda x: x if isinstance(x, str) else shape_id(x))
def test_features(device, backend, feature, dims):
    q, k, v = make_qkv(device, LENGTHS, dims=dims, heads=(4, 2), dtype=(HALF, BFLOAT)[dims[0] % 16 == 0])
    if feature == "packed":
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    check_attention(q, k, v, backend=backend, **FEATURES[feature](device))


@pytest.mark.parametrize("dims", [(80, 80), (192, 128), (40, 96)], ids=shape_id)
def test_float32_rows_at_any_byte(device, backend, dims):
    q, k, v = (torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in make_qkv(device, dims=dims, dtype=SINGLE))
    check_attention(q, k, v, backend=backend, causal=True)


@pytest.mark.parametrize(
    ("dims", "page", "dtype"), [((80, 72), 16, HALF), ((192, 128), 0, SINGLE), ((40, 96), 48, BFLOAT)]
)
@pytest.mark.parametrize("q_len", [1, 17])
def test_kv_cache(device, backend, dims, page, dtype, q_len):
    problem = make_problem(device, (50, 3), new=1, q_len=q_len, dims=dims, dtype=dtype, page=page, heads=(4, 2))
    check(problem, backend, num_splits=2, window=(40, 0))


def test_kv_cache_of_any_strides(device, backend):
    check(make_problem(device, (31, 5), new=3, q_len=3, dims=(96, 80), page=16, strided=True), backend)


@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(device, backend, where, column):
    """In the first and in the second piece, for results and gradients."""
    inputs = dict(zip("qkv", make_qkv(device, (70, 70), dims=(80, 96)), strict=True))
    dout = torch.randn(1, 2, 70, 96).to(device, HALF)

    def run(inputs):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = attention(*leaves, causal=True, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    clean = run(inputs)
    inputs[where][:, :, 50, column] = torch.nan
    found = run(inputs)
    for name, ours, expected in zip(("out", "dq"), found, clean, strict=False):
        assert torch.equal(ours[:, :, :50], expected[:, :, :50]), name
        assert not ours[:, :, 50:].isfinite().all(3).any(), name


@pytest.mark.parametrize(("q_len", "page", "heads"), [(1, 16, (4, 1)), (3, 0, (16, 1))])
def test_latent_attention_over_a_cache(device, backend, q_len, page, heads):
    """The decode of multi-head latent attention: values are the first 512 of 576 columns of the keys."""
    problem = make_problem(device, (40, 3), q_len=q_len, new=1, heads=heads, dims=(576, 512), dtype=HALF, page=page)
    check(problem, backend, num_splits=2)


def test_values_that_are_columns_of_the_keys(device, backend):
    problem = make_problem(device, (40,), new=0, heads=(4, 1), dims=(576, 512), dtype=HALF)
    problem.v_cache = problem.k_cache[..., :512]
    check(problem, backend, num_splits=1)
