"""Tiles: strides, loads, stores, casts and products.

A tile with the columns of a head dim is a tuple of one or two pieces, see `pieces`.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq

# Whether kernels run in Triton's interpreter. Fixed at import, like the decision of `triton.jit` itself.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.constexpr_function
def pieces(columns):
    """The number of pieces of a tile with ``columns`` columns.

    They have powers of two of columns, 16 or more. Beyond 64 there are two if they have fewer columns than one would
    have: 192 takes 128 and 64 in place of 256, 96 takes 64 and 32 in place of 128.
    """
    half = triton.next_power_of_2(columns) // 2
    return 2 if half >= 64 and max(16, triton.next_power_of_2(columns - half)) < half else 1


@triton.constexpr_function
def first_column(columns, piece):
    """The first column of piece 0 or 1."""
    return triton.next_power_of_2(columns) // 2 if piece else 0


@triton.constexpr_function
def piece_columns(columns, piece):
    """The columns of piece 0 or 1, with those that are not in the matrix."""
    whole = triton.next_power_of_2(columns)
    if pieces(columns) == 2:
        whole = triton.next_power_of_2(columns - whole // 2) if piece else whole // 2
    return max(16, whole)


@triton.constexpr_function
def padded_columns(columns):
    """The columns of all pieces."""
    return sum(piece_columns(columns, piece) for piece in range(pieces(columns)))


@triton.constexpr_function
def is_cut(columns, piece):
    """Whether a piece has columns that are not in the matrix."""
    return first_column(columns, piece) + piece_columns(columns, piece) > columns


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x.to(dtype)``, rounding to nearest even everywhere.

    The interpreter truncates float32 to bfloat16, and loses the carry when it rounds to float8.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: rounds to the nearest 2^-9, for subnormal numbers
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``acc`` may be None. The interpreter cannot multiply bfloat16, so it gets float32
    inputs."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """``a @ b^T`` of two tiles in pieces."""
    if len(a) == 1:
        return dot(a[0], tl.trans(b[0]), None, PRECISION)
    else:
        return dot(a[0], tl.trans(b[0]), dot(a[1], tl.trans(b[1]), None, PRECISION), PRECISION)


@triton.jit
def add_products(acc, x, tile, PRECISION: tl.constexpr):
    """``acc + x @ tile``, where ``acc`` and ``tile`` are in pieces; ``x`` is rounded to the dtype of the tile."""
    x = cast(x, tile[0].dtype)
    main = dot(x, tile[0], acc[0], PRECISION)
    if len(tile) == 1:
        return (main,)
    else:
        return main, dot(x, tile[1], acc[1], PRECISION)


@triton.jit
def zeros(BLOCK_R: tl.constexpr, N_COLS: tl.constexpr):
    """An accumulator in pieces."""
    tile = ()
    for i in tl.static_range(pieces(N_COLS)):
        tile += (tl.zeros([BLOCK_R, piece_columns(N_COLS, i)], tl.float32),)
    return tile


@triton.jit
def columns_of_pieces(N_COLS: tl.constexpr):
    """The indices of the columns of each piece, as a row."""
    cols = ()
    for i in tl.static_range(pieces(N_COLS)):
        cols += (first_column(N_COLS, i) + tl.arange(0, piece_columns(N_COLS, i))[None, :],)
    return cols


@triton.jit
def scaled(tile, factor):
    """The tile times a number, or a column of numbers."""
    return [piece * factor for piece in tile]


@triton.jit
def is_finite(tile):
    """1 where an element is neither NaN nor infinite, else 0. The interpreter treats bfloat16 as integers."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), 1, 0)


@triton.jit
def finite(tile):
    """The tile with 0 in place of NaN and infinity."""
    return [tl.where(is_finite(piece) != 0, piece, 0.0) for piece in tile]


@triton.jit
def finite_rows(tile):
    """1 where a row has neither NaN nor infinity, else 0."""
    whole = tl.min(is_finite(tile[0]), 1)
    if len(tile) == 2:
        whole = tl.minimum(whole, tl.min(is_finite(tile[1]), 1))
    return whole


@triton.jit
def zero_if_finite(piece):
    """0 if no element is NaN or infinite, else NaN."""
    if cuda_capability_geq(10, 0):  # with tensor memory: Triton 3.7.1 does not compile a sum of sums there
        return tl.sum(piece * 0.0)
    else:
        return tl.sum(tl.sum(piece * 0.0, 1), 0)


@triton.jit
def all_finite(acc):
    """Whether no element of a float32 tile is NaN or infinite."""
    zero = zero_if_finite(acc[0])
    if len(acc) == 2:
        zero += zero_if_finite(acc[1])
    return zero == 0.0


@triton.jit
def decode_stride(encoded, UNIT: tl.constexpr):
    """The stride in elements that `launch.encode_strides` encoded."""
    return encoded // 16 * UNIT


@triton.jit
def decode_wide(encoded, unit=None):
    """The stride in elements of a mask or bias, which `launch.encode_wide` encoded in units."""
    stride = encoded // 16 - (1 << 40)
    return stride if unit is None else stride * unit


@triton.jit
def decode_size(encoded):
    """The size or the stride in elements that `launch.encode` encoded."""
    return encoded // 16


@triton.jit
def head_rows(x, entry, head, row, UNIT: tl.constexpr):
    """(pointer to ``row`` of one head of one batch entry, row stride) of an `operands.Rows`, with 64-bit offsets."""
    row_stride = decode_stride(x.strides[2], UNIT)
    offset = entry * decode_stride(x.strides[0], UNIT) + head * decode_stride(x.strides[1], UNIT) + row * row_stride
    return x.ptr + offset, row_stride


@triton.jit
def load_tile(ptr, row, row_stride, n_rows, CHECK_ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows ``row .. row + BLOCK_R`` of a matrix with ``N_COLS`` columns, in pieces; zero outside it.

    Offsets are 64-bit.
    """
    rows = tl.arange(0, BLOCK_R)[:, None]
    tile = ()
    for i in tl.static_range(pieces(N_COLS)):
        cols = first_column(N_COLS, i) + tl.arange(0, piece_columns(N_COLS, i))[None, :]
        ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
        if CHECK_ROWS and is_cut(N_COLS, i):
            tile += (tl.load(ptrs, mask=(row + rows < n_rows) & (cols < N_COLS), other=0.0),)
        elif CHECK_ROWS:
            tile += (tl.load(ptrs, mask=row + rows < n_rows, other=0.0),)
        elif is_cut(N_COLS, i):
            tile += (tl.load(ptrs, mask=cols < N_COLS, other=0.0),)
        else:
            tile += (tl.load(ptrs),)
    return tile


@triton.jit
def load_finite_rows(ptr, row, row_stride, n_rows, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr):
    """`load_tile` with ``CHECK_ROWS``, and zero in rows that hold NaN or infinity.

    It loads twice: a computed tile would stay in registers, while a loaded tile goes to shared memory.
    """
    whole = finite_rows(load_tile(ptr, row, row_stride, n_rows, True, N_COLS, BLOCK_R))
    rows = tl.arange(0, BLOCK_R)
    tile = ()
    for i in tl.static_range(pieces(N_COLS)):
        cols = first_column(N_COLS, i) + tl.arange(0, piece_columns(N_COLS, i))[None, :]
        ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows[:, None].to(tl.int64) * row_stride + cols)
        inside = ((row + rows < n_rows) & (whole != 0))[:, None]
        if is_cut(N_COLS, i):
            tile += (tl.load(ptrs, mask=inside & (cols < N_COLS), other=0.0),)
        else:
            tile += (tl.load(ptrs, mask=inside, other=0.0),)
    return tile


@triton.jit
def store_tile(ptr, tile, row, row_stride, n_rows, N_COLS: tl.constexpr):
    """Store the part of a tile that lies inside the matrix, in the pointer's dtype."""
    rows = tl.arange(0, tile[0].shape[0])[:, None]
    for i in tl.static_range(pieces(N_COLS)):
        cols = first_column(N_COLS, i) + tl.arange(0, piece_columns(N_COLS, i))[None, :]
        ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
        tl.store(ptrs, cast(tile[i], ptr.dtype.element_ty), mask=(row + rows < n_rows) & (cols < N_COLS))
