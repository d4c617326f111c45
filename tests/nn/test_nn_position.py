"""fastattn.nn.InputEmbedding and PositionalEncoding."""

import copy
import math

import pytest
import torch

import fastattn.nn as fnn
from fastattn.testing import assert_parity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_embedding_is_scaled():
    embedding = fnn.InputEmbedding(10, 16)
    tokens = torch.randint(10, (3, 5))
    assert torch.equal(embedding(tokens), embedding.weight[tokens] * 4.0)


def test_embedding_starts_with_unit_variance():
    embedding = fnn.InputEmbedding(1000, 256)
    variance = embedding(torch.arange(1000)).var().item()
    assert abs(variance - 1) < 5 * math.sqrt(2 / 256_000)


def test_embedding_of_padding_is_zero_and_stays_so():
    embedding = fnn.InputEmbedding(10, 16, padding_idx=3)
    out = embedding(torch.tensor([3, 4]))
    assert (out[0] == 0).all()
    out.sum().backward()
    assert (embedding.weight.grad[3] == 0).all()
    assert (embedding.weight.grad[4] == 4.0).all()


def test_sinusoidal_table_is_the_formula():
    """sin(pos / 10000^(2i / d)), cos(same), from Python floats."""
    d_model, max_len = 6, 5000
    table = fnn.PositionalEncoding(d_model, max_len).table
    positions = [0, 1, 17, max_len - 1]
    angles = [[position / 10000 ** (2 * i / d_model) for i in range(d_model // 2)] for position in positions]
    expected = torch.tensor([[f(x) for x in row for f in (math.sin, math.cos)] for row in angles], dtype=torch.float64)
    assert_parity(table[positions], expected, expected.float())


def test_offset_is_a_rotation():
    """The property that the sinusoids were chosen for: the encoding of pos + k is a fixed linear map of that of pos."""
    table = fnn.PositionalEncoding(8, 50, dtype=torch.float64).table
    rotation = torch.linalg.lstsq(table[:40], table[7:47]).solution
    # The least residual is at most that of the rotation itself: the rounding of angles up to 46.
    assert_parity(table[:40] @ rotation, table[7:47], table[7:47], intermediate=46.0)


@pytest.mark.parametrize("d_model", [1, 2, 7])
def test_any_model_size(d_model):
    encoding = fnn.PositionalEncoding(d_model, 10, dropout=0.0)
    assert encoding(torch.zeros(4, 2, d_model)).isfinite().all()


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layouts(batch_first, kind):
    encoding = fnn.PositionalEncoding(8, 10, dropout=0.0, kind=kind, batch_first=batch_first)
    x = torch.randn(2, 5, 8)
    expected = x + encoding.table[:5]
    y = encoding(x if batch_first else x.transpose(0, 1))
    assert torch.equal(y if batch_first else y.transpose(0, 1), expected)
    assert torch.equal(encoding(x[0]), expected[0])  # unbatched


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_offset_decodes_step_by_step(kind):
    encoding = fnn.PositionalEncoding(8, 10, dropout=0.0, kind=kind, batch_first=True)
    x = torch.randn(2, 10, 8)
    steps = [encoding(x[:, t : t + 1], offset=t) for t in range(10)]
    assert torch.equal(torch.cat(steps, dim=1), encoding(x))


def test_state_dict_and_gradients():
    fixed, learned = fnn.PositionalEncoding(8, 10), fnn.PositionalEncoding(8, 10, kind="learned")
    assert list(fixed.state_dict()) == []
    assert list(fixed.parameters()) == []
    assert list(learned.state_dict()) == ["table"]
    learned.eval()(torch.zeros(2, 3, 8)).sum().backward()
    assert (learned.table.grad[:2] == 3).all()
    assert (learned.table.grad[2:] == 0).all()


def test_dropout_only_in_training():
    encoding = fnn.PositionalEncoding(8, 10, dropout=0.5)
    x = torch.ones(5, 2, 8)
    assert (encoding(x) == 0).any()
    assert torch.equal(encoding.eval()(x), x + encoding.table[:5, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    encoding = fnn.PositionalEncoding(8, 10, dropout=0.0)
    assert encoding(torch.zeros(5, 2, 8, dtype=dtype)).dtype == dtype
    moved = copy.deepcopy(encoding).to(dtype)
    assert moved(torch.zeros(5, 2, 8, dtype=dtype)).dtype == dtype
    made = fnn.PositionalEncoding(8, 10, dtype=dtype).table
    assert torch.equal(made, moved.table) and made.dtype == moved.table.dtype


def test_meta_device():
    """A fixed table is not in the state dict, so it must come back by reset_parameters."""
    encoding = fnn.PositionalEncoding(8, 10, device="meta").to_empty(device="cpu")
    encoding.reset_parameters()
    assert torch.equal(encoding.table, fnn.PositionalEncoding(8, 10).table)


@pytest.mark.parametrize(
    ("shape", "offset", "message"),
    [
        ((5, 8), 6, r"max_len == 10, got 6 \+ 5"),
        ((11, 2, 8), 0, r"max_len == 10, got 0 \+ 11"),
        ((5, 8), -1, "offset: expected 0 or more"),
        ((5, 7), 0, r"x.shape: expected .* the last of 8, got \(5, 7\)"),
        ((8,), 0, "2 or 3 dimensions"),
        ((1, 5, 2, 8), 0, "2 or 3 dimensions"),
    ],
)
def test_errors(shape, offset, message):
    with pytest.raises(ValueError, match=message):
        fnn.PositionalEncoding(8, 10)(torch.zeros(shape), offset)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x\.dtype: expected a floating dtype, got torch\.int64; InputEmbedding"):
        fnn.PositionalEncoding(8, 10)(torch.zeros(5, 8, dtype=torch.int64))


def test_constructor_errors():
    with pytest.raises(ValueError, match="kind: expected 'sinusoidal' or 'learned', got 'rope'"):
        fnn.PositionalEncoding(8, kind="rope")
    with pytest.raises(ValueError, match="max_len: expected at least 1, got 0"):
        fnn.PositionalEncoding(8, 0)
    with pytest.raises(TypeError, match="d_model: expected an int, got float"):
        fnn.PositionalEncoding(8.0)


def test_compiles_without_graph_breaks():
    model = torch.nn.Sequential(fnn.InputEmbedding(10, 8), fnn.PositionalEncoding(8, 10, dropout=0.0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(10, (5, 2))
    assert torch.equal(compiled(tokens), model(tokens))


def test_alibi_slopes_are_the_papers():
    assert fnn.ALiBi().slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert fnn.ALiBi().slopes(1).tolist() == [2.0**-8]
    # Heads beyond a power of two take every other slope of the double: 12 = 8 and the odd ones of 16.
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert torch.equal(fnn.ALiBi().slopes(12), torch.tensor(expected))


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 16).double(), torch.randn(1, 1, 16).double()
    rope = fnn.RoPE(theta=100.0)

    def score(i, j):
        turned = [fnn.position.rotate(x, rope.tables(torch.tensor([at]), 16)) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    eps = torch.finfo(torch.float32).eps  # of the angles, which are at most 40 radians
    rounding = (
        40 * eps * float(q.norm() * k.norm())
    )  # a turn by an angle too much moves a vector by that times its size
    assert abs(score(5, 3) - score(40, 38)) < rounding < abs(score(5, 3) - score(5, 4))


def test_linear_scaling_stretches_positions():
    positions = torch.arange(12)
    plain = fnn.RoPE().tables(positions, 8)
    stretched = fnn.RoPE(scaling=fnn.LinearScaling(4.0)).tables(4 * positions, 8)
    for a, b in zip(plain, stretched, strict=True):
        assert torch.equal(a, b)  # of angles that differ by powers of two, which round alike


def test_llama3_and_yarn_keep_short_wavelengths_and_stretch_long_ones():
    frequency = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    eps = torch.finfo(torch.float64).eps
    for scaling in (fnn.Llama3Scaling(8.0, 4096), fnn.YarnScaling(8.0, 4096)):
        ratio = scaling.scale(frequency, 10000.0) / frequency
        assert ratio[0] == 1.0
        assert ratio[-1] == 1 / 8
        assert (ratio.diff() <= eps).all()  # a ratio is at most 1, and so is rounded by half an eps


def test_odd_head_dims_are_refused():
    with pytest.raises(ValueError, match="head_dim: expected an even number for RoPE, got 7"):
        fnn.RoPE().tables(torch.arange(3), 7)


def test_yarn_magnitude():
    """cos and sin of an angle have the length that the scaling says: the paper's, or the one given."""
    for scaling, magnitude in (
        (fnn.YarnScaling(8.0, 4096), 0.1 * math.log(8.0) + 1.0),
        (fnn.YarnScaling(8.0, 4096, attention_factor=0.75), 0.75),
    ):
        cos, sin = fnn.RoPE(scaling=scaling).tables(torch.arange(9), 8)
        exact = torch.full((9, 4), magnitude, dtype=torch.float64)
        assert_parity(torch.hypot(cos, sin), exact, exact.float())
