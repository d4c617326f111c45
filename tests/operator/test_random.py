"""Any combination of arguments, drawn by hypothesis: the same examples in every run, a fixed number of them.

A failure prints one `Case`, shrunk to the smallest that fails; `check(case, device)` runs it again.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn import BlockMask, explain
from fastattn.backends.cpu import library as cpu_library
from fastattn.block_mask import BLOCK
from fastattn.testing import check_attention
from tests.support.attention_cases import DTYPE_NAMES, INF, LAYOUTS, relayout

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129]), st.integers(0, 160))
# Not below 8: of a handful of elements, the peer's error is sometimes small by chance alone, and twice it too little.
DIMS = st.sampled_from([8, 15, 16, 17, 24, 40, 59, 64, 72])
BITS = st.tuples(*[st.booleans()] * 4)  # which dimensions of a mask or bias are full; the others are 1


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `attention`, as plain data."""

    dtype: str
    batch: int
    kv_heads: int
    group: int
    lengths: tuple[int, int]
    dims: tuple[int, int]
    layouts: tuple[str, str, str]
    causal: bool
    q_offset: int | tuple[int, int] | None  # two integers: between which those of a tensor are drawn
    window: tuple[int | None, int | None] | None
    mask: tuple[bool, bool, bool, bool] | None
    keep: float  # fraction of the mask that is True
    bias: tuple[bool, bool, bool, bool] | None
    bias_dtype: str
    forbid: bool  # -inf in the bias
    learned: bool  # gradients of bias, slopes and sinks
    alibi: bool
    softcap: float | None
    sinks: bool
    scale: float | None
    dropout_p: float
    lse: bool
    packed: int  # sequences in one row, of random lengths, with some rows behind the last; 0: not packed
    block_mask: tuple[bool, bool] | None  # which of batch and heads are full
    seed: int


DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def rarely(strategy):
    return st.one_of(st.none(), st.none(), st.none(), strategy)


SIDE = st.one_of(st.none(), st.integers(-10, 100).filter(lambda side: side != -1))  # -1 is refused
WINDOW = st.tuples(SIDE, SIDE).filter(lambda window: None in window or sum(window) >= 0)
OFFSET = st.integers(-70, 170)


def cases(dtypes, **fixed):
    """Like any call of `attention`, but for what is `fixed`."""
    fields = {
        "dtype": st.sampled_from(dtypes),
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "group": st.sampled_from([1, 1, 2, 3]),
        "lengths": st.tuples(LENGTHS, LENGTHS),
        "dims": st.one_of(DIMS.map(lambda d: (d, d)), st.tuples(DIMS, DIMS)),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
        "causal": st.booleans(),
        "q_offset": st.one_of(st.none(), st.just(0), OFFSET, st.tuples(OFFSET, OFFSET).map(sorted).map(tuple)),
        "window": rarely(WINDOW),
        "mask": st.one_of(st.none(), BITS),
        "keep": st.sampled_from([0.5, 0.95, 0.1, 0.0, 1.0]),
        "bias": st.one_of(st.none(), BITS),
        "bias_dtype": st.sampled_from(["fp32", "bf16", "fp16", "fp64"]),
        "forbid": st.booleans(),
        "learned": st.booleans(),
        "alibi": rarely(st.just(True)).map(bool),
        "softcap": rarely(st.sampled_from([0.5, 5.0, 50.0])),
        "sinks": rarely(st.just(True)).map(bool),
        "scale": rarely(st.sampled_from([1.0, 0.01, -0.3, 0.0])),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 1.0]),
        "lse": st.booleans(),
        "packed": rarely(st.integers(1, 4)).map(lambda n: n or 0),
        "block_mask": rarely(st.tuples(st.booleans(), st.booleans())),
        "seed": st.integers(0, 1000),
    }
    return st.builds(Case, **{**fields, **{name: st.just(value) for name, value in fixed.items()}})


def arguments(case, device):
    """(q, k, v), options."""
    generator = torch.Generator().manual_seed(case.seed)
    q_heads, (q_len, kv_len), (dim, v_dim) = case.kv_heads * case.group, case.lengths, case.dims
    batch = 1 if case.packed else case.batch
    full = (batch, q_heads, q_len, kv_len)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def broadcast(bits):
        return [size if bit else 1 for size, bit in zip(full, bits, strict=True)]

    shapes = ((q_heads, q_len, dim), (case.kv_heads, kv_len, dim), (case.kv_heads, kv_len, v_dim))
    qkv = [normal(batch, *shape).to(device, DTYPES[case.dtype]) for shape in shapes]
    qkv = [relayout(x, layout) for x, layout in zip(qkv, case.layouts, strict=True)]
    left = None if case.window is None else case.window[0]
    causal = case.causal and (left is None or left >= 0)  # otherwise nothing is visible, which is refused
    options = {"causal": causal, "scale": case.scale, "dropout_p": case.dropout_p, "softcap": case.softcap}
    options["window"], options["q_offset"] = case.window, case.q_offset
    if isinstance(case.q_offset, tuple):
        low, high = case.q_offset
        options["q_offset"] = torch.randint(low, high + 1, (case.packed or batch,), generator=generator).to(device)
    if case.packed:  # each sequence by itself, which a mask or bias of all rows cannot describe
        qkv = [x[0].transpose(0, 1) for x in qkv]
        for name, length in (("cu_seqlens_q", q_len), ("cu_seqlens_k", kv_len)):
            ends = torch.randint(0, length + 1, (case.packed,), generator=generator).sort().values
            options[name] = torch.nn.functional.pad(ends, (1, 0)).int().to(device)
    elif case.block_mask is not None:
        shape = [size if full_size else 1 for size, full_size in zip(full[:2], case.block_mask, strict=True)]
        options["block_mask"] = BlockMask.from_mask(sparse(shape, q_len, kv_len, case.keep, generator)).to(device)
    if case.mask is not None and not case.packed:
        options["mask"] = (torch.rand(broadcast(case.mask), generator=generator) < case.keep).to(device)
    if case.bias is not None and not case.packed:
        bias = normal(*broadcast(case.bias))
        if case.forbid:
            bias[torch.rand(bias.shape, generator=generator) < 0.3] = -INF
        options["bias"] = bias.to(device, DTYPES[case.bias_dtype]).requires_grad_(case.learned)
    if case.alibi:
        options["alibi_slopes"] = (normal(q_heads).abs() / 4).to(device).requires_grad_(case.learned)
    if case.sinks:
        options["sinks"] = normal(q_heads).to(device).requires_grad_(case.learned)
    return qkv, options


def sparse(shape, q_len, kv_len, keep, generator):
    """A boolean mask of which some tiles are empty, some full, and the others random."""
    tiles = torch.randint(0, 3, (*shape, -(-q_len // BLOCK), -(-kv_len // BLOCK)), generator=generator)
    tiles = tiles.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :q_len, :kv_len]
    return torch.where(tiles == 2, torch.rand(tiles.shape, generator=generator) < keep, tiles == 1)


def check(case, device, backend):
    qkv, options = arguments(case, device)
    check_attention(*qkv, backend=backend, seed=case.seed, lse_gradient=case.lse and backend != "torch", **options)


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,  # the same examples on every machine
        database=None,
        deadline=None,  # the interpreter is slow
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def interpreted(**fixed):
    """Cases of few heads: the interpreter takes its time for each."""
    drawn = cases(["fp16", "bf16", "fp32"], **fixed)
    return drawn.filter(lambda case: (1 if case.packed else case.batch) * case.kv_heads * case.group <= 4)


# What every attention kernel has; `test_triton_with_everything` adds what few have.
COMMON = {"window": None, "alibi": False, "softcap": None, "sinks": False, "packed": 0, "block_mask": None}


@examples(8)
@given(case=interpreted(**COMMON))
def test_triton(device, case):
    check(case, device, "triton")


@examples(12)
@given(case=interpreted())
def test_triton_with_everything(device, case):
    check(case, device, "triton")


@examples(8)
@given(case=interpreted().filter(lambda case: case.packed or case.block_mask))
def test_triton_packed_or_with_a_block_mask(device, case):
    check(case, device, "triton")


@pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")
@examples(60)
@given(case=cases(["fp16", "bf16", "fp32", "fp64"]))
def test_cpu(case):
    check(case, "cpu", "cpu")


@examples(60)
@given(case=cases(["fp16", "bf16", "fp32", "fp64"]))
def test_reference(case):
    check(case, "cpu", "reference")


# Nothing that PyTorch's kernel is known to refuse.
FOR_TORCH = {
    "q_offset": 0, "window": None, "learned": False, "alibi": False, "softcap": None, "sinks": False,
    "dropout_p": 0.0, "lse": False, "packed": 0, "block_mask": None,
}  # fmt: skip


@examples(100)
@given(case=cases(["fp16", "bf16", "fp32", "fp64"], **FOR_TORCH))
def test_torch(case):
    (q, k, v), options = arguments(case, "cpu")
    if not explain(q, k, v, **options).reasons["torch"]:
        check(case, "cpu", "torch")


@examples(60)
@given(case=cases(["fp16", "bf16", "fp32", "fp64"]))
def test_whatever_is_chosen(case):
    """The default on CPU serves every call there is."""
    (q, k, v), options = arguments(case, "cpu")
    if not case.packed:  # `explain` describes calls of `attention`
        chosen = explain(q, k, v, return_lse=case.lse, **options).backend
        assert chosen in ("cpu", "torch", "reference")
    check_attention(q, k, v, seed=case.seed, lse_gradient=case.lse, **options)
