"""Host-side helpers shared by the launchers: strides, flags derived from arguments, device facts."""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .primitives import INTERPRETED


@functools.cache
def architecture(device: torch.device) -> str:
    """The name under which `config` knows this device."""
    if device.type == "cpu" and INTERPRETED.value:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: exact unless torch's own matmul setting allows TF32."""
    if dtype != torch.float32 or INTERPRETED.value:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor with adjacent elements along its last dimension, copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """8 where every row starts at a multiple of 8 elements, which lets the compiler use 16-byte accesses; else 1.

    Kernels get strides divided by this unit and multiply it back: divisibility becomes a compile-time fact that
    depends on the layout, not on a length, so a new sequence length never compiles again.
    """
    return 8 if all(s % 8 == 0 for t in tensors for s in t.stride()[:-1]) else 1


def strides(tensor: Tensor, unit: int) -> tuple[int, int, int]:
    """Batch, head and row strides in units, times 16.

    Triton compiles anew where an integer in a tuple becomes, or ceases to be, 1 or a multiple of 16, whatever
    `do_not_specialize` says. Sixteen times a stride is always a multiple and never 1.
    """
    b, h, m, _ = (16 * (s // unit) for s in tensor.stride())
    return b, h, m


class ScoreOperand(NamedTuple):
    """A mask or bias as kernels take it: pointer, strides (0 where it broadcasts) in their coded form, two flags."""

    tensor: Tensor | None
    strides: tuple[int, int, int, int]
    by_row: bool
    unit_cols: bool


def score_operand(tensor: Tensor | None, shape: tuple[int, int, int, int]) -> ScoreOperand:
    """Broadcast ``tensor`` (4-D) to ``shape`` without a copy. bool is read as bytes.

    The strides of an Lq x Lk matrix outgrow 32 bits at ordinary lengths, and with its width an integer's type changes
    and kernels compile anew. So all are passed above 2^32, on top of what `strides` says.
    """
    if tensor is None:
        return ScoreOperand(None, (0, 0, 0, 0), False, True)
    by_row = tensor.shape[2] != 1
    unit_cols = tensor.shape[3] != 1 and tensor.stride(3) == 1
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    b, h, m, n = (16 * (s + (1 << 40)) for s in tensor.expand(shape).stride())
    return ScoreOperand(tensor, (b, h, m, n), by_row, unit_cols)


class SparseOperand(NamedTuple):
    """A block mask as kernels take it: lines, their entries, and how many lines a batch entry and a head are apart."""

    offsets: Tensor | None
    entries: Tensor | None
    pool: Tensor | None
    batch_stride: int
    head_stride: int


def sparse_operand(block_mask: Sequence[Tensor] | None, by_key: bool = False) -> SparseOperand:
    """By query or by key, from the tensors of `fastattn.block_mask.BlockTensors`."""
    if not block_mask:
        return SparseOperand(None, None, None, 0, 0)
    query_offsets, query_entries, key_offsets, key_entries, _, pool = block_mask
    offsets, entries = (key_offsets, key_entries) if by_key else (query_offsets, query_entries)
    batches, heads, lines, _ = offsets.shape
    return SparseOperand(offsets, entries, pool, heads * lines if batches > 1 else 0, lines if heads > 1 else 0)


def tiles(length: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Tiles per head and batch entry: for packed sequences the slots of `primitives.locate`, from the shapes alone."""
    return -(-length // block) if cu_seqlens is None else length // block + cu_seqlens.shape[0] - 1


def keep_scale(dropout_p: float) -> float:
    """What kept probabilities are multiplied by, so that their expectation stays."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same products and a positive scale, which the running maximum of the softmax needs.

    A scale of 0 becomes a denormal-free tiny one, since 0 * -inf is not -inf.
    """
    if scale < 0.0:
        q, scale = -q, -scale
    return q, max(scale, 1e-30)


def slopes(alibi_slopes: Tensor | None, batch: int) -> Tensor | None:
    """ALiBi slopes (1 or B, Hq) as kernels take them: one float32 per batch entry and head."""
    return None if alibi_slopes is None else alibi_slopes.expand(batch, -1).to(torch.float32).contiguous()


def float32(tensor: Tensor | None) -> Tensor | None:
    """One float32 per element, adjacent."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
