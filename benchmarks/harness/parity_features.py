"""The calls of the parity matrix: each feature of `fastattn.attention`, `fastattn.attention_varlen` and
`fastattn.attention_with_kvcache`, with lengths that are no multiple of a tile.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import BlockMask
from fastattn.backends.reference.kvcache import quantise
from fastattn.functional import Backend
from fastattn.testing import check_attention, check_kvcache

from .device import Device, DryRun

Options = dict[str, Any]

KERNELS_OF = {
    "out": ("forward",), "lse": ("forward",), "dq": ("dq", "delta"), "dk": ("dkdv", "delta"), "dv": ("dkdv",),
    "dbias": ("dbias", "delta"), "dalibi_slopes": ("dq", "delta"), "dsinks": ("delta",),
}  # fmt: skip
"""The kernels of each result, in the order in which `check_attention` checks results."""
CACHE_KERNELS_OF = {
    "k_cache": ("append",), "v_cache": ("append",), "out": ("decode", "combine"), "lse": ("decode", "combine"),
}  # fmt: skip
"""The same for `check_kvcache`."""
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias", "decode", "combine", "append")


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


def no_options(shape: object, generator: torch.Generator) -> Options:
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
    """Empty, full and partial tiles, different for each head."""
    sizes = (1, shape.q_heads, shape.q_len, shape.kv_len)
    return {"block_mask": BlockMask.from_predicate(lambda b, h, i, j: (i - j + 40 * h) % 290 < 170, sizes)}


@dataclass(frozen=True)
class Feature:
    """One way to call `fastattn.attention` or `fastattn.attention_varlen`."""

    options: Callable[[Shape, torch.Generator], Options] = no_options
    shape: Shape = Shape()
    strided: bool = False
    """q, k, v as transposed views of (B, L, H, D)."""
    kernels_of = KERNELS_OF

    @property
    def head_dim(self) -> int | None:
        return self.shape.head_dim

    @property
    def kernels(self) -> tuple[str, ...]:
        learned = self.options in (learned_bias, learned_column_bias, everything)
        return ("forward", "delta", "dkdv", "dq", "dbias") if learned else ("forward", "delta", "dkdv", "dq")

    def inputs(self, device: Device, dtype: torch.dtype, head_dim: int, shape: Shape) -> tuple[list[Tensor], Options]:
        """([q, k, v], options), the same numbers on every device."""
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, length: int, dim: int) -> Tensor:
            drawn = torch.randn(shape.batch, heads, length, dim, generator=generator).to(device.torch_device, dtype)
            return drawn.transpose(1, 2).contiguous().transpose(1, 2) if self.strided else drawn

        q = normal(shape.q_heads, shape.q_len, head_dim)
        k = normal(shape.kv_heads, shape.kv_len, head_dim)
        v = normal(shape.kv_heads, shape.kv_len, shape.v_dim or head_dim)
        options = {name: on(device, option, dtype) for name, option in self.options(shape, generator).items()}
        if "cu_seqlens_q" in options:  # (total, heads, head dim)
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return [q, k, v], options

    def check(self, device: Device, dtype: torch.dtype, head_dim: int, backend: Backend | None) -> None:
        shape = shrink(self.shape) if isinstance(device, DryRun) else self.shape
        qkv, options = self.inputs(device, dtype, head_dim, shape)
        check_attention(*qkv, backend=backend, **options)

    def call(
        self, device: Device, dtype: torch.dtype, head_dim: int, shape: Shape, backend: Backend | None = None
    ) -> Callable[[], list[Tensor]]:
        """Forward and backward pass as a call that returns the output, its lse and every gradient."""
        qkv, options = self.inputs(device, dtype, head_dim, shape)
        qkv = [x.requires_grad_() for x in qkv]
        leaves = [*qkv, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
        function: Any = fastattn.attention_varlen if "cu_seqlens_q" in options else fastattn.attention

        def run() -> list[Tensor]:
            torch.manual_seed(0)  # the same dropout
            out, lse = function(*qkv, return_lse=True, backend=backend, **options)
            return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

        return run


@dataclass(frozen=True)
class CacheShape:
    """Decode steps at the ends of a cache and between; a step appends as many keys as it has queries."""

    heads: tuple[int, int] = (32, 8)
    q_len: int = 1
    page: int = 0
    capacity: int = 1024
    lens: tuple[int | None, ...] = (None, 0, 333, 700)
    """Before the step; None fills the cache."""
    appends: bool = True

    @property
    def added(self) -> int:
        return self.q_len if self.appends else 0


@dataclass(frozen=True)
class CacheFeature:
    """One way to call `fastattn.attention_with_kvcache`."""

    options: Callable[[int, torch.Generator], Options] = no_options
    shape: CacheShape = CacheShape()
    num_splits: int | None = None
    head_dim: int | None = None
    quantised: torch.dtype | None = None
    """of the caches, with a scale for each token and head"""
    kernels_of = CACHE_KERNELS_OF

    @property
    def kernels(self) -> tuple[str, ...]:
        combined = () if self.num_splits == 1 else ("combine",)
        return ("decode", *combined, *(("append",) if self.shape.appends else ()))

    def inputs(self, device: Device, dtype: torch.dtype, head_dim: int, shape: CacheShape) -> Options:
        """The arguments: pages in random order, three times as many as are used, with NaN where nothing is stored."""
        generator = torch.Generator().manual_seed(0)
        batch, (q_heads, kv_heads) = len(shape.lens), shape.heads
        lens = [shape.capacity - shape.added if n is None else n for n in shape.lens]

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device.torch_device, dtype)

        q, table = normal(batch, q_heads, shape.q_len, head_dim), None
        if shape.page:
            needed = batch * shape.capacity // shape.page
            table = torch.randperm(3 * needed, generator=generator)[:needed].view(batch, -1).int()
        caches = []
        for _ in "kv":
            rows = normal(batch, shape.capacity, kv_heads, head_dim)
            for entry, n in enumerate(lens):
                rows[entry, n:] = torch.nan
            if table is not None:
                pages = torch.full_like(rows, torch.nan).repeat(3, 1, 1, 1).unflatten(1, (-1, shape.page)).flatten(0, 1)
                pages[table.flatten().long()] = rows.unflatten(1, (-1, shape.page)).flatten(0, 1)
                rows = pages
            caches.append(rows)
        new = [normal(batch, kv_heads, shape.q_len, head_dim) if shape.appends else None for _ in "kv"]
        drawn = self.options(q_heads, generator)
        if self.quantised is not None:
            (k, k_scale), (v, v_scale) = (quantise(cache, None, self.quantised) for cache in caches)
            caches, drawn = [k, v], drawn | {"k_scale": k_scale[..., 0], "v_scale": v_scale[..., 0]}
        return {
            **dict(zip(("q", "k_cache", "v_cache", "k", "v"), (q, *caches, *new), strict=True)),
            "cache_lens": torch.tensor(lens, dtype=torch.int32, device=device.torch_device),
            "block_table": None if table is None else table.to(device.torch_device), "num_splits": self.num_splits,
            **{name: on(device, option, torch.float32) for name, option in drawn.items()},
        }  # fmt: skip

    def check(self, device: Device, dtype: torch.dtype, head_dim: int, backend: Backend | None) -> None:
        shape = shrink_cache(self.shape) if isinstance(device, DryRun) else self.shape
        check_kvcache(**self.inputs(device, dtype, head_dim, shape), backend=backend)

    def call(
        self, device: Device, dtype: torch.dtype, head_dim: int, shape: CacheShape, backend: Backend | None = None
    ) -> Callable[[], list[Tensor]]:
        """One step as a call that returns the output, its lse and the caches; every call appends the same rows."""
        arguments = self.inputs(device, dtype, head_dim, shape)
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].nan_to_num()

        def run() -> list[Tensor]:
            out, lse = fastattn.attention_with_kvcache(**arguments, return_lse=True, backend=backend)
            return [out, lse, arguments["k_cache"].clone(), arguments["v_cache"].clone()]

        return run


def cache_window(heads: int, generator: torch.Generator) -> Options:
    return {"window": (100, 0)}


def cache_not_causal(heads: int, generator: torch.Generator) -> Options:
    return {"causal": False}


def cache_softcap(heads: int, generator: torch.Generator) -> Options:
    return {"softcap": 2.0}


def cache_alibi(heads: int, generator: torch.Generator) -> Options:
    return {"alibi_slopes": torch.rand(heads, generator=generator)}


def cache_sinks(heads: int, generator: torch.Generator) -> Options:
    return {"sinks": torch.randn(heads, generator=generator)}


def cache_tree(heads: int, generator: torch.Generator) -> Options:
    """Of 8 tokens some of those before each one; the first of them at key 3."""
    seen = (torch.rand(8, 8, generator=generator) < 0.5).tril() | torch.eye(8, dtype=torch.bool)
    return {"mask": seen, "mask_start": 3}


def cache_bias(heads: int, generator: torch.Generator) -> Options:
    return {"bias": torch.randn(heads, 1, 300, generator=generator), "mask_start": -50}


def cache_everything(heads: int, generator: torch.Generator) -> Options:
    makers = (cache_window, cache_softcap, cache_alibi, cache_sinks)
    return {name: option for make in makers for name, option in make(heads, generator).items()}


MANY = 20
"""More splits than most caches of these lengths have tiles."""


FEATURES: dict[str, Feature | CacheFeature] = {
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
    "cache": CacheFeature(),
    "cache, pages of 16": CacheFeature(shape=CacheShape(page=16)),
    "cache, one split": CacheFeature(num_splits=1),
    "cache, pages of 64, one split": CacheFeature(shape=CacheShape(page=64), num_splits=1),
    "cache, pages of 256, many splits": CacheFeature(shape=CacheShape(page=256), num_splits=MANY),
    "cache, heads 64/8": CacheFeature(shape=CacheShape(heads=(64, 8)), num_splits=MANY),
    "cache, heads 8/1": CacheFeature(shape=CacheShape(heads=(8, 1), page=16)),
    "cache, 4 queries": CacheFeature(shape=CacheShape(q_len=4, page=64)),
    "cache, 17 queries": CacheFeature(shape=CacheShape(q_len=17)),
    "cache, 17 queries, one split": CacheFeature(shape=CacheShape(q_len=17, page=16), num_splits=1),
    "cache, not causal": CacheFeature(cache_not_causal, CacheShape(q_len=4)),
    "cache, nothing appended": CacheFeature(shape=CacheShape(page=16, appends=False)),
    "cache, window": CacheFeature(cache_window, CacheShape(page=16)),
    "cache, softcap": CacheFeature(cache_softcap),
    "cache, ALiBi": CacheFeature(cache_alibi, CacheShape(q_len=4)),
    "cache, sinks": CacheFeature(cache_sinks, num_splits=1),
    "cache, tree of drafts": CacheFeature(cache_tree, CacheShape(q_len=8, page=16)),
    "cache, bias": CacheFeature(cache_bias),
    "cache, int8": CacheFeature(shape=CacheShape(page=16), quantised=torch.int8),
    "cache, float8": CacheFeature(quantised=torch.float8_e4m3fn),
    "cache, everything at once": CacheFeature(cache_everything, CacheShape(q_len=17, page=64), num_splits=3),
}


def on(device: Device, option: Any, dtype: torch.dtype) -> Any:
    """The tensor of an option on the device; a bias has the tested dtype."""
    if isinstance(option, BlockMask):
        return option.to(device.torch_device)
    if not isinstance(option, Tensor):
        return option
    moved = option.detach().to(device.torch_device, dtype if option.is_floating_point() else option.dtype)
    return moved.requires_grad_(option.requires_grad)


def shrink(shape: Shape) -> Shape:
    v_dim = None if shape.v_dim is None else 8
    return Shape(shape.batch, shape.q_heads, shape.kv_heads, min(shape.q_len, 20), min(shape.kv_len, 24), v_dim)


def shrink_cache(shape: CacheShape) -> CacheShape:
    """Few rows on few small pages, with enough query heads for each key head to tell them apart."""
    q_heads, kv_heads = shape.heads
    lens = tuple(n and n * 64 // shape.capacity for n in shape.lens)
    heads = (min(4, q_heads // kv_heads) * min(2, kv_heads), min(2, kv_heads))
    return dataclasses.replace(shape, heads=heads, page=min(shape.page, 16), capacity=64, lens=lens)
