"""Inputs for the tests of the operator: made on the CPU, so that every device sees the same numbers."""

import itertools

import pytest
import torch

INF = float("inf")

HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
KERNEL_DTYPES = (HALF, BFLOAT, SINGLE)
DTYPE_NAMES = {HALF: "fp16", BFLOAT: "bf16", SINGLE: "fp32", DOUBLE: "fp64"}

# Short, yet with inner, diagonal and tail tiles in every kernel at the interpreter's tile sizes.
LENGTHS = (33, 70)


def make_qkv(
    device, lengths=LENGTHS, *, dims=(16, 16), heads=(2, 2), batch=1, dtype=HALF
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), from the current seed."""
    (q_len, kv_len), (dim, v_dim), (q_heads, kv_heads) = lengths, dims, heads
    shapes = ((batch, q_heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, v_dim))
    q, k, v = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return q, k, v


def make_mask(device, shape, keep=0.7):
    """Random bool mask of `shape`; most rows keep something."""
    return (torch.rand(shape) < keep).to(device)


def make_bias(device, shape, dtype=SINGLE, requires_grad=False):
    return torch.randn(shape).to(device, dtype).requires_grad_(requires_grad)


def broadcast_shapes(full):
    """The 16 shapes that broadcast to `full`: each dimension full or 1."""
    return [
        tuple(size if keep else 1 for size, keep in zip(full, bits, strict=True))
        for bits in itertools.product((True, False), repeat=4)
    ]


def count_tiles(monkeypatch):
    """A list to which a test appends 0 before a call: the forward kernel then counts there the tiles of keys that it
    visits, which are calls of its softmax. In Triton's interpreter."""
    forward = pytest.importorskip("fastattn.kernels.forward", reason="the triton package is not installed")
    if not forward.launch.INTERPRETED.value:
        pytest.skip("counts in Triton's interpreter")
    counts, softmax = [], forward.online_softmax

    def counted(*args):
        counts[-1] += 1
        return softmax(*args)

    monkeypatch.setattr(forward, "online_softmax", counted)
    return counts


def shape_id(shape):
    return "x".join(map(str, shape))


def relayout(x, layout):
    """The values of `x` (4-D) under other strides; what lies between the elements is NaN (True of bool)."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "heads_last":  # (B, L, H, D) in memory: what a projection makes
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns_first":  # last stride is not 1
        return x.mT.contiguous().mT
    if layout == "packed":  # a third of a (B, L, 3, H, D) projection, with a storage offset
        batch, heads, length, dim = x.shape
        storage = x.new_full((batch, length, 3, heads, dim), torch.nan)
        storage[:, :, 1] = x.transpose(1, 2)
        return storage[:, :, 1].transpose(1, 2)
    if layout == "sliced":  # odd offset and odd padding in every row
        storage = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan)
        view = storage[:, :, 2:-1, 3:-2]
    elif layout == "stepped":  # every second element of every second row
        view = x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), torch.nan)[:, :, 1::2, 1::2]
    else:
        raise ValueError(layout)
    return view.copy_(x)


LAYOUTS = ("contiguous", "heads_last", "columns_first", "packed", "sliced", "stepped")
