"""Attention in eager PyTorch: the specification (`definition`), and code that computes it in blocks. No Triton import.

`attention` is the definition by keywords. `forward` and `backward` compute the same in blocks of queries, with memory
O(block x Lk), and `double_backward` serves second derivatives and derivatives along a direction on every backend.
"""

from torch import Tensor

from fastattn.backends.reference import definition
from fastattn.backends.reference.blockwise import backward, forward
from fastattn.backends.reference.dropout import DROPOUT_ROUNDS, dropout_keep
from fastattn.backends.reference.kvcache import attention_kvcache, kv_cache_append
from fastattn.backends.reference.second_order import double_backward
from fastattn.spec.attention import AttentionSpec
from fastattn.spec.cache import CacheSpec
from fastattn.spec.operands import Operands, Options

__all__ = [
    "DROPOUT_ROUNDS",
    "attention",
    "attention_kvcache",
    "backward",
    "cache_reasons",
    "double_backward",
    "dropout_keep",
    "forward",
    "kv_cache_append",
    "reasons",
]

NOTE = ": eager PyTorch in blocks of queries, memory O(block x Lk)"


def reasons(spec: AttentionSpec) -> list[str]:
    """It serves everything."""
    return []


def cache_reasons(spec: CacheSpec) -> list[str]:
    """It serves everything."""
    return []


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, q_offset_tensor: Tensor | None = None,
    seed: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    block_mask: list[Tensor] | None = None, *,
    seqused_k: Tensor | None = None, kv_start: Tensor | None = None, left: int | None = None,
    right: int | None = None, q_offset: int | None = 0,
    scale: float, softcap: float | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`definition.attention` with its groups spelled out. Returns (out, lse), differentiable to any order.

    ``q`` (B, Hq, Lq, D), ``k`` (B, Hk, Lk, D), ``v`` (B, Hk, Lk, Dv), any float dtype; all arithmetic is in that dtype.
    The other arguments are those of `fastattn.spec.operands`. Memory O(Lq x Lk).
    """
    operands = Operands(
        mask,
        bias,
        alibi_slopes,
        sinks,
        q_offset_tensor,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        kv_start,
        block_mask or [],
    )
    return definition.attention(q, k, v, operands, Options(left, right, q_offset, scale, softcap, dropout_p))
