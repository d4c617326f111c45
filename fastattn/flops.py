"""How many floating-point operations attention takes by the field's convention, and formulas for PyTorch's counter::

    with torch.utils.flop_counter.FlopCounterMode(custom_mapping=fastattn.flops.FORMULAS) as counter:
        loss(model(batch)).backward()

Forward: two products of ``2 * Lq * Lk * D`` operations per head, scores and output, over the (query, key) pairs that
causal order and window allow::

    forward  = 2 * B * Hq * pairs * (D + Dv)        4 * B * Hq * Lq * Lk * D where D == Dv and nothing is masked
    backward = 2.5 * forward                        five products instead of two

The counter sees shapes, not values. So a mask, or a window around a ``q_offset`` tensor, counts as if it forbade
nothing; packed sequences count with their mean length (rounded down), and a cache of unknown length as full. PyTorch
has no formula for its own CPU kernel, which may serve our calls, so it gets ours. Second derivatives do not count.

Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 4.1. The literature halves the dense count for causal
attention; the exact count is larger by the diagonal, a factor ``1 + 1 / L``.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastattn import ops

__all__ = ["BACKWARD_FACTOR", "FORMULAS", "allowed_pairs", "forward_flops"]

BACKWARD_FACTOR = 2.5

_Shape = tuple[int, ...]


def allowed_pairs(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, q_offset: int = 0
) -> int:  # fmt: skip
    """Number of (i, j) with ``i + q_offset - left <= j <= i + q_offset + right``; None leaves a side open."""

    def up_to(side: int) -> int:
        """Pairs with ``j <= i + q_offset + side``: in each row ``i + first``, but from 0 to kv_len."""
        first = q_offset + side + 1
        return _ramp(first + q_len, kv_len) - _ramp(first, kv_len)

    visible = q_len * kv_len if right is None else up_to(right)
    return visible if left is None else max(visible - up_to(-left - 1), 0)


def _ramp(stop: int, top: int) -> int:
    """The sum of ``min(n, top)`` for n from 0 to below ``stop``."""
    stop = max(stop, 0)
    rising = min(stop, top)
    return rising * (rising - 1) // 2 + top * (stop - rising)


def forward_flops(batch: int, q_heads: int, pairs: int, head_dim: int, v_dim: int) -> int:
    """Operations of the two products over ``pairs`` per head."""
    return 2 * batch * q_heads * pairs * (head_dim + v_dim)


def _forward(*args: Any, **_: Any) -> int:
    """``fastattn::attention_forward`` with a shape in place of each tensor."""
    return _flops(ops.unflatten(ops.Forward, args))


def _backward(*args: Any, **_: Any) -> int:
    return int(BACKWARD_FACTOR * _flops(ops.unflatten(ops.Backward, args)))


def _flops(call: Any) -> int:
    batch, heads, q_len, head_dim = call.q
    kv_len, options = call.k[2], call.options
    if (starts := call.operands.cu_seqlens_q) is not None:
        batch = starts[0] - 1
        q_len, kv_len = q_len // batch, kv_len // batch
    left, right = options.left, options.right
    if call.operands.q_offset_tensor is not None:
        left = right = None
    q_offset = kv_len - q_len if options.q_offset is None else options.q_offset
    pairs = allowed_pairs(q_len, kv_len, left, right, q_offset)
    return forward_flops(batch, heads, pairs, head_dim, call.v[3])


def _kvcache(*args: Any, **_: Any) -> int:
    """``fastattn::attention_kvcache``."""
    spec: Any = ops.unflatten(ops.CacheCall, args).spec
    batch, heads, q_len, head_dim = spec.q
    if (starts := spec.cu_seqlens_q) is not None:
        batch = starts[0] - 1
        q_len = q_len // batch
    length = spec.length
    if length is None:
        length = spec.k_cache[1] * (1 if spec.block_table is None else spec.block_table[1])
    pairs = allowed_pairs(q_len, length, spec.left, spec.right, length - q_len)
    return forward_flops(batch, heads, pairs, head_dim, spec.v_cache[3])


def _torch_cpu(q: _Shape, k: _Shape, v: _Shape, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``."""
    pairs = allowed_pairs(q[2], k[2], None, 0 if is_causal else None)
    return forward_flops(q[0], q[1], pairs, q[3], v[3])


def _torch_cpu_backward(
    dout: _Shape, q: _Shape, k: _Shape, v: _Shape, out: _Shape, lse: _Shape, *args: Any, **_: Any
) -> int:  # fmt: skip
    return int(BACKWARD_FACTOR * _torch_cpu(q, k, v, *args))


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.fastattn.attention_forward: _forward,
    torch.ops.fastattn.attention_backward: _backward,
    torch.ops.fastattn.attention_kvcache: _kvcache,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _torch_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _torch_cpu_backward,
}
"""For ``FlopCounterMode(custom_mapping=...)``."""
