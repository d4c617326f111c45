"""The parity matrix: every feature on the device at hand, held to the rule of `fastattn.testing`.

A small part of it is the gate that stands before every benchmark; all of it is recorded by `benchmarks.gpu_check`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import BlockMask
from fastattn.testing import check_attention

from .device import Device, DryRun
from .problems import DTYPES

Options = dict[str, Any]

KERNELS = ("forward", "delta", "dkdv", "dq", "dbias")
KERNELS_OF = {
    "out": ("forward",), "lse": ("forward",), "dq": ("dq", "delta"), "dk": ("dkdv", "delta"), "dv": ("dkdv",),
    "dbias": ("dbias", "delta"), "dalibi_slopes": ("dq", "delta"), "dsinks": ("delta",),
}  # fmt: skip
"""Which kernels a result comes from, in the order in which `check_attention` looks at them."""


@dataclass(frozen=True)
class Shape:
    """Lengths that are no multiple of a tile, several heads and batch entries."""

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    q_len: int = 333
    kv_len: int = 333
    v_dim: int | None = None
    head_dim: int | None = None

    def scores(self, generator: torch.Generator, batch: int = 1, heads: int = 1, rows: bool = True) -> Tensor:
        return torch.randn(batch, heads, self.q_len if rows else 1, self.kv_len, generator=generator)


def no_options(shape: Shape, generator: torch.Generator) -> Options:
    return {}


def causal(shape: Shape, generator: torch.Generator) -> Options:
    return {"causal": True}


def offset_per_entry(shape: Shape, generator: torch.Generator) -> Options:
    return {"causal": True, "q_offset": torch.tensor([40 * i - 30 for i in range(shape.batch)])}


def random_mask(shape: Shape, generator: torch.Generator) -> Options:
    mask = shape.scores(generator, shape.batch) > -1.0
    mask[:, :, shape.q_len // 2] = False  # a row with nothing allowed
    return {"mask": mask}


def key_padding(shape: Shape, generator: torch.Generator) -> Options:
    lengths = torch.tensor([shape.kv_len - shape.kv_len // 5 * i for i in range(shape.batch)])
    return {"mask": (torch.arange(shape.kv_len) < lengths[:, None])[:, None, None], "causal": True}


def constant_bias(shape: Shape, generator: torch.Generator) -> Options:
    return {"bias": shape.scores(generator, heads=shape.q_heads)}


def learned_bias(shape: Shape, generator: torch.Generator) -> Options:
    return {"bias": shape.scores(generator, heads=shape.q_heads).requires_grad_()}


def learned_column_bias(shape: Shape, generator: torch.Generator) -> Options:
    return {"bias": shape.scores(generator, shape.batch, rows=False).requires_grad_()}


def dropout(shape: Shape, generator: torch.Generator) -> Options:
    return {"dropout_p": 0.1}


def window(shape: Shape, generator: torch.Generator) -> Options:
    return {"window": (90, 10)}


def causal_window(shape: Shape, generator: torch.Generator) -> Options:
    return {"window": (100, None), "causal": True}


def alibi(shape: Shape, generator: torch.Generator) -> Options:
    return {"alibi_slopes": torch.rand(shape.q_heads, generator=generator).requires_grad_(), "causal": True}


def softcap(shape: Shape, generator: torch.Generator) -> Options:
    return {"softcap": 2.0, "causal": True}


def sinks(shape: Shape, generator: torch.Generator) -> Options:
    return {"sinks": torch.randn(shape.q_heads, generator=generator).requires_grad_(), "causal": True}


def everything(shape: Shape, generator: torch.Generator) -> Options:
    makers = (offset_per_entry, random_mask, learned_bias, dropout, window, alibi, softcap, sinks)
    return {name: option for make in makers for name, option in make(shape, generator).items()}


def packed(shape: Shape, generator: torch.Generator) -> Options:
    """Three sequences in the rows of one batch entry, the second one empty."""
    bounds = (torch.tensor([0, n // 3, n // 3, n], dtype=torch.int32) for n in (shape.q_len, shape.kv_len))
    return {"causal": True, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))}


def block_mask(shape: Shape, generator: torch.Generator) -> Options:
    """Empty, full and partial tiles, other ones for each head."""
    sizes = (1, shape.q_heads, shape.q_len, shape.kv_len)
    return {"block_mask": BlockMask.from_predicate(lambda b, h, i, j: (i - j + 40 * h) % 290 < 170, sizes)}


@dataclass(frozen=True)
class Feature:
    options: Callable[[Shape, torch.Generator], Options] = no_options
    shape: Shape = Shape()
    strided: bool = False
    """q, k, v as transposed views of (B, L, H, D)."""


FEATURES = {
    "plain": Feature(),
    "causal": Feature(causal),
    "causal, Lq < Lk": Feature(causal, Shape(q_len=77)),
    "offset per batch entry": Feature(offset_per_entry),
    "GQA 4/2": Feature(causal, Shape(kv_heads=2)),
    "boolean mask": Feature(random_mask),
    "key padding + causal": Feature(key_padding),
    "bias": Feature(constant_bias),
    "bias gradient": Feature(learned_bias),
    "bias gradient, broadcast": Feature(learned_column_bias),
    "dropout": Feature(dropout),
    "window": Feature(window),
    "window + causal": Feature(causal_window),
    "ALiBi, learned": Feature(alibi),
    "softcap": Feature(softcap),
    "sinks, learned": Feature(sinks),
    "everything at once": Feature(everything, Shape(kv_heads=2)),
    "packed sequences": Feature(packed, Shape(kv_heads=2)),
    "block mask": Feature(block_mask, Shape(kv_heads=2, q_len=290)),
    "(B, L, H, D) strides": Feature(causal, strided=True),
    "odd head dims": Feature(causal, Shape(head_dim=83, v_dim=40)),
    "2048 tokens": Feature(causal, Shape(batch=1, q_heads=2, kv_heads=2, q_len=2048, kv_len=2048)),
}


@dataclass(frozen=True)
class ParityCase:
    feature: str
    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.feature}, {self.dtype}, head dim {self.head_dim}"

    def run(self, device: Device, backend: str | None = None) -> None:
        """Raises AssertionError where a result breaks the rule."""
        feature = FEATURES[self.feature]
        shape, head_dim = feature.shape, feature.shape.head_dim or self.head_dim
        dtype = DTYPES[self.dtype]
        if isinstance(device, DryRun):
            shape, head_dim, dtype = shrink(shape), min(head_dim, 16), torch.float32
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, length: int, dim: int) -> Tensor:
            drawn = torch.randn(shape.batch, heads, length, dim, generator=generator).to(device.torch_device, dtype)
            return drawn.transpose(1, 2).contiguous().transpose(1, 2) if feature.strided else drawn

        q = normal(shape.q_heads, shape.q_len, head_dim)
        k = normal(shape.kv_heads, shape.kv_len, head_dim)
        v = normal(shape.kv_heads, shape.kv_len, shape.v_dim or head_dim)
        options = {name: on(device, option, dtype) for name, option in feature.options(shape, generator).items()}
        if "cu_seqlens_q" in options:  # (total, heads, head dim)
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        check_attention(q, k, v, backend=backend, **options)  # type: ignore[arg-type]


def on(device: Device, option: Any, dtype: torch.dtype) -> Any:
    """An option's tensor on the device; a bias in the dtype under test."""
    if isinstance(option, BlockMask):
        return option.to(device.torch_device)
    if not isinstance(option, Tensor):
        return option
    moved = option.detach().to(device.torch_device, dtype if option.is_floating_point() else option.dtype)
    return moved.requires_grad_(option.requires_grad)


def shrink(shape: Shape) -> Shape:
    v_dim = None if shape.v_dim is None else 8
    return Shape(shape.batch, shape.q_heads, shape.kv_heads, min(shape.q_len, 20), min(shape.kv_len, 24), v_dim)


def matrix() -> list[ParityCase]:
    """Every feature in both half precisions and three head dims, and in float32 at one."""
    cases = [
        ParityCase(feature, dtype, head_dim)
        for dtype, head_dim, feature in itertools.product(("bf16", "fp16"), (64, 128, 256), FEATURES)
        if FEATURES[feature].shape.head_dim is None or head_dim == 128
    ]
    return cases + [ParityCase(feature, "fp32", 64) for feature in FEATURES]


def gate(device: Device) -> list[ParityCase]:
    """What must be green before anything is recorded: plain and causal as benchmarked, each feature once."""
    if device.torch_device == "cpu":
        return [ParityCase(feature, "fp32", 64) for feature in FEATURES if feature != "2048 tokens"]
    plain = [
        ParityCase(feature, dtype, head_dim)
        for dtype, head_dim, feature in itertools.product(("bf16", "fp16"), (128, 64, 256), ("plain", "causal"))
    ]
    return plain + [ParityCase(feature, "bf16", 64) for feature in FEATURES if feature not in ("plain", "causal")]


def failures(device: Device, cases: list[ParityCase]) -> Iterator[tuple[ParityCase, str]]:
    """The cases that break the rule or do not run, and how."""
    for case in cases:
        try:
            case.run(device)
        except Exception as error:  # a compiler's or a launch's failure is as red as a wrong number
            yield case, f"{type(error).__name__}: {error}".splitlines()[0]


def outcomes(feature: str, error: str | None) -> dict[str, str]:
    """What one case says about each kernel that it runs.

    ``error`` is None or the text of a failure; `check_attention` names the first wrong result, and results are
    checked in the order of `KERNELS_OF`.
    """
    kernels = [name for name in KERNELS if name != "dbias" or "bias gradient" in feature or "everything" in feature]
    if error is None:
        return dict.fromkeys(kernels, "passed")
    wrong = error.removeprefix("AssertionError: ").partition(":")[0]
    if wrong not in KERNELS_OF:
        return dict.fromkeys(kernels, "error")
    before = list(KERNELS_OF)[: list(KERNELS_OF).index(wrong)]
    result = dict.fromkeys(kernels, "not reached")
    result |= {name: "passed" for key in before for name in KERNELS_OF[key] if name in result}
    return result | {name: "failed" for name in KERNELS_OF[wrong] if name in result}
