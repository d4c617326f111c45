"""How many floating-point operations a measured call must do, by the convention of `fastattn.flops`.

The pairs of documents, prefixes and block-sparse patterns are counted as they are. Other masks and key padding count as
if every pair were allowed: if a kernel skips some of them, its rate is higher.
"""

from fastattn.flops import BACKWARD_FACTOR, allowed_pairs, forward_flops


def attention_flops(
    batch: int, q_heads: int, q_len: int, kv_len: int, head_dim: int, v_dim: int | None = None, *,
    causal: bool = False, window: int | None = None, q_offset: int = 0, mode: str = "forward",
) -> float:  # fmt: skip
    """Operations of one call; ``window`` is how far to the left a query sees, ``mode`` one of three below."""
    pairs = allowed_pairs(q_len, kv_len, window, 0 if causal else None, q_offset)
    forward = float(forward_flops(batch, q_heads, pairs, head_dim, head_dim if v_dim is None else v_dim))
    return forward * {"forward": 1.0, "backward": BACKWARD_FACTOR, "forward+backward": 1 + BACKWARD_FACTOR}[mode]


def matmul_flops(m: int, n: int, k: int) -> float:
    """Operations of an (m, k) by (k, n) product."""
    return 2.0 * m * n * k
