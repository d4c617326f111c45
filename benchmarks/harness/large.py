"""Tensors of more than 2^31 elements, where offsets in 32 bits would wrap around."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastattn
from fastattn.testing import FACTOR, rounding_floor

from . import parity
from .checks import Checks
from .device import Device, DryRun
from .problems import DTYPES


def dense_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """q, k, v, out and every gradient: compare the last batch entry with the same entry alone."""
    heads, length, dim = 16, 256 if elements > 1 << 20 else 16, 128
    batch = elements // (heads * length * dim) + 2
    q, k, v, dout = (random(device, dtype, batch, heads, length, dim) for _ in range(4))
    return equal_alone(lambda *qkv: fastattn.attention(*qkv, causal=True), (q, k, v), dout, lambda x: x[-1:])


def packed_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """The same for packed sequences: compare the last one with itself alone."""
    heads, length, dim = 16, 256 if elements > 1 << 20 else 16, 128
    sequences = elements // (heads * length * dim) + 2
    q, k, v, dout = (random(device, dtype, sequences * length, heads, dim) for _ in range(4))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = torch.arange(0, q.shape[0] + 1, length, dtype=torch.int32, device=q.device)
        return fastattn.attention_varlen(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=True)

    return equal_alone(attend, (q, k, v), dout, lambda x: x[-length:])


def mask_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """A mask with a row per query: compare the last two tiles of queries with the same tiles alone."""
    length = (math.isqrt(elements) // 128 + 1) * 128
    q, k, v = (random(device, dtype, 1, 1, length, 64) for _ in range(3))
    mask = torch.rand(length, device=device.torch_device) < 0.5
    mask = mask[:, None] ^ (torch.arange(length, device=device.torch_device) % 3 == 0)
    with torch.no_grad():
        whole = fastattn.attention(q, k, v, mask=mask)
        return same(whole[:, :, -256:], fastattn.attention(q[:, :, -256:], k, v, mask=mask[-256:]))


def cache_beyond(device: Device, elements: int, dtype: torch.dtype) -> bool:
    """Two batch entries, contiguous and then on pages: compare the second, and its appended rows, with itself alone."""
    kv_heads, dim, page = 8, 128, 64
    length = (elements // (2 * kv_heads * dim) // page + 1) * page
    caches = [random(device, dtype, 2, length, kv_heads, dim) for _ in "kv"]
    q = random(device, dtype, 2, 32, 1, dim)
    new = [random(device, dtype, 2, kv_heads, 1, dim) for _ in "kv"]
    lens = torch.tensor([5, length - 1], dtype=torch.int32, device=device.torch_device)
    table = torch.arange(2 * length // page, dtype=torch.int32, device=device.torch_device).view(2, -1)
    pages = [cache.view(-1, page, kv_heads, dim) for cache in caches]
    alone = {"cache_lens": lens[1:], "num_splits": 16}
    for given, last, tables in (
        (caches, [cache[1:].clone() for cache in caches], (None, None)),
        (pages, [half.view(-1, page, kv_heads, dim) for half in (cache[1:].clone() for cache in caches)],
         (table, table[:1])),
    ):  # fmt: skip
        out = fastattn.attention_with_kvcache(
            q, *given, *new, cache_lens=lens, block_table=tables[0], num_splits=16
        )  # fmt: skip
        expected = fastattn.attention_with_kvcache(
            q[1:], *last, *(x[1:] for x in new), block_table=tables[1], **alone
        )  # fmt: skip
        rows = [cache[1, -1] for cache in caches]
        if not same(out[1:], expected) or not all(map(torch.equal, rows, (x[1, :, 0] for x in new))):
            return False
        for cache in caches:
            cache[1, -1] = 0
    return True


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; on a CPU, where PyTorch's products depend on the batch, equal except for rounding."""
    if a.is_cuda:
        return torch.equal(a, b)
    return (a.double() - b.double()).abs().max().item() <= FACTOR * rounding_floor(b.double(), b.dtype)[0]


def random(device: Device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal numbers, made in place, without further memory."""
    return torch.empty(shape, dtype=dtype, device=device.torch_device).normal_()


def equal_alone(
    attend: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor, last: Callable[[Tensor], Tensor]
) -> bool:  # fmt: skip
    """Whether the ``last`` part of the result and of each gradient has the bits that it has when computed alone."""
    own = [last(x).clone().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    out, expected = attend(*leaves), attend(*own)
    both = zip(
        (out, *torch.autograd.grad(out, leaves, dout)),
        (expected, *torch.autograd.grad(expected, own, last(dout))), strict=True,
    )  # fmt: skip
    return all(same(last(whole), alone) for whole, alone in both)


LARGE: dict[str, tuple[Callable[[Device, int, torch.dtype], bool], int, str]] = {
    "cache": (cache_beyond, 6, "decode, combine, append"),
    "mask": (mask_beyond, 2, "forward"),
    "dense": (dense_beyond, 9, "forward, delta, dkdv, dq"),
    "packed sequences": (packed_beyond, 9, "forward, delta, dkdv, dq"),
}
"""Name -> check, how many tensors of 2^31 half-precision elements it holds at once, kernels."""


def check_large(checks: Checks) -> None:
    """Check tensors of more than 2^31 elements if the memory suffices; offsets in 32 bits would wrap around."""
    dry = isinstance(checks.device, DryRun)
    elements, dtype = (1 << 13, torch.float32) if dry else (1 << 31, DTYPES["bf16"])
    for name, (check, tensors, kernels) in LARGE.items():
        checks.device.free()
        needed, started, outcome, note = 2.0 * tensors * elements, time.monotonic(), "passed", ""
        if checks.left <= 0:
            outcome, note = "not run", checks.skip("large", name)
        elif needed > checks.device.free_memory():
            outcome, note = "not run", f"needs {needed / 2**30:.0f} GiB of free memory"
            checks.count("large", outcome)
            checks.not_run.append(f"large: {name}: {note}")
        else:
            try:
                if not check(checks.device, elements, dtype):
                    outcome, note = "failed", "differs from what the last part gives alone"
            except Exception as error:
                checks.see(error)
                outcome, note = "error", parity.describe(error)
            checks.count("large", outcome, f"{name}: {note}" if note else "")
        checks.record(
            "large", outcome, kernel=kernels, feature=name, dtype="bf16", head_dim=64 if name == "mask" else 128,
            seconds=time.monotonic() - started, note=note,
        )  # fmt: skip
    checks.device.free()
