"""Dropout bits. They depend on the seed, batch entry, head, query and key only, not on tile sizes."""

import triton
import triton.language as tl


@triton.jit
def dropout_row_keys(dropout, batch, head, rows):
    """Two 32-bit keys per query row from Philox-4x32-7 (Salmon et al., 2011), the strong part of the dropout bits."""
    if dropout.part is not None:
        batch += tl.load(dropout.part + 1)
        head += tl.load(dropout.part + 2)
        first, step = tl.load(dropout.part + 3).to(tl.int32), tl.load(dropout.part + 4).to(tl.int32)
        rows = first + rows.to(tl.int32) * step
    zero = (rows * 0).to(tl.uint32)
    heads, batches = zero + tl.cast(head, tl.uint32), zero + tl.cast(batch, tl.uint32)
    k0, k1, _, _ = tl.philox(tl.load(dropout.seed), rows.to(tl.uint32), heads, batches, zero, n_rounds=7)
    return k0, k1


@triton.jit
def dropout_keep(k0, k1, cols, dropout):
    """The weights of a tile that dropout keeps, by a keyed full-avalanche mix of the key index."""
    if dropout.part is not None:
        first, step = tl.load(dropout.part + 5).to(tl.int32), tl.load(dropout.part + 6).to(tl.int32)
        cols = first + cols.to(tl.int32) * step
    x = (cols.to(tl.uint32) * 0x9E3779B1) ^ k0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ k1) * 0x846CA68B
    x = x ^ (x >> 16)
    uniform = (x >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return uniform >= dropout.p
