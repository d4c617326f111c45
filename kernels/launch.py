"""Host-side helpers of the launchers: kernel operands, strides, device facts."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.operands import Operands, Options

from . import config, replay
from .operands import Dropout, Packed, Rows, Scores, Sparse, Table, Terms
from .scores import LOG2E
from .tiles import INTERPRETED, pieces

SCORES_UNIT = 16
"""Strides of a mask or bias are multiples of this if 16-byte accesses read it, for elements of one byte or more."""
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of this device in `config`."""
    if device.type == "cpu" and INTERPRETED.value:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The least number of programs that run in parallel; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of float32 products: exact unless torch's own matmul setting allows TF32."""
    if dtype != torch.float32 or INTERPRETED.value:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor with adjacent elements along its last dimension; a copy only if necessary."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """8 where every row starts at a multiple of 8 elements, which lets the compiler use 16-byte accesses; else 1.

    Kernels get strides divided by this unit and multiply it back. Divisibility is then a compile-time fact that depends
    on the layout, not on a length, so a new sequence length never causes recompilation.
    """
    return 8 if all(s % 8 == 0 for t in tensors for s in t.stride()[:-1]) else 1


def encode(size: int) -> int:
    """Encode an integer for a group; README.md explains why and how."""
    return 16 * size


def encode_strides(tensor: Tensor, unit: int) -> tuple[int, int, int]:
    """Encode batch, head and row strides, in units, for a group; see README.md."""
    b, h, m, _ = (16 * (s // unit) for s in tensor.stride())
    return b, h, m


def encode_wide(stride: int) -> int:
    """Encode a stride of a mask or bias for a group; see README.md."""
    return 16 * (stride + (1 << 40))


def rows(tensor: Tensor | None, unit: int) -> Rows:
    """The rows of a (B, H, L, D) tensor whose last dimension has adjacent elements."""
    return Rows(None, None) if tensor is None else Rows(tensor, encode_strides(tensor, unit))


def scores(
    tensor: Tensor | None, shape: tuple[int, int, int, int], unit: int | None = None, columns: int | None = None
) -> Scores:
    """A 4-D mask or bias, broadcast to ``shape`` without a copy. Kernels read bool as bytes.

    ``unit`` comes from `ahead`. ``columns``: for a KV cache, whose keys may differ from the columns.
    """
    if tensor is None:
        return Scores(None, None, None, None)
    one_row = tensor.shape[2] == 1
    unit = None if one_row else unit
    adjacent = tensor.shape[3] != 1 and tensor.stride(3) == 1
    if tensor.dtype == torch.bool:
        tensor = replay.same_address(tensor.view(torch.uint8), of=tensor)
    b, h, m, n = (encode_wide(s // (unit or 1)) for s in tensor.expand(shape).stride())
    one_head = columns is not None and tensor.shape[1] == 1
    strides = (b, None if one_head else h, None if one_row else m, None if adjacent else n)
    return Scores(tensor, strides, None if columns is None else encode(columns), unit)


def ahead(q: Tensor, operands: Operands) -> int | None:
    """`SCORES_UNIT` if kernels load the tiles of a mask or bias with a row per query ahead, like those of keys.

    Otherwise None. The rows have to begin at multiples of this many elements. Shared memory has room for only one of
    mask and bias, with elements up to `config.LARGEST_AHEAD`, and for neither with a block mask, which takes more
    stages.
    """
    largest = config.LARGEST_AHEAD.get(architecture(q.device), 0)
    if q.element_size() > largest or operands.block_mask:
        return None
    matrices = [x for x in (operands.mask, operands.bias) if x is not None and x.shape[2] != 1]
    if len(matrices) != 1 or matrices[0].element_size() > largest or matrices[0].data_ptr() % 16:
        return None
    *strides, column = matrices[0].stride()
    steps = (stride for size, stride in zip(matrices[0].shape[:3], strides, strict=True) if size > 1)
    adjacent = column == 1 and matrices[0].shape[3] > 1
    return SCORES_UNIT if adjacent and all(step % SCORES_UNIT == 0 for step in steps) else None


def sparse(block_mask: Sequence[Tensor], by_key: bool = False) -> Sparse:
    """A block mask by query or by key, from the tensors of `fastattn.block_mask.BlockTensors`."""
    if not block_mask:
        return Sparse(None, None, None, None, None)
    query_lines, query_entries, key_lines, key_entries, _, pool = block_mask
    lines, entries = (key_lines, key_entries) if by_key else (query_lines, query_entries)
    return Sparse(lines, entries, pool, *_line_strides(lines))


def sparse_table(block_mask: Sequence[Tensor]) -> Table:
    """A block mask as a table over query and key blocks."""
    if not block_mask:
        return Table(None, None, None, None)
    query_lines, _, _, _, table, pool = block_mask
    return Table(table, pool, *_line_strides(query_lines))


def _line_strides(lines: Tensor) -> tuple[int, int]:
    """The distance in lines between batch entries and between heads, encoded."""
    batches, heads, count, _ = lines.shape
    return encode(heads * count if batches > 1 else 0), encode(count if heads > 1 else 0)


def tiles(length: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Tiles per head and batch entry; for packed sequences the slots of `ranges.locate`, from shapes only."""
    return -(-length // block) if cu_seqlens is None else length // block + cu_seqlens.shape[0] - 1


def keep_scale(dropout_p: float) -> float:
    """The factor of kept probabilities that preserves their expectation."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale, sign) that give the same scores with a positive scale, which the running maximum of the softmax needs.

    The gradient of the given q is ``sign`` times that of the returned one. A scale of 0 moves into q, because
    0 * -inf is not -inf; so does one that float32 arithmetic rounds to 0.
    """
    scale = float(scale)
    if abs(scale) < SMALLEST_NORMAL:
        return q * 0.0, 1.0, 0.0
    return (-q, -scale, -1.0) if scale < 0.0 else (q, scale, 1.0)


def terms(
    operands: Operands, scale: float, softcap: float | None, sequences: int, shape: tuple[int, int, int, int],
    unit: int | None = None,
) -> Terms:  # fmt: skip
    """The score terms of a call with scores of ``shape``; ``scale`` is positive, ``unit`` comes from `ahead`."""
    softcap = None if softcap is None else float(softcap)  # an integer would compile another kernel
    return Terms(
        scores(operands.mask, shape, unit), scores(operands.bias, shape, unit),
        slopes(operands.alibi_slopes, sequences), float32(operands.sinks), scale, softcap,
        LOG2E.value * (scale if softcap is None else softcap),
    )  # fmt: skip


class Facts(NamedTuple):
    """What a launch config is looked up by."""

    architecture: str
    head_dim: int
    """the larger of D and Dv"""
    element_size: int


class Call:
    """Values that the launchers of the forward and the backward pass derive from the same arguments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options) -> None:
        self.batch, self.q_heads, self.q_len, head_dim = q.shape
        self.kv_heads, self.kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
        self.q, self.scale, self.sign = positive_scale(unit_last(q), options.scale)
        self.k, self.v = unit_last(k), unit_last(v)
        cu_seqlens_q = operands.cu_seqlens_q
        self.sequences = self.batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        shape = (self.batch, self.q_heads, self.q_len, self.kv_len)
        unit = ahead(q, operands)
        self.terms = terms(operands, self.scale, options.softcap, self.sequences, shape, unit)
        self.dropout = Dropout(None, None, None, None)
        if operands.seed is not None:
            part = operands.seed if operands.seed.numel() > 1 else None
            self.dropout = Dropout(operands.seed, part, float(options.dropout_p), keep_scale(options.dropout_p))
        self.packed = Packed(cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k)
        self.sizes = (
            self.sequences, self.q_heads, self.q_heads // self.kv_heads, self.q_len, self.kv_len, options.q_offset,
            options.left, options.right,
        )  # fmt: skip
        self.constants = (dot_precision(q.dtype), head_dim, v_dim)
        self._facts = Facts(architecture(q.device), max(head_dim, v_dim), q.element_size())
        self._indirect, self._in_pieces = bool(operands.block_mask), max(pieces(head_dim), pieces(v_dim)) > 1
        read = [x.shape[2] == 1 for x in (operands.mask, operands.bias) if x is not None]
        self._reads_row, self._reads_late = True in read, False in read and unit is None
        has_mask = operands.mask is not None and operands.mask.shape[2] != 1
        of_both = "mask" if has_mask else "bias"
        self._reads_ahead = "" if unit is None else of_both

    def key_passes(self) -> tuple[config.Kernel, ...]:
        """The kernels for the gradients of keys and values: one for both, or one each."""
        return config.key_passes(self._facts.architecture, self._facts.head_dim)

    def configure(self, kernel: config.Kernel, unit: int) -> config.LaunchConfig:
        """The launch config of one of the call's kernels; ``unit`` comes from `stride_unit`."""
        crowded = self._reads_late or unit == 1
        crowded |= kernel == "dkdv" and (self.dropout.seed is not None or self.terms.softcap is not None)
        return config.lookup(
            kernel, *self._facts, crowded=crowded, ahead=self._reads_ahead, one_row=self._reads_row,
            indirect=self._indirect, in_pieces=self._in_pieces,
        )  # fmt: skip


def slopes(alibi_slopes: Tensor | None, batch: int) -> Tensor | None:
    """ALiBi slopes (1 or B, Hq) for kernels: one float32 per batch entry and head."""
    if alibi_slopes is not None and alibi_slopes.shape[0] != batch:
        alibi_slopes = alibi_slopes.expand(batch, -1)
    return float32(alibi_slopes)


def float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor as adjacent float32 elements."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
