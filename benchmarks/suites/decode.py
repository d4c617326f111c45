"""One decode step over a KV cache, contiguous and paged: its time, and how close it is to the speed of a copy.

A step reads the cache once, so memory bandwidth bounds it. A copy that moves as many bytes is timed with every step.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from benchmarks.harness import runner
from benchmarks.harness.device import Call, DryRun
from benchmarks.harness.parity import ParityCase
from benchmarks.harness.peers import Cannot, Peer, Prepared, compiled_flex, first_line
from benchmarks.harness.problems import DTYPES
from benchmarks.harness.runner import Bench, Cell
from fastattn import reference
from fastattn.testing import assert_parity

DEVICES = ("cuda",)
BATCHES = (1, 8, 32, 128)
LENGTHS = (1024, 8192, 32768, 131072)
HEADS = ((32, 8), (64, 8))
PAGES = (0, 16, 64, 256)
MOST_TOKENS = 1 << 20
"""Elements in both caches together: 4 GiB at 8 heads with head dim 128."""


@dataclass(frozen=True)
class Step:
    """One query per batch entry against ``length`` cached keys; ``page`` is 0 for a contiguous cache."""

    batch: int
    q_heads: int
    kv_heads: int
    length: int
    page: int
    head_dim: int = 128
    dtype: str = "bf16"

    @property
    def case(self) -> str:
        layout = f"page {self.page}" if self.page else "contiguous"
        return f"{self.q_heads}/{self.kv_heads} heads, batch {self.batch}, {layout}"

    def bytes(self) -> int:
        """Bytes read and written: the cache once, q and out."""
        elements = 2 * self.batch * (self.length * self.kv_heads + self.q_heads) * self.head_dim
        return elements * DTYPES[self.dtype].itemsize

    def key(self) -> dict[str, object]:
        return {
            "case": self.case, "mode": "decode", "dtype": self.dtype, "batch": self.batch, "q_heads": self.q_heads,
            "kv_heads": self.kv_heads, "q_len": 1, "kv_len": self.length, "head_dim": self.head_dim, "causal": True,
        }  # fmt: skip


@dataclass
class StepInputs:
    """``lens`` counts the tokens in the cache; pages are in random order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lens: Tensor
    table: Tensor | None

    def rows(self, cache: Tensor) -> Tensor:
        """(B, Hk, L, D), gathered from the pages if there are any."""
        rows = cache if self.table is None else cache[self.table.long()].flatten(1, 2)
        return rows.transpose(1, 2)


def make_inputs(step: Step, device: str) -> StepInputs:
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "dtype": DTYPES[step.dtype], "generator": generator}
    q = torch.randn(step.batch, step.q_heads, 1, step.head_dim, **options)
    table = None
    shape = (step.batch, step.length, step.kv_heads, step.head_dim)
    if step.page:
        pages = step.batch * step.length // step.page
        table = torch.randperm(pages, device=device, generator=generator).view(step.batch, -1).to(torch.int32)
        shape = (pages, step.page, *shape[2:])
    k_cache, v_cache = (torch.randn(shape, **options) for _ in "kv")
    return StepInputs(q, k_cache, v_cache, torch.full((step.batch,), step.length, device=device).int(), table)


def prepare_fastattn(step: Step, x: StepInputs) -> Prepared:
    call = functools.partial(
        fastattn.attention_with_kvcache, x.q, x.k_cache, x.v_cache, cache_lens=x.lens, block_table=x.table
    )
    return Prepared(call, [], x.q)


def prepare_sdpa(step: Step, x: StepInputs) -> Prepared:
    """It has no pages, so they are gathered inside the timed part, as its users must do."""

    def call() -> Tensor:
        return scaled_dot_product_attention(x.q, x.rows(x.k_cache), x.rows(x.v_cache), enable_gqa=True)

    return Prepared(call, [], x.q)


def prepare_flex(step: Step, x: StepInputs) -> Prepared:
    if x.table is not None:
        raise Cannot("its pages are experimental")
    run = compiled_flex(x.q.device.type)
    return Prepared(lambda: run(x.q, x.rows(x.k_cache), x.rows(x.v_cache), enable_gqa=True), [], x.q)


def prepare_flash_attn(step: Step, x: StepInputs) -> Prepared:
    if step.page % 256:
        raise Cannot("its pages are multiples of 256")
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    call = functools.partial(
        flash_attn_with_kvcache, x.q.transpose(1, 2), x.k_cache, x.v_cache, cache_seqlens=x.lens, block_table=x.table,
        causal=True,
    )  # fmt: skip
    return Prepared(call, [], x.q, lambda out: out.transpose(1, 2))


def prepare_flashinfer(step: Step, x: StepInputs) -> Prepared:
    if x.table is None:
        raise Cannot("its batches are paged")
    import flashinfer  # pyright: ignore[reportMissingImports]

    device, pages = x.q.device, x.table.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(step.batch + 1, dtype=torch.int32, device=device) * pages, x.table.flatten(),
        torch.full((step.batch,), step.page, dtype=torch.int32, device=device), step.q_heads, step.kv_heads,
        step.head_dim, step.page, q_data_type=x.q.dtype, kv_data_type=x.q.dtype,
    )  # fmt: skip
    q = x.q.squeeze(2).contiguous()
    return Prepared(lambda: wrapper.run(q, (x.k_cache, x.v_cache)), [], x.q, lambda out: out.unsqueeze(2))


PROVIDERS = {
    peer.name: peer
    for peer in (
        Peer("fastattn", prepare_fastattn, cpu=True, compiles=True),
        Peer("sdpa", prepare_sdpa, cpu=True),
        Peer("flex", prepare_flex, "torch.nn.attention.flex_attention", cpu=True, compiles=True),
        Peer("flash-attn", prepare_flash_attn, "flash_attn", "flash_attn_with_kvcache"),
        Peer("flashinfer", prepare_flashinfer, "flashinfer", "BatchDecodeWithPagedKVCacheWrapper", compiles=True),
    )
}


def check(x: StepInputs, out: Tensor) -> None:
    """Hold the first batch entry to the rule."""
    k, v = (x.rows(cache[:1] if x.table is None else cache) for cache in (x.k_cache, x.v_cache))
    q, k, v, scale = x.q[:1], k[:1], v[:1], x.q.shape[3] ** -0.5
    expected, _ = reference.attention(q.double(), k.double(), v.double(), scale=scale)
    eager, _ = reference.attention(q, k, v, scale=scale)
    assert_parity(out[:1], expected, eager)


def measure_step(bench: Bench, step: Step, providers: Sequence[str]) -> None:
    """Time the providers in turns with a copy of as many bytes, and record those with correct results."""
    if isinstance(bench.device, DryRun):
        step = Step(2, 4, 2, 64, min(step.page, 16), 16, step.dtype)
    device = bench.device.torch_device
    x = make_inputs(step, device)
    calls: dict[str, Call] = {}
    with torch.no_grad():
        for name in providers:
            peer = PROVIDERS[name]
            if reason := peer.missing(device):
                bench.skipped[name] = reason
                continue
            if not bench.wants(name, peer.compiles):
                continue
            try:
                prepared = peer.prepare(step, x)
                check(x, prepared.to_heads(prepared.call()))
            except Exception as error:
                runner.raise_if_lost(error)
                if isinstance(error, AssertionError):
                    error = Cannot(f"wrong: {first_line(error)}")
                bench.refused("decode", step.key() | {"provider": name}, error)
            else:
                calls[name] = lambda _, call=prepared.call: call()
        source = torch.empty(step.bytes() // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        timings = bench.time(calls | {"copy": lambda _: target.copy_(source)})
    copy = timings.pop("copy")
    for name, timing in timings.items():
        key = step.key() | {"provider": name, "mbytes": step.bytes() * 1e-6, "of_copy": copy.p50 / timing.p50}
        bench.record("decode", key, timing, tokens=step.batch)


def cells() -> list[Cell]:
    found = []
    for length, batch, heads, page in itertools.product(LENGTHS, BATCHES, HEADS, PAGES):
        if batch * length <= MOST_TOKENS:
            step = Step(batch, *heads, length, page)
            compiles = ("decode", heads, page)
            run = functools.partial(measure_step, step=step)
            feature = ParityCase(f"cache, pages of {page}" if page == 16 else "cache", step.dtype, step.head_dim)
            own = functools.partial(run, providers=[name for name in PROVIDERS if name != "flex"])
            usual = heads == HEADS[0] and page in (0, 16) and length in (8192, 32768)
            priority = 1 if usual else 2 if page in (0, 16) else 3
            if page == 0 and heads == HEADS[0] and length == 32768 and batch == 8:
                priority = 0
            label = f"{step.case} L={length}"
            found.append(Cell("decode", label, own, priority, compiles, (feature,)))
            if page == 0:  # which compiles for each shape
                flex, compiles = functools.partial(run, providers=["flex"]), (*compiles, batch, length)
                found.append(Cell("decode", f"{label}, FlexAttention", flex, 3, compiles, (feature,)))
    return found
