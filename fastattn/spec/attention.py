"""The description of one attention call, validated and normalised once. Backends read nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.block_mask import BlockMask, check_block_mask
from fastattn.spec.checks import (
    FLOAT_DTYPES,
    MAX_POSITION,
    autocast,
    causal_bias_offset,
    check_alibi_slopes,
    check_cu_seqlens,
    check_dropout,
    check_flag,
    check_kv_start,
    check_per_entry,
    check_qkv,
    check_scale,
    check_scores,
    check_seqused_k,
    check_sinks,
    check_softcap,
    check_window,
    known,
    readable,
)
from fastattn.spec.operands import Operands, Options


class AttentionSpec(NamedTuple):
    """One call. Sizes: batch B, query heads Hq, key heads Hk, lengths Lq and Lk, head dims D and Dv. Packed sequences,
    one after the other, are one batch entry."""

    q: Tensor
    """(B, Hq, Lq, D); packed (1, Hq, total, D)"""
    k: Tensor
    """(B, Hk, Lk, D), Hq a multiple of Hk"""
    v: Tensor
    """(B, Hk, Lk, Dv)"""
    mask: Tensor | None
    """bool, 4-D, broadcastable to (B, Hq, Lq, Lk); True takes part"""
    bias: Tensor | None
    """float, 4-D, broadcastable to (B, Hq, Lq, Lk); added to the scaled scores"""
    alibi_slopes: Tensor | None
    """float (1 or B, Hq); slope * |i + q_offset - j| is subtracted from the scores"""
    sinks: Tensor | None
    """float (Hq,); one more logit in each row's softmax, with no value"""
    q_offset_tensor: Tensor | None
    """int (B,), in place of q_offset"""
    left: int | None
    """Key j is visible to query i only if i + q_offset - left <= j <= i + q_offset + right; None is open."""
    right: int | None
    """0 is causal. None if this side forbids nothing."""
    q_offset: int | None
    """position of the first query; None, for packed sequences only: the last query of each is at its last key"""
    scale: float
    softcap: float | None
    dropout_p: float
    return_lse: bool
    cu_seqlens_q: Tensor | None = None
    """int32 (sequences + 1,): where each packed sequence begins in q, and the total. "Per batch entry" then means per
    sequence."""
    cu_seqlens_k: Tensor | None = None
    block_mask: BlockMask | None = None
    """(B or 1, Hq or 1, Lq, Lk)"""
    seqused_k: Tensor | None = None
    """int (sequences,): how many of the first keys of each packed sequence take part; None is all"""
    kv_start: Tensor | None = None
    """int (B,): the first key of each batch entry that takes part; None is key 0"""

    @property
    def causal(self) -> bool:
        """Whether the visible pairs are the plain causal triangle."""
        return self.right == 0 and self.left is None

    @property
    def options(self) -> Options:
        """The numbers of the call, for backends."""
        return Options(self.left, self.right, self.q_offset, self.scale, self.softcap, self.dropout_p)

    def operands(self, seed: Tensor | None) -> Operands:
        """The tensors beside q, k and v, for backends; ``seed`` if there is dropout."""
        blocks = [] if self.block_mask is None else list(self.block_mask.tensors)
        return Operands(
            self.mask, self.bias, self.alibi_slopes, self.sinks, self.q_offset_tensor, seed, self.cu_seqlens_q,
            self.cu_seqlens_k, self.seqused_k, self.kv_start, blocks,
        )  # fmt: skip

    @property
    def needs_dbias(self) -> bool:
        """Whether autograd will ask for the gradient of the bias."""
        return self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()


def make_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    kv_start: Tensor | None = None,
    block_mask: BlockMask | None = None,
    names: tuple[str, str, str, str, str, str] = ("q", "k", "v", "mask", "bias", "causal"),
) -> AttentionSpec:
    """Validate the arguments of `fastattn.attention`, or of `attention_varlen` with ``cu_seqlens_q`` and
    ``cu_seqlens_k``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or range that does not fit. The text names the argument, the expected and the given
            value. ``names`` are the caller's names for q, k, v, mask, bias and causal.
    """
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]  (as many as went in)
    q_name, k_name, v_name, mask_name, bias_name, causal_name = names
    check_qkv(q, k, v, (q_name, k_name, v_name))
    batch, q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        given_starts = cu_seqlens_q
        cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        same = cu_seqlens_k is given_starts and readable(cu_seqlens_q) and kv_len == q_len
        cu_seqlens_k = cu_seqlens_q if same else check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k.shape: expected cu_seqlens_q.shape == {tuple(cu_seqlens_q.shape)}, "
                f"got {tuple(cu_seqlens_k.shape)}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        if seqused_k is not None:
            seqused_k = check_seqused_k(seqused_k, cu_seqlens_k, k)
    check_flag(causal_name, causal)
    for name, operand in ((mask_name, mask), (bias_name, bias)):
        if (offset := causal_bias_offset(name, operand, q_len, kv_len)) is not None:
            mask, bias = (None if x is operand else x for x in (mask, bias))
            causal, q_offset = _with_causal_bias(name, offset, causal, q_offset, kv_len - q_len, causal_name)
    if mask is not None:
        mask = check_scores(mask_name, mask, q, kv_len, (torch.bool,))
    if bias is not None:
        bias = check_scores(bias_name, bias, q, kv_len, FLOAT_DTYPES)
    if block_mask is not None:
        block_mask = check_block_mask(block_mask, (batch, q_heads, q_len, kv_len), q.device)
    alibi_slopes = check_alibi_slopes(alibi_slopes, q, batch)
    check_sinks(sinks, q)
    if kv_start is not None:
        kv_start = check_kv_start(kv_start, batch, q, kv_len)
    offset_tensor = None
    if q_offset is None:
        q_offset = kv_len - q_len if cu_seqlens_q is None else None
    elif isinstance(q_offset, Tensor):
        offset_tensor, q_offset = check_per_entry("q_offset", q_offset, batch, q), 0
    elif isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise TypeError(f"q_offset: expected an int or an integer tensor, got {type(q_offset).__name__}")
    elif not -MAX_POSITION <= q_offset <= MAX_POSITION:
        raise ValueError(f"q_offset: expected at most 2**30 in size, got {q_offset}")
    elif q_offset == 0:
        q_offset = 0  # replaces a symbolic 0 by the constant, so that a trace can take the top-left path
    check_flag("return_lse", return_lse)
    left, right = check_window(window, causal)
    if offset_tensor is None and q_offset is not None:  # open a side that forbids nothing
        if right is not None and known(q_offset + right >= kv_len - 1):
            right = None
        if left is not None and known(q_len - 1 + q_offset - left <= 0):
            left = None
    check_dropout(dropout_p)
    check_softcap(softcap)
    scale = check_scale(scale, head_dim)
    return AttentionSpec(
        q, k, v, mask, bias, alibi_slopes, sinks, offset_tensor, left, right, q_offset, scale, softcap, dropout_p,
        return_lse, cu_seqlens_q, cu_seqlens_k, block_mask, seqused_k, kv_start,
    )  # fmt: skip


def _with_causal_bias(
    name: str, offset: int, causal: bool, q_offset: int | Tensor | None, default: int, causal_name: str
) -> tuple[bool, int]:
    """(causal, q_offset) of a call whose mask or bias is a CausalBias, which means causal order with ``offset``."""
    given = default if q_offset is None else q_offset
    if causal_name == "is_causal":  # PyTorch's function has top-left order only
        given = 0 if causal else offset
    elif not causal and q_offset is None:
        given = offset
    if isinstance(given, Tensor) or given != offset:
        raise ValueError(f"{name}: expected a CausalBias in the order of q_offset == {given}, got q_offset == {offset}")
    return True, offset
