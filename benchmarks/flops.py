"""How many floating-point operations an attention call must do, by the field's convention.

Forward: two products of ``2 * Lq * Lk * D`` operations per head, scores and output, counting only the (query, key)
pairs that the position rule allows::

    forward  = 2 * B * Hq * pairs * (D + Dv)        4 * B * Hq * Lq * Lk * D where D == Dv and nothing is masked
    backward = 2.5 * forward                        five products instead of two

The pairs of documents, prefixes and block-sparse patterns are counted as they are. Other masks and key padding count as
if every pair were allowed: what a kernel skips there shows as a higher rate.
The literature halves the dense count for causal attention; the exact count is larger by the diagonal, a factor
``1 + 1 / L``. Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 4.1.
"""

import functools

BACKWARD_FACTOR = 2.5


@functools.cache
def allowed_pairs(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, q_offset: int = 0
) -> int:  # fmt: skip
    """Number of (i, j) with ``i + q_offset - left <= j <= i + q_offset + right``; None leaves a side open."""
    if left is None and right is None:
        return q_len * kv_len
    pairs = 0
    for position in range(q_offset, q_offset + q_len):
        first = 0 if left is None else max(0, position - left)
        last = kv_len - 1 if right is None else min(kv_len - 1, position + right)
        pairs += max(0, last - first + 1)
    return pairs


def attention_flops(
    batch: int, q_heads: int, q_len: int, kv_len: int, head_dim: int, v_dim: int | None = None, *,
    causal: bool = False, window: int | None = None, q_offset: int = 0, mode: str = "forward",
) -> float:  # fmt: skip
    """Operations of one call; ``window`` is how far to the left a query sees, ``mode`` one of three below."""
    pairs = allowed_pairs(q_len, kv_len, window, 0 if causal else None, q_offset)
    forward = 2.0 * batch * q_heads * pairs * (head_dim + (head_dim if v_dim is None else v_dim))
    return forward * {"forward": 1.0, "backward": BACKWARD_FACTOR, "forward+backward": 1 + BACKWARD_FACTOR}[mode]


def matmul_flops(m: int, n: int, k: int) -> float:
    """Operations of an (m, k) by (k, n) product."""
    return 2.0 * m * n * k
