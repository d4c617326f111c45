"""Check that the memory that an append writes to belongs to one element and one tensor only."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec.checks import readable


def check_written(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:  # fmt: skip
    """Refuse caches and scales if an append would write an element twice or memory that the call also reads, or if
    PyTorch forbids writing to them."""
    written = {"k_cache": k_cache, "v_cache": v_cache}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and scale.ndim == 3:  # the append writes these; it only reads other scales
            written[name] = scale
    outside = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
    for name, x in written.items():
        if outside and x.is_inference():
            raise ValueError(
                f"{name}: expected a tensor that is writable here, got one made under torch.inference_mode(); "
                f"append inside it, or make the cache outside, or pass {name}.clone()"
            )
        if _meets_itself(x):
            raise ValueError(f"{name}: expected every element in a place of its own, got strides {x.stride()}")
    if not readable(q):  # all tensors are on its device
        return
    storages = [x.untyped_storage().data_ptr() for x in written.values()]
    apart = len(set(storages)) == len(storages)
    if apart and not any(x.untyped_storage().data_ptr() in storages for x in (q, k, v)):
        return
    others = {"q": q, "k": k, "v": v, **written}
    for name, x in written.items():
        del others[name]  # later ones are not compared with it again
        for other, y in others.items():
            if _in_common(x, y):
                raise ValueError(f"{other}: expected memory of its own where k and v are appended, got that of {name}")


def _meets_itself(x: Tensor) -> bool:
    """Whether two elements may share memory: some stride is not larger than the span of the smaller ones."""
    if torch.compiler.is_compiling():
        return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    if x.is_contiguous() or x.numel() == 0:
        return False
    span = 0
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step <= span:
            return True
        span += (size - 1) * step
    return False


def _in_common(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory. Also True if their strides differ so much that the answer is hard to
    compute."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.numel() == 0 or b.numel() == 0:
        return False
    # They do if steps along a's dimensions minus steps along b's can sum to the distance between their first bytes.
    steps: dict[int, tuple[int, int]] = {}  # stride in bytes -> least and most number of steps
    for x, sign in ((a, 1), (b, -1)):
        size = x.element_size()
        strides = [(n, stride * size) for n, stride in zip(x.shape, x.stride(), strict=True)]
        for n, stride in [*strides, (size, 1)]:
            if n > 1 and stride:
                low, high = steps.get(stride, (0, 0))
                steps[stride] = (low, high + n - 1) if sign > 0 else (low - n + 1, high)
    least: int = sum(stride * low for stride, (low, _) in steps.items())
    most: int = sum(stride * high for stride, (_, high) in steps.items())
    distances = {int(b.storage_offset() * b.element_size() - a.storage_offset() * a.element_size())}
    for stride, (low, high) in sorted(steps.items(), reverse=True):
        least, most = least - stride * low, most - stride * high  # the range of the smaller strides
        rests: set[int] = set()
        for distance in distances:
            first, last = max(low, -((most - distance) // stride)), min(high, (distance - least) // stride)
            if last > first + 1:
                return True
            rests |= {distance - stride * count for count in range(first, last + 1)}
        distances = rests
    return 0 in distances
