"""The named groups that one call hands from the public function to a kernel, and its gradients back.

An absent operand is None; nothing else says that it is absent.
"""

from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors beside q, k and v."""

    mask: Tensor | None = None
    """bool, 4-D, broadcastable to (B, Hq, Lq, Lk); True takes part"""
    bias: Tensor | None = None
    """float, 4-D, broadcastable likewise; added to the scaled scores"""
    alibi_slopes: Tensor | None = None
    """float (1 or B, Hq); slope * |i + q_offset - j| is subtracted from the scores"""
    sinks: Tensor | None = None
    """float (Hq,); one more logit in each row's softmax, with no value"""
    q_offset_tensor: Tensor | None = None
    """int (B,), in place of `Options.q_offset`"""
    seed: Tensor | None = None
    """where there is dropout: int64 (1,), or (7,) for a part of a larger call, whose bits it then has: the seed, the
    first batch entry and head, the first row and the step from row to row, and likewise of keys"""
    cu_seqlens_q: Tensor | None = None
    """int (sequences + 1,): where each packed sequence begins in q, and the end of the last; B = 1"""
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    """int (sequences,): how many keys of each packed sequence, its first ones, take part; None is all"""
    kv_start: Tensor | None = None
    """int (B,): the keys of a batch entry, or of a packed sequence, from which on they take part; None is all"""
    block_mask: list[Tensor] = []  # noqa: RUF012  (a field's default: nobody appends to it)
    """the tensors of a `fastattn.BlockMask`, or empty"""


class Options(NamedTuple):
    """The numbers of a call."""

    left: int | None = None
    """Key j is visible to query i only if i + q_offset - left <= j <= i + q_offset + right; None is open."""
    right: int | None = None
    """0 is causal"""
    q_offset: int | None = 0
    """None, for packed sequences only: the last query of each stands at its last key"""
    scale: float = 1.0
    softcap: float | None = None
    dropout_p: float = 0.0


class Learned(NamedTuple):
    """Something for each operand that has a gradient: whether it is wanted, or the gradient itself."""

    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None


class Inputs(NamedTuple):
    """Something for each input that has a gradient: whether it is wanted, the gradient, or a direction's part."""

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None


class Gradients(NamedTuple):
    """What a backward pass fills, each of the shape of its input; None is not wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dalibi_slopes: Tensor | None = None
    dsinks: Tensor | None = None
