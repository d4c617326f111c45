"""Tiles: strides, loads, stores, casts and products."""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq

# Whether kernels run in Triton's interpreter. Fixed at import, like the decision of `triton.jit` itself.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


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
def is_finite(tile):
    """1 where an element is neither NaN nor infinite, else 0. The interpreter treats bfloat16 as integers."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), 1, 0)


@triton.jit
def finite(tile):
    """The tile with 0 in place of NaN and infinity."""
    return tl.where(is_finite(tile) != 0, tile, 0.0)


@triton.jit
def all_finite(acc):
    """Whether no element of a float32 tile is NaN or infinite."""
    if cuda_capability_geq(10, 0):  # with tensor memory: Triton 3.7.1 does not compile a sum of sums there
        return tl.sum(acc * 0.0) == 0.0
    else:
        return tl.sum(tl.sum(acc * 0.0, 1), 0) == 0.0


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
def load_tile(
    ptr, row, row_stride, n_rows, CHECK_ROWS: tl.constexpr, N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows ``row .. row + BLOCK_R`` of a matrix with ``N_COLS`` columns, zero outside it. Offsets are 64-bit."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
    if CHECK_ROWS and N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=(row + rows < n_rows) & (cols < N_COLS), other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=row + rows < n_rows, other=0.0)
    elif N_COLS != BLOCK_C:
        return tl.load(ptrs, mask=cols < N_COLS, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_finite_rows(
    ptr, row, row_stride, n_rows, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """`load_tile` with ``CHECK_ROWS``, and zero in rows that hold NaN or infinity.

    It loads twice: a computed tile would stay in registers, while a loaded tile goes to shared memory.
    """
    whole = tl.min(is_finite(load_tile(ptr, row, row_stride, n_rows, True, N_COLS, BLOCK_R, BLOCK_C)), 1)
    rows = tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows[:, None].to(tl.int64) * row_stride + cols)
    inside = ((row + rows < n_rows) & (whole != 0))[:, None]
    if N_COLS != BLOCK_C:
        inside = inside & (cols < N_COLS)
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def store_tile(
    ptr, tile, row, row_stride, n_rows, N_COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Store the part of ``tile`` that lies inside the matrix, in the pointer's dtype."""
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * row_stride + (rows.to(tl.int64) * row_stride + cols)
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(row + rows < n_rows) & (cols < N_COLS))
