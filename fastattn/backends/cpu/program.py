"""Several calls of the library as one: packed once, then run repeatedly on the current contents of their tensors."""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.backends.cpu import library, packing
from fastattn.spec import CacheSpec

LINEAR = struct.Struct("@2q2q3q3q3q3q2q3q1q1q")
NORM = struct.Struct("@2q1q2q4q1d")
CALL = struct.Struct("@2q")
_APPEND, _DECODE, _LINEAR, _NORM, _ROTATE = range(5)


class Program:
    """Operations on few rows, in the order in which they were added. All tensors of a program have one of `DTYPES`.

    A row is the last dimension at one place of all others. Rows may be any distance apart; their elements are adjacent.
    The program keeps the tensors, which must not move.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        self._team = packing.team()
        self._structs: list[tuple[int, ctypes.Array[ctypes.c_char]]] = []
        self._kept: list[object] = []
        self._calls: bytes | None = None

    def current(self) -> bool:
        """Whether the process and PyTorch's number of threads are the same as when the program was made."""
        return self._team == packing.team()

    def run(self) -> None:
        """Run all operations.

        Raises:
            MemoryError: memory ran out.
        """
        if self._calls is None:
            self._calls = b"".join(CALL.pack(kind, ctypes.addressof(packed)) for kind, packed in self._structs)
        if status := library.load().fastattn_cpu_run(self._calls, len(self._structs)):
            library.check(status)

    def linear(
        self, y: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, gated: bool = False,
        add: bool = False,
    ) -> None:  # fmt: skip
        """y (rows, columns of all) = x (rows, width) times each of up to three weights (columns, width), plus its bias.

        Args:
            gated: for two weights of one size, y (rows, columns) = silu(x W0^T + b0) * (x W1^T + b1).
            add: add the result to y.
        """
        none = (0,) * (3 - len(weights))
        packed = LINEAR.pack(
            *self._team, x.data_ptr(), x.stride(0), *[w.data_ptr() for w in weights], *none,
            *[w.stride(0) for w in weights], *none, *[0 if b is None else b.data_ptr() for b in biases], *none,
            *[w.shape[0] for w in weights], *none, y.data_ptr(), y.stride(0), packing.DTYPES[x.dtype], *x.shape, gated,
            add,
        )  # fmt: skip
        self._add(_LINEAR, packed, y, x, *weights, *biases)

    def rms_norm(self, y: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> None:
        """y = x / sqrt(mean(x ** 2) + eps) * weight over the last dimension of x.

        x is (rows, width), or (rows, heads, width) with adjacent heads. y may be x.
        """
        heads = x.shape[1] if x.ndim == 3 else 1
        packed = NORM.pack(
            x.data_ptr(), x.stride(0), 0 if weight is None else weight.data_ptr(), y.data_ptr(), y.stride(0),
            packing.DTYPES[x.dtype], x.shape[0], heads, x.shape[-1], eps,
        )  # fmt: skip
        self._add(_NORM, packed, y, x, weight)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> None:
        """Rotate x (rows, heads, head_dim), with adjacent heads, in place: dimension i with i + head_dim / 2.

        Args:
            cos, sin: float32 (positions, head_dim / 2), contiguous.
            position: int64 (rows,).
        """
        self._add(_ROTATE, packing.pack_rotate(x, x, cos, sin, position), x, cos, sin, position)

    def attend(self, out: Tensor, lse: Tensor, spec: CacheSpec) -> None:
        """Append to the cache, then attend; ``spec.lens`` is int64, with fewer queries than `packing.least_tall`."""
        assert spec.k is not None and spec.v is not None and spec.q.shape[2] < packing.least_tall(spec)
        append, made = packing.pack_append(spec.k_cache, spec.v_cache, spec.k, spec.v, spec.lens, spec.block_table)
        self._add(_APPEND, append, spec, *made)
        decode, made = packing.pack_decode(out, lse, spec, spec.lens, None)
        self._add(_DECODE, decode, out, lse, *made)

    def _add(self, kind: int, packed: bytes, *kept: object) -> None:
        self._structs.append((kind, ctypes.create_string_buffer(packed, len(packed))))
        self._kept.extend(kept)
        self._calls = None
