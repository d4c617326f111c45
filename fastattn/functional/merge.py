"""Attention over keys in two parts, from the attention over each."""

import torch
from torch import Tensor


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from out and lse of the same queries over each.

    Exact but for rounding, in any order and any number of times, and differentiable through all four. For keys that are
    held in parts: a prefix that a batch shares, chunks of a long context, devices of a ring. A row that sees nothing in
    one part is that of the other; in neither, 0 with lse -inf. ``sinks`` belong to one of the parts.

    Args:
        out1: (..., Dv), any float dtype, as `fastattn.attention` returns it: (B, Hq, Lq, Dv).
        lse1: (...), the log-sum-exp of its rows, natural logarithm. `fastattn.attention_varlen` has the heads first:
            there it is ``lse.mT``.
        out2, lse2: the same for the other keys.

    Returns:
        out (..., Dv) in the wider dtype of out1 and out2, and lse (...) in float32, float64 where a float64 came in.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Rabe and Staats, 2021 (arXiv:2112.05682), section 3.
    """
    for name, tensor in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating-point Tensor, got {got}")
        if tensor.device != out1.device:
            raise ValueError(f"{name}.device: expected out1.device == {out1.device}, got {tensor.device}")
    for name, tensor, shape, what in (
        ("out2", out2, out1.shape, "out1.shape"),
        ("lse1", lse1, out1.shape[:-1], "out1.shape[:-1]"),
        ("lse2", lse2, out1.shape[:-1], "out1.shape[:-1]"),
    ):
        if tensor.shape != shape:
            hint = "; lse of attention_varlen is transposed: lse.mT" if tensor.shape[::-1] == shape else ""
            raise ValueError(f"{name}.shape: expected {what} == {tuple(shape)}, got {tuple(tensor.shape)}{hint}")
    dtype = torch.promote_types(out1.dtype, out2.dtype)
    accumulator = torch.float32
    for tensor in (out1, out2, lse1, lse2):
        accumulator = torch.promote_types(accumulator, tensor.dtype)
    lse1, lse2 = lse1.to(accumulator), lse2.to(accumulator)
    largest = torch.maximum(lse1, lse2).detach()  # the result does not depend on it
    nothing = largest == -torch.inf
    largest = largest.masked_fill(nothing, 0.0)
    weight1, weight2 = torch.exp(lse1 - largest), torch.exp(lse2 - largest)
    total = (weight1 + weight2).masked_fill(nothing, 1.0)
    out = (weight1 / total)[..., None] * out1 + (weight2 / total)[..., None] * out2
    return out.to(dtype), (largest + torch.log(total)).masked_fill(nothing, -torch.inf)
