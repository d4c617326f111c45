"""The helpers that all kernels share, each through a kernel of its own: rounding, products, tile ranges, dropout bits.

Dropout bits are rebuilt three ways: by Python integers here, by `reference.dropout_keep`, and by each kernel that uses
them, which shows them in its results.
"""

import itertools
import math
import struct

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastattn import attention, ops, reference
from fastattn.kernels import config, ranges, scores, tiles
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DOUBLE, DTYPE_NAMES, HALF, KERNEL_DTYPES, SINGLE, shape_id


@triton.jit
def _cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n)
    tl.store(out_ptr + index, tiles.cast(x, out_ptr.dtype.element_ty), mask=index < n)


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    tl.store(out_ptr + index, scores.tanh(x), mask=index < n)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    rows, cols, depth = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    a = tl.load(a_ptr + rows[:, None] * DEPTH + depth[None, :])
    b = tl.load(b_ptr + depth[:, None] * COLS + cols[None, :])
    tl.store(out_ptr + rows[:, None] * COLS + cols[None, :], tiles.dot(a, b, None, "ieee"))


@triton.jit
def _ranges_kernel(
    cases_ptr, out_ptr, BY_KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, READS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per case (position, offset, left, right, q_len, kv_len)."""
    case = cases_ptr + tl.program_id(0) * 6
    position, offset = tl.load(case), tl.load(case + 1)
    left = tl.load(case + 2) if LEFT else None
    right = tl.load(case + 3) if RIGHT else None
    q_len, kv_len = tl.load(case + 4), tl.load(case + 5)
    if BY_KEYS:
        a, b, c, d, e, f = ranges.query_range(position, offset, left, right, q_len, kv_len, READS, BLOCK_M, BLOCK_N)
    else:
        a, b, c, d, e, f = ranges.key_range(position, offset, left, right, q_len, kv_len, READS, BLOCK_M, BLOCK_N)
    out = out_ptr + tl.program_id(0) * 6
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, e)
    tl.store(out + 5, f)


def through(kernel, x, out_dtype):
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 1024)
    return out


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=DTYPE_NAMES.get)
def test_cast_rounds_to_nearest_even(device, dtype):
    """As PyTorch does: random values, ties between two neighbours, subnormals, the ends of the range."""
    info = torch.finfo(dtype)
    steps = torch.arange(-300, 300, dtype=torch.float64)
    if dtype == BFLOAT and tiles.INTERPRETED.value:
        smallest = 300 * info.smallest_normal  # the interpreter itself shifts subnormal bfloat16 wrongly
    else:
        smallest = info.smallest_normal
    values = torch.cat([
        torch.randn(5000),
        torch.randn(1000) * 1e-6,
        (1.0 + steps * info.eps / 2).float(),  # every other one is a tie
        (steps * smallest / 64).float(),
        torch.tensor([0.0, -0.0, info.max, -info.max, torch.inf, -torch.inf, 65519.0, 65520.0, 3.39e38]),
    ]).to(device)  # fmt: skip
    assert torch.equal(through(_cast_kernel, values, dtype), values.to(dtype))
    assert through(_cast_kernel, torch.full((1,), torch.nan, device=device), dtype).isnan().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=DTYPE_NAMES.get)
def test_dot_multiplies_exactly_and_adds_in_float32(device, dtype):
    a, b = torch.randn(32, 64).to(device, dtype), torch.randn(64, 16).to(device, dtype)
    out = torch.empty(32, 16, device=device)
    _dot_kernel[(1,)](a, b, out, 32, 16, 64)
    size = (a.double().abs() @ b.double().abs()).max().item()
    assert_parity(out, a.double() @ b.double(), a.float() @ b.float(), intermediate=size)


def test_tanh_is_accurate_to_float32(device):
    """Near 0, where 1 - 2 / (e^2x + 1) would cancel, in between, and where e^2x overflows."""
    x = torch.cat([torch.randn(4000) * 10.0 ** torch.arange(-6, 2).repeat(500), torch.tensor([0.0, 100.0, -100.0])])
    x = x.to(device)
    actual, exact = through(_tanh_kernel, x, SINGLE).double(), torch.tanh(x.double())
    # The exponent 2x log2(e) is rounded at its own size, and so is 1 - 2 / (...) below it.
    allowed = 4 * torch.finfo(SINGLE).eps * exact.abs().clamp(min=torch.finfo(SINGLE).tiny)
    wide = 4 * torch.finfo(SINGLE).eps * (1.0 + x.double().abs()) * (1.0 - exact.square())
    wide[x.abs() < 0.099] = 0.0  # a series, which has neither
    assert ((actual - exact).abs() <= allowed + wide).all()


BLOCK_M, BLOCK_N = 16, 32


def visible(i, j, offset, left, right, q_len, kv_len):
    if not (0 <= i < q_len and 0 <= j < kv_len):
        return False
    distance = i + offset - j
    return (right is None or distance >= -right) and (left is None or distance <= left)


def range_cases(by_keys, has_left, has_right):
    """Every tile of problems whose diagonals and ends fall on, before and behind tile edges."""
    lengths = [(1, 1), (16, 32), (17, 33), (40, 100), (100, 40), (64, 64), (5, 0)]
    offsets = (0, 1, -1, 15, 16, -16, 31, -33, 90, -90)
    sides = (0, 3, 16, 47, -2)
    lefts, rights = (sides if has_left else (0,)), (sides[:3] if has_right else (0,))
    for (q_len, kv_len), offset, left, right in itertools.product(lengths, offsets, lefts, rights):
        length, block = (kv_len, BLOCK_N) if by_keys else (q_len, BLOCK_M)
        for position in range(0, max(length, 1), block):
            yield position, offset, left, right, q_len, kv_len


@pytest.mark.parametrize("by_keys", [False, True], ids=["keys_of_a_query_tile", "queries_of_a_key_tile"])
@pytest.mark.parametrize("has_left", [False, True], ids=["", "left"])
@pytest.mark.parametrize("has_right", [False, True], ids=["", "right"])
@pytest.mark.parametrize("reads", [False, True], ids=["", "mask"])
def test_tile_ranges(device, by_keys, has_left, has_right, reads):
    """Every visible pair lies in exactly one tile, inner tiles need no test, no tile is met twice or lies outside."""
    cases = list(range_cases(by_keys, has_left, has_right))
    cases = cases[:: 1 + len(cases) // 300]  # the interpreter runs one at a time
    table = torch.tensor(cases, dtype=torch.int32, device=device)
    out = torch.empty(len(cases), 6, dtype=torch.int32, device=device)
    _ranges_kernel[(len(cases),)](table, out, by_keys, has_left, has_right, reads, BLOCK_M, BLOCK_N)
    own_block, block = (BLOCK_N, BLOCK_M) if by_keys else (BLOCK_M, BLOCK_N)
    for case, (start, edges_left, right_start, edges, inner_start, inners) in zip(cases, out.tolist(), strict=True):
        position, offset, left, right, q_len, kv_len = case
        left, right = left if has_left else None, right if has_right else None
        length, own_length = (q_len, kv_len) if by_keys else (kv_len, q_len)
        right_tiles = [right_start + n * block for n in range(edges - edges_left)]
        edge_tiles = [start + n * block for n in range(edges_left)] + right_tiles
        inner_tiles = [inner_start + n * block for n in range(inners)]
        tiles = edge_tiles + inner_tiles
        assert edges >= 0 and inners >= 0 and len(set(tiles)) == len(tiles), case
        assert all(tile % block == 0 and 0 <= tile < max(length, 1) for tile in tiles), case

        def sees(own, other, offset=offset, left=left, right=right, q_len=q_len, kv_len=kv_len):
            i, j = (other, own) if by_keys else (own, other)
            return visible(i, j, offset, left, right, q_len, kv_len)

        owns = [own for own in range(position, position + own_block) if own < own_length]
        covered = {other for tile in tiles for other in range(tile, tile + block)}
        assert {other for other in range(length) if any(sees(own, other) for own in owns)} <= covered, case
        for tile in inner_tiles:  # rows past the end of the own side are cut off when results are stored
            assert all(sees(own, other) for own in owns for other in range(tile, tile + block)), case
            assert not reads or position + own_block <= own_length, case


def test_ranges_skip_what_nothing_sees(device):
    """Causal work is half of the square: counted in tiles, for both directions."""
    length = 320
    for by_keys, block, own in ((False, BLOCK_N, BLOCK_M), (True, BLOCK_M, BLOCK_N)):
        cases = [(position, 0, 0, 0, length, length) for position in range(0, length, own)]
        out = torch.empty(len(cases), 6, dtype=torch.int32, device=device)
        table = torch.tensor(cases, dtype=torch.int32, device=device)
        _ranges_kernel[(len(cases),)](table, out, by_keys, False, True, False, BLOCK_M, BLOCK_N)
        tiles = (out[:, 3] + out[:, 5]).sum().item()
        needed = sum(
            any(visible(i, j, 0, None, 0, length, length) for i in (row + BLOCK_M - 1,) for j in (col,))
            for row in range(0, length, BLOCK_M)
            for col in range(0, length, BLOCK_N)
        )
        assert tiles == needed < 0.6 * len(cases) * (length // block)


# --- Dropout -------------------------------------------------------------------------------------------------------


def philox(counter, key, rounds):
    """Philox-4x32 (Salmon et al., 2011) in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept_by_integers(seed, dropout_p, b, h, i, j):
    """The dropout rule for one weight, in Python integers."""
    mask = 0xFFFFFFFF
    k0, k1, _, _ = philox((i, h, b, 0), (seed & mask, (seed >> 32) & mask), reference.DROPOUT_ROUNDS)
    x = ((j * 0x9E3779B1) & mask) ^ k0
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15) ^ k1) * 0x846CA68B) & mask
    x ^= x >> 16
    return (x >> 8) >= struct.unpack("f", struct.pack("f", dropout_p))[0] * 2**24


def test_philox_gives_the_published_vectors():
    """Known answers for 7 rounds from the authors' Random123 library."""
    ones, zeros = 0xFFFFFFFF, (0, 0, 0, 0)
    assert philox(zeros, (0, 0), 7) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((ones,) * 4, (ones, ones), 7) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0), 7) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)


SEEDS = [0, 1, -1, 12345678901234567, -(1 << 63), (1 << 63) - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_reference_is_the_rule_in_integers(seed, dropout_p):
    rows, keys = (65530, 65542), (100000, 100017)  # beyond 16 bits
    keep = reference.dropout_keep(torch.tensor([seed]), dropout_p, 2, 3, rows, keys)
    assert keep.dtype == torch.bool and keep.shape == (2, 3, 12, 17)
    for b, h, i, j in itertools.product(range(2), range(3), range(12), range(17)):
        assert keep[b, h, i, j] == kept_by_integers(seed, dropout_p, b, h, rows[0] + i, keys[0] + j)


def test_a_block_of_the_mask_is_cut_from_the_whole():
    seed = torch.tensor([99])
    whole = reference.dropout_keep(seed, 0.3, 2, 2, (0, 50), (0, 60))
    part = reference.dropout_keep(seed, 0.3, 2, 2, (13, 40), (7, 31))
    assert torch.equal(part, whole[:, :, 13:40, 7:31])


def test_a_part_is_cut_from_the_whole():
    seed = torch.tensor([99])
    whole = reference.dropout_keep(seed, 0.3, 3, 4, (0, 50), (0, 60))
    part = reference.dropout_keep(part_of(seed), 0.3, 2, 2, (0, 16), (0, 19))
    assert torch.equal(part, whole[1:, 2:, 2::3, 3::3])


def part_of(seed):
    return ops.seed_of_part(seed, batch=1, head=2, rows=(2, 3), keys=(3, 3))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", SINGLE), ("reference", DOUBLE), ("cpu", SINGLE), ("cpu", DOUBLE), ("triton", SINGLE)],
    ids=lambda value: DTYPE_NAMES.get(value, value),
)
def test_every_backend_drops_a_part_as_the_whole(request, device, backend, dtype):
    """Forward and backward: zeros show which weights went."""
    if backend == "cpu":
        request.getfixturevalue("needs_cpu_library")
    device = device if backend == "triton" else torch.device("cpu")
    q, k, v = (x.to(dtype).requires_grad_() for x in (
        torch.zeros(2, 2, 16, 19, device=device), torch.zeros(2, 2, 19, 19, device=device), eye(19, 19, device)
    ))  # fmt: skip
    seed = seed_of(6, device)
    expected = reference.dropout_keep(part_of(seed), 0.3, 2, 2, (0, 16), (0, 19))
    out, _ = ops.attention(make_spec(q, k, v, dropout_p=0.3), backend, part_of(seed))
    assert torch.equal(out != 0, expected)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert torch.equal(dv[..., 0] != 0, expected.any(2))
    assert_parity(dv[..., 0], expected.double().sum(2) / 0.7 / 19, expected.to(dtype).sum(2) / 0.7 / 19)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9, 0.5, 1.0 - 2.0**-24, 1.0 - 1e-9, 1.0], ids=str)
def test_thresholds(dropout_p):
    """24 bits decide: probabilities that float32 cannot tell from 0 or 1 drop nothing or everything."""
    keep = reference.dropout_keep(torch.tensor([5]), dropout_p, 1, 4, (0, 200), (0, 200))
    expected = {0.0: 1.0, 1e-9: 1.0, 1.0 - 1e-9: 0.0, 1.0: 0.0}.get(dropout_p)
    if expected is not None:
        assert keep.float().mean() == expected


def seed_of(generator_seed, device):
    torch.manual_seed(generator_seed)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def eye(length, dim, device, batch=2, heads=2):
    return torch.eye(length, dim, device=device).expand(batch, heads, length, dim)


def masks_seen_in_results(device, q_len, kv_len, dropout_p, generator_seed, dtype):
    """The keep-mask of each kernel, from a problem that shows it: uniform weights, and an identity to read them by."""

    def run(q, k, v, dout=None, bias=None):
        torch.manual_seed(generator_seed)
        leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, bias=bias, dropout_p=dropout_p, scale=1.0, backend="triton")
        if dout is None:
            return out
        leaves += [] if bias is None else [bias]
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    shape = (2, 2)
    zeros_q = torch.zeros(*shape, q_len, kv_len, device=device)
    zeros_k = torch.zeros(*shape, kv_len, kv_len, device=device)
    values = torch.ones(*shape, kv_len, 1, device=device)
    ones = torch.ones(*shape, q_len, 1, device=device)
    # out[i, j] = weight[i, j] and dv[j, i] = weight[i, j], 0 where dropped.
    yield "forward", run(zeros_q, zeros_k, eye(kv_len, kv_len, device)) != 0
    dv = run(zeros_q, zeros_k, torch.zeros(*shape, kv_len, q_len, device=device), eye(q_len, q_len, device))[2]
    yield "dv", dv.mT != 0
    # With dP = 1: dS[i, j] is positive where kept, and negative, by the row's mean, where dropped.
    bias = torch.zeros(*shape, q_len, kv_len, device=device, requires_grad=True)
    dq, _, _, dbias = run(zeros_q, eye(kv_len, kv_len, device), values, ones, bias)
    yield "dq", dq > 0
    yield "dbias", dbias > 0
    dk = run(eye(q_len, q_len, device), torch.zeros(*shape, kv_len, q_len, device=device), values, ones)[1]
    yield "dk", dk.mT > 0


TILES = [(16, 16), (16, 64), (64, 16), (128, 128)]


@pytest.mark.parametrize("tile", TILES, ids=shape_id)
def test_every_kernel_has_the_same_mask_on_any_tile_size(device, tile):
    q_len, kv_len, dropout_p = 20, 40, 0.3
    expected = reference.dropout_keep(seed_of(6, device), dropout_p, 2, 2, (0, q_len), (0, kv_len))
    with config.override(config.LaunchConfig(*tile, num_warps=4, num_stages=1)):
        for name, mask in masks_seen_in_results(device, q_len, kv_len, dropout_p, 6, SINGLE):
            assert torch.equal(mask, expected), name


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_the_mask_does_not_depend_on_the_dtype(device, dtype, dropout_p):
    expected = reference.dropout_keep(seed_of(7, device), dropout_p, 2, 2, (0, 16), (0, 40))
    # In half precision the other gradients are too coarse to show it.
    for name, mask in itertools.islice(masks_seen_in_results(device, 16, 40, dropout_p, 7, dtype), 2):
        assert torch.equal(mask, expected), name


# Statistics. Every figure below is approximately normal with known mean and variance if the bits are independent, so
# "within SIGMAS standard deviations" fails for good bits with a probability of 2e-9. The seeds are fixed: what passes
# once passes always, and a failure after a change is news.
SIGMAS = 6.0
ROWS, KEYS = 512, 2048


def bits(seed, batch=2, heads=3, dropout_p=0.5):
    return reference.dropout_keep(torch.tensor([seed]), dropout_p, batch, heads, (0, ROWS), (0, KEYS)).double()


def standardised(keep, dropout_p):
    p = math.ceil(dropout_p * 2**24) / 2**24
    return (keep - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -7])
def test_the_fraction_dropped(seed, dropout_p):
    """Binomial: 3 million weights, all of them together, and per row, key, head and batch entry."""
    z = standardised(bits(seed, dropout_p=dropout_p), dropout_p)
    assert abs(z.sum().item()) < SIGMAS * math.sqrt(z.numel())
    for dims in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        sums = z.sum(dims)
        terms = z.numel() // sums.numel()
        # Sums of `terms` each; the largest of thousands of them needs half a deviation more.
        assert sums.abs().max() < (SIGMAS + 0.5) * math.sqrt(terms), dims
        # Their squares add up to a chi-square variable: mean 1, variance about 2 each.
        excess = (sums.square() / terms - 1.0).sum().item()
        assert abs(excess) < (SIGMAS + 1.0) * math.sqrt(2.0 * sums.numel()) + SIGMAS**2, dims


def assert_uncorrelated(x, y, what):
    assert abs((x * y).sum().item()) < SIGMAS * math.sqrt(x.numel()), what


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_neighbours_are_uncorrelated(dropout_p):
    """Rows, keys, heads, batch entries and seeds, at several distances."""
    z = standardised(bits(3, dropout_p=dropout_p), dropout_p)
    for lag in (1, 2, 3, 16, 32, 64, 128, 256):
        assert_uncorrelated(z[:, :, lag:], z[:, :, :-lag], f"rows at distance {lag}")
        assert_uncorrelated(z[..., lag:], z[..., :-lag], f"keys at distance {lag}")
        assert_uncorrelated(z[:, :, lag:, lag:], z[:, :, :-lag, :-lag], f"diagonals at distance {lag}")
    for lag in (1, 2):
        assert_uncorrelated(z[:, lag:], z[:, :-lag], f"heads at distance {lag}")
    assert_uncorrelated(z[1:], z[:-1], "batch entries")
    assert_uncorrelated(z[:, 0], z[:, 0].mT.reshape(z[:, 0].shape), "a permutation")
    for other in (2, 4, -3, 3 + (1 << 32), 3 - (1 << 63)):  # also seeds that differ in their upper half alone
        assert_uncorrelated(z, standardised(bits(other, dropout_p=dropout_p), dropout_p), f"seeds 3 and {other}")


def test_pairs_of_keys_and_rows_are_uncorrelated():
    """Not only neighbours: all pairs of 512 rows, and of 2048 keys, as one Gram matrix each."""
    z = standardised(bits(8, 1, 1), 0.5)[0, 0]
    for x in (z, z.mT):
        gram = x @ x.mT / math.sqrt(x.shape[1])
        pairs = gram[torch.triu(torch.ones(gram.shape, dtype=torch.bool), 1)]
        # The largest of 2 million standard normal variables lies near 5.2: a deviation more than a single one needs.
        assert pairs.abs().max() < SIGMAS + 1.0
        assert abs((pairs.square() - 1.0).sum().item()) < (SIGMAS + 1.0) * math.sqrt(2.0 * pairs.numel())


def test_different_heads_batch_entries_and_seeds_differ():
    keep = bits(5)
    masks = [keep[b, h] for b in range(2) for h in range(3)] + [bits(6, 1, 1)[0, 0]]
    for a, b in itertools.combinations(masks, 2):
        assert not torch.equal(a, b)


def test_through_the_operator(device):
    """The same statistics where it counts: the generator's seeds, one after the other, drop the right fraction."""
    q = torch.zeros(1, 4, 64, 16, device=device)
    v = torch.ones(1, 4, 64, 16, device=device)
    kept = [attention(q, q, v, dropout_p=0.3, backend="reference")[..., 0] * 0.7 for _ in range(20)]
    fraction = torch.stack(kept).double().mean().item()
    count = 20 * 4 * 64 * 64
    assert abs(fraction - 0.7) < SIGMAS * math.sqrt(0.3 * 0.7 / count) + torch.finfo(SINGLE).eps
    assert len({tuple(x.flatten().tolist()) for x in kept}) == 20
