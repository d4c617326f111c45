"""Which probabilities dropout keeps: the bits that every backend reproduces."""

import math
import struct

import torch
from torch import Tensor

DROPOUT_ROUNDS = 7
_MASK32 = 0xFFFFFFFF


def _philox_row_keys(seed: int, batches: Tensor, heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """First two words of Philox-4x32-7 (Salmon et al., 2011) at counter (row, head, batch, 0), as int32.

    The low 64 bits of an int64 product are those of the unsigned product; an arithmetic shift and a mask read its upper
    half.
    """
    c0, c1, c2, c3 = rows, heads, batches, torch.zeros_like(rows)
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(DROPOUT_ROUNDS):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0.to(torch.int32), c1.to(torch.int32)


def _int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def dropout_keep(
    seed: Tensor, dropout_p: float, batch: int, heads: int, rows: tuple[int, int], keys: tuple[int, int],
    first_batch: int = 0,
) -> Tensor:  # fmt: skip
    """Which probabilities dropout keeps, for query rows ``rows[0] .. rows[1]`` and keys ``keys[0] .. keys[1]``.

    bool (batch, heads, rows, keys), a function of (seed, b, h, i, j) alone: Philox gives each row two keys, a
    full-avalanche 32-bit mix keyed by them gives each element its bits, and the upper 24 of these, as a fraction, are
    compared with ``dropout_p``. ``seed`` as in `fastattn.spec.Operands`: it may say where b, h, i and j begin.
    """
    number, *origin = seed.tolist()
    b, h, row, row_step, key, key_step = origin or (0, 0, 0, 1, 0, 1)

    def index(first: int, last: int, dim: int) -> Tensor:
        return torch.arange(first, last, device=seed.device).view([-1 if d == dim else 1 for d in range(3)])

    k0, k1 = _philox_row_keys(
        number, b + index(first_batch, first_batch + batch, 0), h + index(0, heads, 1), row + row_step * index(*rows, 2)
    )
    columns = key + key_step * torch.arange(*keys, device=seed.device, dtype=torch.int32)
    x = columns * _int32(0x9E3779B1) ^ k0[..., None]

    def xor_shift(bits: int) -> None:  # int32 shifts bring in the sign: mask it off
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))

    xor_shift(16)
    x.mul_(_int32(0x7FEB352D))
    xor_shift(15)
    x.bitwise_xor_(k1[..., None]).mul_(_int32(0x846CA68B))
    xor_shift(16)
    fraction = x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return fraction >= math.ceil(struct.unpack("f", struct.pack("f", dropout_p))[0] * (1 << 24))


def keep_scale(dropout_p: float) -> float:
    """The factor on kept probabilities that preserves their expectation."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
