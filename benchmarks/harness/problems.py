"""One attention benchmark: the problem, random inputs for it, and a check of the output."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from fastattn import BlockMask
from fastattn.testing import assert_parity

from .device import Device, DryRun
from .flops import attention_flops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """Self-attention of ``length`` tokens. Each feature is a field here and has its tensor in `Inputs`."""

    batch: int
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str = "bf16"
    causal: bool = False
    mask: str = ""
    """"random": (B, 1, L, L) with one in eight forbidden; "padding": (B, 1, 1, L) with lengths L/2 to L."""
    bias: str = ""
    """"constant" or "learned" (with a gradient): (1, H, L, L)."""
    window: int | None = None
    """How many keys before its own position a query sees; None for all."""
    alibi: bool = False
    """Constant slopes, one per head."""
    softcap: float | None = None
    sinks: bool = False
    """A learned logit per head."""
    pattern: str = ""
    """One of `PATTERNS`: a further rule which keys a query sees, the same for every head."""
    packed: bool = False
    """fastattn gets the documents of the pattern as packed sequences, not as a block mask."""
    dropout_p: float = 0.0

    def flops(self, mode: str) -> float:
        if self.pattern:
            return attention_flops(self.batch, self.q_heads, 1, self.pattern_pairs(), self.head_dim, mode=mode)
        return attention_flops(
            self.batch, self.q_heads, self.length, self.length, self.head_dim,
            causal=self.causal, window=self.window, mode=mode,
        )  # fmt: skip

    def pattern_pairs(self) -> int:
        """How many (query, key) pairs the pattern allows."""
        return count_pairs(self.pattern, self.length, self.causal)

    def documents(self) -> Tensor:
        """int32 (L,): which document each token belongs to."""
        lengths = torch.tensor(document_lengths(self.length))
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).int()

    def starts(self) -> Tensor:
        """int32: the starts of the packed sequences and the end of the last one."""
        lengths = document_lengths(self.length) if self.pattern else [self.length]
        return torch.tensor([0, *itertools.accumulate(lengths * self.batch)], dtype=torch.int32)

    def sees(self, i: Tensor, j: Tensor, documents: Tensor | None) -> Tensor:
        """Whether query i sees key j by the pattern and, with ``causal``, by position."""
        seen = PATTERNS[self.pattern](i, j, self.length, documents)
        return seen & (j <= i) if self.causal else seen

    def key(self) -> dict[str, object]:
        """The columns that identify the problem."""
        return {
            "dtype": self.dtype, "batch": self.batch, "q_heads": self.q_heads, "kv_heads": self.kv_heads,
            "q_len": self.length, "kv_len": self.length, "head_dim": self.head_dim, "causal": self.causal,
        }  # fmt: skip


PATTERNS: dict[str, Callable[[Any, Any, int, Any], Any]] = {
    "documents": lambda i, j, length, documents: documents[i] == documents[j],
    "prefix": lambda i, j, length, documents: (j <= i) | (j < length // 4),
    "strided": lambda i, j, length, documents: (i // 128 - j // 128) % 8 == 0,
    "causal": lambda i, j, length, documents: j <= i,
}
"""Name -> rule for (query, key, length, document of each token)."""


@functools.cache
def document_lengths(length: int) -> list[int]:
    """The lengths of the documents that fill a sequence: log-normal, like those of texts, and always the same."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (rest := length - sum(lengths)) > 0:
        drawn = length / 32 * math.exp(torch.randn((), generator=generator).item())
        lengths.append(min(rest, max(4, int(drawn))))
    return lengths


@functools.cache
def count_pairs(pattern: str, length: int, causal: bool) -> int:
    problem = Problem(1, 1, 1, length, 1, pattern=pattern, causal=causal)
    documents, keys, pairs = problem.documents(), torch.arange(length), 0
    for rows in torch.arange(length).split(512):
        pairs += int(problem.sees(rows[:, None], keys, documents).count_nonzero())  # many times as fast as a sum
    return pairs


def fit(problem: Problem, device: Device) -> Problem:
    """The problem for this device: a small one in a dry run."""
    if not isinstance(device, DryRun):
        return problem
    kv_heads = min(problem.kv_heads, 2)
    return dataclasses.replace(
        problem, batch=min(problem.batch, 2), q_heads=kv_heads * (problem.q_heads // problem.kv_heads),
        kv_heads=kv_heads, length=min(problem.length, 24), head_dim=min(problem.head_dim, 32), dtype="fp32",
        window=None if problem.window is None else min(problem.window, 5),
    )  # fmt: skip


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    documents: Tensor | None
    block_mask: BlockMask | None
    dout: Tensor
    total_memory: float
    """The memory that the inputs take, in bytes."""

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        learned = [x for x in (self.bias, self.sinks) if x is not None and x.requires_grad]
        return [self.q, self.k, self.v, *learned]

    @property
    def score_elements(self) -> int:
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[2]


def make_inputs(problem: Problem, device: Device, seed: int, grad: bool) -> Inputs:
    """Standard normal q, k, v, dout, as a network at initialisation would have."""
    generator = torch.Generator(device.torch_device).manual_seed(seed)
    batch, length, dim = problem.batch, problem.length, problem.head_dim

    def normal(*shape: int) -> Tensor:
        options = {"dtype": DTYPES[problem.dtype], "device": device.torch_device}
        return torch.randn(shape, generator=generator, **options)

    q = normal(batch, problem.q_heads, length, dim).requires_grad_(grad)
    k, v = (normal(batch, problem.kv_heads, length, dim).requires_grad_(grad) for _ in "kv")
    mask, bias = None, None
    if problem.mask == "random":
        draw = torch.rand(batch, 1, length, length, generator=generator, device=device.torch_device)
        mask = draw > 1 / 8
    elif problem.mask == "padding":
        limits = torch.randint(length // 2, length + 1, (batch,), generator=generator, device=device.torch_device)
        mask = (torch.arange(length, device=device.torch_device) < limits[:, None])[:, None, None]
    if problem.bias:
        bias = normal(1, problem.q_heads, length, length).requires_grad_(grad and problem.bias == "learned")
    slopes = 2.0 ** -torch.linspace(1, 8, problem.q_heads, device=device.torch_device) if problem.alibi else None
    sinks = normal(problem.q_heads).requires_grad_(grad) if problem.sinks else None
    documents, block_mask = None, None
    if problem.pattern:
        documents = problem.documents().to(device.torch_device)
        block_mask = BlockMask.from_predicate(
            lambda b, h, i, j: problem.sees(i, j, documents), (1, 1, length, length), device=device.torch_device
        )
    dout = normal(batch, problem.q_heads, length, dim)
    return Inputs(q, k, v, mask, bias, slopes, sinks, documents, block_mask, dout, device.total_memory())


def options(problem: Problem, x: Inputs) -> dict[str, Any]:
    """The arguments of `fastattn.attention` beside q, k and v."""
    window = None if problem.window is None else (problem.window, None)
    return {
        "causal": problem.causal and not problem.pattern,  # the block mask then contains causal order
        "q_offset": 0, "window": window, "mask": x.mask, "block_mask": x.block_mask, "bias": x.bias,
        "alibi_slopes": x.alibi_slopes, "softcap": problem.softcap, "sinks": x.sinks, "dropout_p": problem.dropout_p,
    }  # fmt: skip


class WrongResult(Exception):
    """A peer computed something else, or fastattn missed the parity rule."""


def check_output(out: Tensor, problem: Problem, x: Inputs, own: bool, rows: int = 16) -> None:
    """Compare some rows of the last head with float64: cheap at any length.

    fastattn must keep the parity rule. A peer must only compute the same function: an error of 5 % in the RMS is far
    above rounding in any dtype and far below the error of a wrong mask or layout.
    """
    if problem.dropout_p:
        if not out.isfinite().all():
            raise WrongResult("the output is not finite")
        return
    start = max(0, problem.length // 2 - rows)
    rows = min(rows, problem.length)

    def some_rows(operand: Tensor | None) -> Tensor | None:
        if operand is None:
            return None
        shape = (problem.batch, problem.q_heads, operand.shape[2], problem.length)
        operand = operand.detach().expand(shape)[-1:, -1:]
        return operand if operand.shape[2] == 1 else operand[:, :, start : start + rows]

    def rows_in(dtype: torch.dtype) -> Tensor:
        q, k, v = (t.detach()[-1:, -1:].to(dtype) for t in (x.q[:, :, start : start + rows], x.k, x.v))
        bias, mask = some_rows(x.bias), some_rows(x.mask)
        if problem.pattern:
            keys = torch.arange(problem.length, device=q.device)
            mask = problem.sees(keys[start : start + rows, None], keys, x.documents)
        changes = {
            "q_offset": start, "mask": mask, "block_mask": None, "bias": None if bias is None else bias.to(dtype),
            "alibi_slopes": None if x.alibi_slopes is None else x.alibi_slopes[-1:],
            "sinks": None if x.sinks is None else x.sinks.detach()[-1:],
        }  # fmt: skip
        return fastattn.attention(q, k, v, **(options(problem, x) | changes), backend="reference")

    actual, expected = out.detach()[-1:, -1:, start : start + rows], rows_in(torch.float64)
    if own:
        try:
            assert_parity(actual, expected, rows_in(actual.dtype), name="out")
        except AssertionError as error:
            raise WrongResult(str(error)) from None
        return
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error < 0.05:
        raise WrongResult(f"computes something else: relative RMS difference {error:.2g}")
