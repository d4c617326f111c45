"""The named groups in which a call's tensors, numbers and gradients pass between the public function and a kernel.

An absent operand is None; there are no flags beside it.
"""

from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors beside q, k and v."""

    mask: Tensor | None = None
    """bool, 4-D, broadcastable to (B, Hq, Lq, Lk); True takes part"""
    bias: Tensor | None = None
    """float, 4-D, broadcastable to (B, Hq, Lq, Lk); added to the scaled scores"""
    alibi_slopes: Tensor | None = None
    """float (1 or B, Hq); slope * |i + q_offset - j| is subtracted from the scores"""
    sinks: Tensor | None = None
    """float (Hq,); one more logit in each row's softmax, with no value"""
    q_offset_tensor: Tensor | None = None
    """int (B,), in place of `Options.q_offset`"""
    seed: Tensor | None = None
    """with dropout: int64 (1,), the seed. Or int64 (7,) for a part of a larger call, which then has the larger call's
    dropout: the seed, the first batch entry, the first head, the first row and row step, the first key and key step"""
    cu_seqlens_q: Tensor | None = None
    """int (sequences + 1,): where each packed sequence begins in q, and the end of the last; B = 1"""
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    """int (sequences,): how many of the first keys of each packed sequence take part; None is all"""
    kv_start: Tensor | None = None
    """int (B,): the first key of each batch entry, or packed sequence, that takes part; None is key 0"""
    block_mask: list[Tensor] = []  # noqa: RUF012  (a field's default: nobody appends to it)
    """the tensors of a `fastattn.BlockMask`, or empty"""


class Options(NamedTuple):
    """The numbers of a call."""

    left: int | None = None
    """Key j is visible to query i only if i + q_offset - left <= j <= i + q_offset + right; None is open."""
    right: int | None = None
    """0 is causal"""
    q_offset: int | None = 0
    """position of the first query; None, for packed sequences only: the last query of each is at its last key"""
    scale: float = 1.0
    softcap: float | None = None
    dropout_p: float = 0.0


class Rotary(NamedTuple):
    """Rotary positions of the queries and new keys of a call over a KV cache."""

    cos: Tensor
    """float (positions, R / 2), R at most D"""
    sin: Tensor
    interleaved: bool
    """numbers 2 i and 2 i + 1 turn together; False: i and i + R / 2"""


class Learned(NamedTuple):
    """One value per operand that has a gradient: whether the caller wants it, or the gradient itself."""

    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None


class Inputs(NamedTuple):
    """One value per input that has a gradient: whether the caller wants it, the gradient, or its part of a
    direction."""

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None


class Gradients(NamedTuple):
    """The tensors that a backward pass fills, each of the shape of its input; None if not wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dalibi_slopes: Tensor | None = None
    dsinks: Tensor | None = None
