"""The CUDA C++ kernel without a GPU: its index maths, its results and its order of events on a model of the hardware
(tests/support/hopper), and the mistakes that the model finds.
"""

import ctypes
import itertools
import os
import shutil

import pytest
import torch

from fastattn import ops
from fastattn.backends import cuda
from fastattn.spec import make_spec
from tests.support import cuda_model
from tests.support.attention_cases import DTYPE_NAMES, make_qkv, relayout
from tests.support.cuda_calls import CASES, DTYPES, KEYS, check_backward, check_forward, make_inputs

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is installed"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The compiled model, one for all processes of this run."""
    folder = tmp_path_factory.getbasetemp()
    return cuda_model.build(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def model(path):
    """The backend "cuda" on CPU tensors."""
    with cuda_model.serving(path) as model:
        yield model


@pytest.fixture(scope="module")
def layout(path):
    """`csrc/cuda/layout.cuh` and `schedule.cuh` as Python functions."""
    library = ctypes.CDLL(str(path))
    for name in ("layout_row_descriptor", "layout_value_descriptor"):
        getattr(library, name).restype = ctypes.c_uint64
    return library


# Index maths, exhaustively, against formulas from the PTX ISA


@pytest.mark.parametrize("rows", [64, 128])
def test_a_tile_is_swizzled_panels(layout, rows):
    """Every 8 elements have a place of their own, in the order of the 128-byte swizzle."""
    places = [layout.layout_tile_offset(rows, row, chunk) for row in range(rows) for chunk in range(16)]
    assert sorted(places) == list(range(0, rows * 256, 16))
    for (row, chunk), place in zip(itertools.product(range(rows), range(16)), places, strict=True):
        assert place == chunk // 8 * rows * 128 + row * 128 + ((chunk ^ row) & 7) * 16


def fields(descriptor):
    """(start, leading offset, stride offset) in bytes; the rest must say: 128-byte swizzle, base offset 0."""
    assert descriptor >> 62 == 1 and descriptor >> 46 & 0xFFFF == 0
    return tuple(16 * (descriptor >> bit & 0x3FFF) for bit in (0, 16, 32))


def swizzled(address):
    return address ^ (address >> 7 & 7) << 4


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("tile", [0, 3072, 99 * 1024])
def test_products_read_what_loads_wrote(layout, tile, rows):
    """The hardware's address of each element under a descriptor is where `tile_offset` put it."""

    def written(row, column):
        return tile + layout.layout_tile_offset(rows, row, column // 8) + column % 8 * 2

    for k in range(8):
        for first in (0, rows - 64):
            start, _, stride = fields(layout.layout_row_descriptor(tile, rows, first, k))
            for row, column in itertools.product(range(64), range(16)):
                address = start + row // 8 * stride + row % 8 * 128 + column * 2
                assert swizzled(address) == written(first + row, 16 * k + column)
    for k in range(rows // 16):
        start, leading, stride = fields(layout.layout_value_descriptor(tile, rows, k))
        for dim, key in itertools.product(range(128), range(16)):
            address = start + dim // 64 * leading + dim % 64 * 2 + key // 8 * stride + key % 8 * 128
            assert swizzled(address) == written(16 * k + key, dim)


def test_fragments(layout):
    """Accumulators tile 64 x 128 once; their elements are those of operand A, register by register."""
    seen = set()
    for t, i in itertools.product(range(128), range(64)):
        place = layout.layout_fragment_row(t, i), layout.layout_fragment_column(t, i)
        warp, lane = divmod(t, 32)
        assert place == (16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2)
        seen.add(place)
        k, j, half = i // 8, i % 8 // 2, i % 2
        operand = layout.layout_operand_row(t, j), layout.layout_operand_column(t, j)
        assert operand == (16 * warp + lane // 4 + (0, 8, 0, 8)[j], 2 * (lane % 4) + (0, 0, 8, 8)[j])
        assert place == (operand[0], 16 * k + operand[1] + half)
    assert seen == set(itertools.product(range(64), range(128)))


@pytest.mark.parametrize(
    "window", [(None, None), (None, 0), (0, None), (0, 0), (150, -20), (-130, 140), (200, 3)], ids=str
)
@pytest.mark.parametrize("q_len", [1, 129, 300])
@pytest.mark.parametrize("kv_len", [0, 1, 128, 259])
def test_tile_bounds(layout, q_len, kv_len, window):
    """A block visits the tiles from the first to the last key that one of its rows sees; a row sees what it may."""
    left, right = (cuda._OPEN if side is None else side for side in window)
    pair = (ctypes.c_int * 2)()
    for q_offset in (-200, -1, kv_len - q_len, 130):
        problem = cuda.Forward(q_len=q_len, kv_len=kv_len, left=left, right=right, q_offset=q_offset)
        keys, found = torch.arange(kv_len), []
        distance = keys - torch.arange(q_len)[:, None] - q_offset
        visible = (-left <= distance) & (distance <= right)
        for row in range(q_len):
            layout.schedule_visible_keys(ctypes.byref(problem), row, pair)
            found.append(tuple(pair))
        begin, end = torch.tensor(found)[..., None].unbind(1)
        assert torch.equal((begin <= keys) & (keys < end), visible)
        for dim in cuda.HEAD_DIMS:
            problem.head_dim, rows = dim, layout.layout_block_rows(dim)
            for first in range(0, q_len, rows):
                seen = visible[first : first + rows].any(0).nonzero() // KEYS[dim]
                layout.schedule_key_tiles(ctypes.byref(problem), first, pair)
                assert not len(seen) or tuple(pair) == (seen.min(), seen.max() + 1)


def test_far_positions(layout):
    """At the ends of what the interface takes."""
    far, pair = 1 << 30, (ctypes.c_int * 2)()
    for q_offset, right, expected in ((far, far, (0, far)), (-far, 0, (0, 0)), (far, cuda._OPEN, (0, far))):
        problem = cuda.Forward(q_len=far, kv_len=far, left=cuda._OPEN, right=right, q_offset=q_offset)
        layout.schedule_visible_keys(ctypes.byref(problem), 0, pair)
        assert tuple(pair) == expected


@pytest.mark.parametrize("section", [1, 2, 5, 12])
def test_works(layout, section):
    """Each is there once; inside a section of heads the longest come first, and heads of a group follow one another."""
    sizes = {"batch": 3, "q_heads": 4, "kv_heads": 2, "q_len": 300, "kv_len": 520, "head_dim": 128}
    problem = cuda.Forward(**sizes, q_offset=220, left=cuda._OPEN)
    works, work = [], (ctypes.c_int * 5)()
    for index in range(3 * 4 * 3):
        layout.schedule_work(ctypes.byref(problem), section, index, work)
        works.append(tuple(work))
    places = [(batch, head, first) for batch, head, _, first, _ in works]
    assert sorted(places) == list(itertools.product(range(3), range(4), range(0, 300, 128)))
    for _, head, kv_head, first, tiles in works:
        assert (kv_head, tiles) == (head // 2, {0: 3, 128: 4, 256: 5}[first])
    for start in range(0, 12, section):
        heads = min(section, 12 - start)
        part = works[start * 3 : (start + heads) * 3]
        assert [4 * batch + head for batch, head, *_ in part] == 3 * [*range(start, start + heads)]
        assert [first for *_, first, _ in part] == [row for row in (256, 128, 0) for _ in range(heads)]


def test_works_of_packed_sequences(layout):
    """Each row of each sequence is in one work of each head, or of each group of heads, and in no other."""
    lengths, kv_lengths = [130, 0, 1, 128, 0, 40], [9, 5, 0, 300, 0, 1]
    starts, k_starts = ((ctypes.c_int32 * 7)(0, *itertools.accumulate(x)) for x in (lengths, kv_lengths))
    pointers = {name: ctypes.addressof(x) for name, x in (("q_starts", starts), ("k_starts", k_starts))}
    sizes = {"batch": 6, "q_heads": 6, "kv_heads": 2, "q_len": starts[6] + 3, "kv_len": k_starts[6], "head_dim": 128}
    for together in (False, True):
        strides = {"q_stride": (0, 128, 768), "out_stride": (0, 128, 768)} if together else {}
        problem = cuda.Forward(**pointers, **sizes, **strides, left=cuda._OPEN, right=cuda._OPEN, q_offset=cuda._ENDS)
        heads, work = (3, 63) if together else (1, 128), (ctypes.c_int * 5)()
        rows = heads[1] // heads[0] * 2 if together else 128
        found = []
        count = layout.schedule_work(ctypes.byref(problem), 0, 0, work)
        for index in range(count):
            layout.schedule_work(ctypes.byref(problem), 0, index, work)
            sequence, head, kv_head, first, tiles = work
            if first < 0:
                continue
            found.append((sequence, head, first))
            assert (kv_head, tiles) == (head // 3, -(-kv_lengths[sequence] // 128))
        assert layout.schedule_heads_of_tile(ctypes.byref(problem)) == heads[0]
        expected = [(s, h, f) for s, n in enumerate(lengths) for h in range(0, 6, heads[0]) for f in range(0, n, rows)]
        assert sorted(found) == expected
        assert count <= len(expected) + 6 * 6 // heads[0]


@pytest.mark.parametrize(
    ("sizes", "together"),
    [((1, 8, 2, 64), 4), ((1, 32, 1, 64), 32), ((16, 8, 2, 64), 4), ((4096, 8, 2, 128), 1), ((130, 8, 2, 128), 4),
     ((128, 7, 1, 128), 1), ((40, 7, 1, 128), 7), ((1, 130, 1, 128), 1), ((1, 8, 8, 128), 1)],
)  # fmt: skip
def test_heads_of_one_tile(layout, sizes, together):
    """All that share a key head where that makes fewer works."""
    q_len, q_heads, kv_heads, dim = sizes
    strides = {"q_stride": (0, dim, dim * q_heads), "out_stride": (0, dim, dim * q_heads)}
    shape = {"batch": 2, "q_len": q_len, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
    assert layout.schedule_heads_of_tile(ctypes.byref(cuda.Forward(**shape, **strides))) == together
    strides["q_stride"] = (0, 0, dim)
    assert layout.schedule_heads_of_tile(ctypes.byref(cuda.Forward(**shape, **strides))) == 1


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [((2, 8, 2, 1000), 16), ((1, 8, 8, 1 << 15), 4), ((4, 16, 2, 1 << 18), 8), ((4, 16, 2, 0), 64)],
)
def test_a_section_fits_into_the_cache(layout, sizes, heads):
    """32 MiB of keys and values; at least one group of heads, at most all."""
    batch, q_heads, kv_heads, kv_len = sizes
    problem = cuda.Forward(batch=batch, q_heads=q_heads, kv_heads=kv_heads, kv_len=kv_len, head_dim=64)
    assert layout.schedule_section_heads(ctypes.byref(problem)) == heads


# Results, whatever the order of events


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("name", CASES)
def test_results(model, name, dtype, dim):
    lengths, shapes, options = CASES[name]
    model.settings(seed=dim)
    qkv, bounds = make_inputs("cpu", lengths, dim=dim, dtype=dtype, **shapes)
    check_forward(*qkv, **bounds, **options)


@pytest.mark.parametrize("blocks", [1, 2, 7, 100])
def test_results_do_not_depend_on_the_order(model, blocks):
    """Neither on how many blocks share the works nor on who comes first inside a block."""
    q, k, v = make_qkv("cpu", (300, 300), dims=(64, 64), heads=(2, 1))
    results = []
    for seed in range(3):
        model.settings(seed, blocks)
        results.append(check_forward(q, k, v, causal=True))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout_name", ["heads_last", "packed"])
def test_strides(model, layout_name):
    """What lies between the elements is NaN: nothing of it is read into a result."""
    q, k, v = make_qkv("cpu", (130, 200), dims=(64, 64), heads=(4, 4), batch=2)
    check_forward(*(relayout(t, layout_name) for t in (q, k, v)), causal=True)


def test_expanded(model):
    q, k, v = make_qkv("cpu", (9, 200), dims=(64, 64), heads=(2, 1))
    check_forward(q, *(t.expand(-1, 2, -1, -1) for t in (k, v)))


def test_extremes(model):
    """Weights of one key only, and scores whose powers overflow without the running maximum."""
    q, k, v = make_qkv("cpu", (64, 300), dims=(64, 64))
    check_forward(20 * q, 20 * k, v)
    q[0, 0, 3] = torch.nan
    out, _ = ops.attention(make_spec(q, k, v), "cuda")
    assert out[0, 0, 3].isnan().all() and out[0, 0, :3].isfinite().all() and out[0, 1].isfinite().all()


def test_what_is_beside_a_sequence_stays_out(model):
    """NaN in all of one sequence reaches nothing of the others, and no row is written but by its own."""
    qkv, bounds = make_inputs("cpu", ([70, 40, 20], [150, 90, 33]), dim=64, heads=(2, 1))
    clean = check_forward(*qkv, **bounds, causal=True)
    for x, rows in zip(qkv, (slice(70, 110), slice(150, 240), slice(150, 240)), strict=True):
        x[:, :, rows] = torch.nan
    out, lse = ops.attention(make_spec(*qkv, **bounds, causal=True, return_lse=True), "cuda")
    assert out[:, :, 70:110].isnan().all() and lse[:, :, 70:110].isnan().all()
    others = [*range(70), *range(110, 130)]
    assert torch.equal(out[:, :, others], clean[:, :, others])
    assert (out[:, :, 130:] == 0).all() and (lse[:, :, 130:] == -torch.inf).all()


def test_a_key_that_rows_do_not_see_may_be_nan(model):
    q, k, v = make_qkv("cpu", (130, 300), dims=(64, 64), heads=(1, 1))
    clean = check_forward(q, k, v, causal=True, q_offset=0)
    k[:, :, 100] = torch.nan
    out, _ = ops.attention(make_spec(q, k, v, causal=True, q_offset=0), "cuda")
    assert torch.equal(out[:, :, :100], clean[:, :, :100]) and out[:, :, 100:].isnan().all()


# Gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients(model, name):
    """dq, dk, dv and those of sinks, of gradients that flow in through out and lse."""
    lengths, shapes, options = CASES[name]
    number = list(CASES).index(name)
    model.settings(seed=number)
    qkv, bounds = make_inputs("cpu", lengths, dim=64, dtype=DTYPES[number % 2], **shapes)
    check_backward(*qkv, **bounds, **options)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", ["tails", "causal", "grouped heads, seven", "packed, offsets", "softcap"])
def test_gradients_at_other_head_dims(model, name, dim):
    lengths, shapes, options = CASES[name]
    qkv, bounds = make_inputs("cpu", lengths, dim=dim, dtype=DTYPES[dim // 128 - 1], **shapes)
    check_backward(*qkv, **bounds, **options)


@pytest.mark.parametrize("blocks", [1, 3, 100])
def test_gradients_do_not_depend_on_the_order(model, blocks):
    """Of blocks, of heads that share a key head, of roles inside a block: bit for bit."""
    q, k, v = make_qkv("cpu", (130, 150), dims=(64, 64), heads=(2, 1))
    dout, results = torch.randn_like(q), []
    for seed in range(3):
        model.settings(seed, blocks)
        results.append(check_backward(q, k, v, dout=dout, lse_gradient=False, causal=True))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("layout_name", ["heads_last", "packed"])
def test_gradients_of_other_strides(model, layout_name):
    q, k, v = make_qkv("cpu", (70, 100), dims=(64, 64), heads=(2, 2), batch=2)
    dout = relayout(torch.randn_like(q), layout_name)
    check_backward(*(relayout(t, layout_name) for t in (q, k, v)), dout=dout, causal=True)


def test_gradients_of_expanded_tensors(model):
    """A gradient that flows in from a sum has one element in memory."""
    q, k, v = make_qkv("cpu", (9, 100), dims=(64, 64), heads=(2, 1))
    k, v = (t.expand(-1, 2, -1, -1) for t in (k, v))
    check_backward(q, k, v, dout=torch.ones((), dtype=q.dtype).expand(q.shape), lse_gradient=False)


def test_gradients_without_queries(model):
    for lengths in ((0, 70), (70, 0)):
        results = check_backward(*make_qkv("cpu", lengths, dims=(64, 64)))
        assert all((x == 0).all() for x in results)


def test_no_gradient_from_beside_a_sequence(model):
    """NaN in all of one sequence reaches no gradient of another."""
    qkv, bounds = make_inputs("cpu", ([70, 40, 20], [50, 90, 33]), dim=64, heads=(2, 1))
    dout = torch.randn(1, 2, qkv[0].shape[2], 64).to(qkv[0].dtype)
    clean = check_backward(*qkv, **bounds, causal=True, dout=dout, lse_gradient=False)
    others = ([*range(70), *range(110, 130)], *2 * [[*range(50), *range(140, 173)]])
    for x, rows in zip((*qkv, dout), (slice(70, 110), *2 * [slice(50, 140)], slice(70, 110)), strict=True):
        x[:, :, rows] = torch.nan
    own = [t.detach().requires_grad_() for t in qkv]
    out, _ = ops.attention(make_spec(*own, **bounds, causal=True), "cuda")
    for x, y, rows in zip(torch.autograd.grad(out, own, dout), clean, others, strict=True):
        assert torch.equal(x[:, :, rows], y[:, :, rows])


def test_extreme_gradients(model):
    """Weights of one key only, and scores whose powers overflow without the lse."""
    q, k, v = make_qkv("cpu", (64, 100), dims=(64, 64))
    check_backward(20 * q, 20 * k, v)


FLAWED = ("packed, not all keys", "packed", "grouped heads", "grouped heads, seven")
"""by number of the mistake in what TMA is told: a case that it spoils"""


def test_results_show_mistakes_in_boxes(model):
    """A box that runs on past its sequence, in or out; heads of a group in another order, or one of them for all."""
    assert len(FLAWED) == len(model.flaws())
    for number, name in zip(model.flaws(), FLAWED, strict=True):
        lengths, shapes, options = CASES[name]
        qkv, bounds = make_inputs("cpu", lengths, dim=64, **shapes)
        model.settings()
        check_forward(*qkv, **bounds, **options)
        model.flaw(number)
        with pytest.raises(AssertionError):
            check_forward(*qkv, **bounds, **options)


# The binding


def forward_arguments(**changes):
    """A call that the library accepts: no query, so that nothing runs."""
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 0, "kv_len": 5, "head_dim": 64, "dtype": 0}
    return cuda.Forward(**{**sizes, "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 2}, "dtype, head_dim: expected 0 or 1, and 64, 128 or 256, got 2, 64"),
        ({"head_dim": 80}, "got 0, 80"),
        ({"batch": -1}, "batch, q_len, kv_len: expected 0 to 2^30, got -1, 0, 5"),
        ({"kv_len": (1 << 30) + 1}, "got 1, 0, 1073741825"),
        ({"q_heads": 3, "kv_heads": 2}, "q_heads: expected a multiple of kv_heads == 2, got 3"),
        ({"kv_heads": 0}, "kv_heads == 0"),
        ({"scale": -0.5}, "scale: expected more than 0, got -0.5"),
        ({"scale": float("nan")}, "scale: expected more than 0"),
        ({"softcap": -1.0}, "softcap: expected a finite number, 0 for none, got -1"),
        ({"softcap": float("inf")}, "softcap: expected a finite number, 0 for none, got inf"),
        ({"left": (1 << 30) + 1}, "left, right: expected at most 2^30 in size, or 2^40, got 1073741825, 0"),
        ({"q_offset": 1 << 31}, "q_offset: expected at most 2^30 in size, got 2147483648"),
        ({"q_starts": 8}, "q_starts, k_starts, k_used: expected the first two or none, or all three"),
        ({"k_used": 8}, "q_starts, k_starts, k_used: expected the first two or none, or all three"),
        ({"q_offset": cuda._ENDS}, "q_offset: expected at most 2^30 in size, got 1099511627776"),
        ({"q_len": 1 << 30, "batch": 1 << 20}, "at most 2^31 - 1 works of a block"),
        ({"q_len": 1, "q": 8}, "q, k, v, out: expected rows apart from one another at multiples of 16 bytes"),
        ({"q_len": 1, "k_stride": (0, 0, 4)}, "at multiples of 16 bytes"),
        ({"q_len": 1, "out_stride": (0, 0, 4)}, "at multiples of 16 bytes"),
        ({"q_len": 1}, "rows apart from one another"),
        ({"q_len": 1, "k_stride": (0, 0, 8), "v_stride": (1 << 39, 0, 8)}, "below 2^40 bytes"),
    ],
    ids=str,
)
def test_the_library_refuses(model, changes, text):
    assert model.library.fastattn_attention_forward(ctypes.byref(forward_arguments())) == 0
    assert model.library.fastattn_attention_forward(ctypes.byref(forward_arguments(**changes))) == 1
    assert text in model.library.fastattn_last_error().decode()


def test_the_library_refuses_null(model):
    assert model.library.fastattn_attention_forward(None) == 1
    assert model.library.fastattn_last_error() == b"arguments: expected a pointer, got null"


def test_what_the_library_supports(model):
    supported = {(t, d) for t in range(-1, 4) for d in range(300) if model.library.fastattn_supported(t, d)}
    assert supported == set(itertools.product(cuda._DTYPES.values(), cuda.HEAD_DIMS))


def test_errors_of_the_library_are_raised(model, monkeypatch):
    q, k, v = make_qkv("cpu", (4, 4), dims=(64, 64))
    with pytest.raises(ValueError, match="fastattn: scale: expected more than 0, got 0"):
        ops.attention(make_spec(q, k, v, scale=0.0), "cuda")
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    with pytest.raises(ValueError, match="q: expected to start at a multiple of 16 bytes, got address 0x"):
        ops.attention(make_spec(shifted, k, v), "cuda")
    create = cuda.Forward
    monkeypatch.setattr(cuda, "Forward", lambda **arguments: create(**{**arguments, "device": -1}))
    with pytest.raises(RuntimeError, match="fastattn: CUDA: invalid device ordinal"):
        ops.attention(make_spec(q, k, v), "cuda")


def backward_arguments(**changes):
    """A call that the library accepts: no query and no key, so that nothing runs."""
    return cuda.Backward(f=forward_arguments(kv_len=0), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"f": forward_arguments(scale=-0.5)}, "scale: expected more than 0, got -0.5"),
        ({"f": forward_arguments()}, "q, k, v, out, dout, dq, dk, dv, rows: expected rows apart from one another at"),
        ({"f": forward_arguments(kv_len=1), "rows": 8}, "at multiples of 16 bytes"),
        ({"f": forward_arguments(q_len=1 << 30, batch=1 << 10)}, "at most 2^31 - 1 works of a block"),
    ],
    ids=["scale", "strides", "rows", "works"],
)
def test_the_library_refuses_a_backward_call(model, changes, text):
    assert model.library.fastattn_attention_backward(ctypes.byref(backward_arguments())) == 0
    arguments = cuda.Backward(**changes)
    assert model.library.fastattn_attention_backward(ctypes.byref(arguments)) == 1
    assert text in model.library.fastattn_last_error().decode()
    assert model.library.fastattn_attention_backward(None) == 1


# The order of events


def test_every_order(model):
    """None of loader, consumers and TMA breaks a rule of the machine in the problems of the table, which is current."""
    assert cuda_model.TABLE.read_text() == cuda_model.table(model), "run: python -m tests.support.cuda_model"


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_many_orders(model, dim):
    """Of a block with more works and tiles than a search can exhaust."""
    model.settings(blocks=1)
    check_forward(*make_qkv("cpu", (384, 700), dims=(dim, dim), heads=(2, 1)), causal=True)
    for seed in range(100):
        outcome = model.wander(seed)
        assert outcome.report == "", (outcome.text, outcome.schedule)


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_many_orders_of_the_backward_passes(model, dim):
    model.settings(blocks=1)
    check_backward(*make_qkv("cpu", (260, 300), dims=(dim, dim), heads=(1, 1)), causal=True)
    for kernel, seed in itertools.product(range(model.kernels()), range(30)):
        outcome = model.wander(seed, kernel)
        assert outcome.report == "", (outcome.text, outcome.schedule)


def test_mistakes(model):
    """The model finds each, and reports what it is."""
    cuda_model.call_mutated(model)
    mutations = model.mutations()
    assert len(mutations) >= 25 and len({mistake for mistake, _ in mutations}) == len(mutations)
    for number, (mistake, report) in enumerate(mutations):
        outcome = model.search(number)
        assert (mistake, outcome.report) == (mistake, report)
        assert outcome.text and (outcome.schedule or not outcome.states)


def test_mistakes_in_a_backward_pass(model):
    cuda_model.call_mutated_pass(model)
    mutations = model.mutations()
    assert len(mutations) >= 25 and len({mistake for mistake, _ in mutations}) == len(mutations)
    for number, (mistake, report) in enumerate(mutations):
        outcome = model.search(number)
        assert (mistake, outcome.report) == (mistake, report)


@pytest.mark.parametrize("dim", [64, 256])
def test_mistakes_at_other_head_dims(model, dim):
    """Found too, though another rule may break first, and with three consumers."""
    cuda_model.call_mutated(model, dim)
    assert [mistake for n, (mistake, _) in enumerate(model.mutations()) if not model.search(n).report] == []
