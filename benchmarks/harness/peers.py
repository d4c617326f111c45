"""Every implementation of attention that this package is compared with, through one interface.

A peer brings the inputs of a problem into its own layout, outside the timed part, and returns the call. If it cannot
compute the problem it raises `Cannot` with a reason. A library may refuse by an exception at the first call; the suites
report this the same way.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.backends import cuda

from . import cuda_kernels
from .problems import Inputs, Problem, document_lengths, options
from .summary import CUDA


class Cannot(Exception):
    """The peer does not compute this problem, and why."""


def unchanged(out: Tensor) -> Tensor:
    return out


@dataclass
class Prepared:
    """A problem in a peer's layout. ``leaves`` get gradients; ``dout`` is the incoming gradient."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    dout: Tensor
    to_heads: Callable[[Tensor], Tensor] = field(default=unchanged)
    """The output as (B, Hq, Lq, D)."""


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[Any, Any], Prepared]
    """Makes the call from a problem and its inputs, of the kind that its suite measures."""
    module: str = "torch"
    """The package that must be importable."""
    attribute: str = ""
    """What the package must contain, if that is newer than the oldest torch or another package has its name."""
    cpu: bool = False
    """Whether it also runs on CPU tensors."""
    compiles: bool = False
    """Whether its first call compiles."""
    problem: Callable[[], str | None] = field(default=lambda: None)
    """Why there is nothing to call though the module imports."""

    def missing(self, device: str) -> str:
        """The reason why it cannot run on this machine; empty if it can."""
        if device == "cpu" and not self.cpu:
            return "needs a CUDA device"
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{self.module} is not installed"
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # an extension built for another torch fails in many ways
            return f"{self.module} does not import: {first_line(error)}"
        if self.attribute and not hasattr(module, self.attribute):
            return f"{self.module} has no {self.attribute}"
        return self.problem() or ""


def first_line(error: BaseException, width: int = 140) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:width]


FEATURES = ("window", "mask", "bias", "alibi", "softcap", "sinks", "dropout_p", "pattern")


def refuse(problem: Problem, *features: str) -> None:
    """Raise `Cannot` for the first of these features that the problem has."""
    for name in features:
        if getattr(problem, name):
            raise Cannot(f"no {name.removesuffix('_p')}")


def refuse_all_but(problem: Problem, *features: str) -> None:
    refuse(problem, *(name for name in FEATURES if name not in features))


def prepare_fastattn(problem: Problem, x: Inputs) -> Prepared:
    if problem.packed:
        starts = problem.starts().to(x.q.device)
        leaves = packed_tokens(x)
        call = functools.partial(
            fastattn.attention_varlen, *leaves, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=problem.causal
        )
        return Prepared(call, leaves, x.dout.transpose(1, 2).flatten(0, 1), unpacked(problem))
    call = functools.partial(fastattn.attention, x.q, x.k, x.v, **options(problem, x))
    return Prepared(call, x.leaves, x.dout)


def prepare_cuda(problem: Problem, x: Inputs) -> Prepared:
    """fastattn's CUDA C++ kernels, once their parity is known: the gate of the other cells does not ask for it."""
    if problem.packed:
        raise Cannot("packed sequences are measured on the default backend")
    which = "backward" if x.q.requires_grad else "forward"
    outcomes = cuda_kernels.outcomes(which)
    case = cuda_kernels.Case(problem.dtype, problem.head_dim, problem.causal)
    if wrong := outcomes.get(case, "not among the cases"):
        raise Cannot(f"parity red: {which}: {case}: {wrong}")
    call = functools.partial(fastattn.attention, x.q, x.k, x.v, **options(problem, x), backend="cuda")
    return Prepared(call, x.leaves, x.dout)


def packed_tokens(x: Inputs) -> list[Tensor]:
    """q, k, v as contiguous (B * L, H, D) leaves."""
    return [t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for t in tokens_first(x)]


def unpacked(problem: Problem) -> Callable[[Tensor], Tensor]:
    return lambda out: heads_first(out.unflatten(0, (problem.batch, -1)))


def refuse_pattern_but_documents(problem: Problem) -> None:
    if problem.pattern not in ("", "documents"):
        raise Cannot("of patterns, documents alone")


def longest(problem: Problem) -> int:
    return max(document_lengths(problem.length)) if problem.pattern else problem.length


def relative_positions(x: Inputs) -> Tensor:
    """j - i for every query i and key j."""
    i, j = (torch.arange(t.shape[2], device=x.q.device) for t in (x.q, x.k))
    return j - i[:, None]


def prepare_sdpa(problem: Problem, x: Inputs, backend: SDPBackend | None) -> Prepared:
    """`torch.nn.functional.scaled_dot_product_attention` on one of its backends.

    It takes one mask or ``is_causal``. A window becomes a mask and ALiBi a bias, as its users write them. Several are
    combined: constants before the timed part, a bias that needs a gradient inside it.
    """
    refuse(problem, "softcap", "sinks")
    if backend == SDPBackend.MATH and 16.0 * x.score_elements > 0.3 * x.total_memory:
        raise Cannot(f"its scores need {4 * x.score_elements / 2**30:.0f} GiB for each copy")
    allowed, bias = x.mask, x.bias
    if x.alibi_slopes is not None:
        slopes = -x.alibi_slopes[:, None, None].to(x.q.dtype) * relative_positions(x).abs()
        bias = slopes[None] if bias is None else bias + slopes
    is_causal = problem.causal and allowed is None and bias is None and problem.window is None
    if problem.pattern:
        positions = torch.arange(problem.length, device=x.q.device)
        allowed, is_causal = problem.sees(positions[:, None], positions, x.documents), False
    if problem.window is not None:
        inside = relative_positions(x) >= -problem.window
        allowed = inside if allowed is None else allowed & inside
    if problem.causal and not is_causal and not problem.pattern:
        below = relative_positions(x) <= 0
        allowed = below if allowed is None else allowed & below
    learned = bias is not None and bias.requires_grad
    if bias is None:
        attn_mask: Tensor | None = allowed
    else:
        attn_mask = bias if allowed is None or learned else bias.masked_fill(~allowed, -torch.inf)

    def call() -> Tensor:
        mask = attn_mask
        if learned and attn_mask is not None and allowed is not None:
            mask = attn_mask.masked_fill(~allowed, -torch.inf)
        run = functools.partial(
            F.scaled_dot_product_attention, x.q, x.k, x.v, mask, problem.dropout_p, is_causal,
            enable_gqa=problem.q_heads != problem.kv_heads,
        )  # fmt: skip
        if backend is None:
            return run()
        with sdpa_kernel(backend):
            return run()

    return Prepared(call, x.leaves, x.dout)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for static shapes, set so that a sweep over many shapes measures compiled code in each."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = 10_000  # beyond it, eager code would run instead, silently
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._functorch.config.donated_buffer = False  # donated buffers forbid repeating a backward pass
    return torch.compile(function, dynamic=False)


@functools.cache
def compiled_flex(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled if its kernels exist here."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else compiled(flex_attention)


def prepare_flex(problem: Problem, x: Inputs) -> Prepared:
    """FlexAttention: masks become a block mask, built before the timed part; other terms become a score modification.

    It has no sinks; they are applied to its output through the log-sum-exp, as its users do.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    refuse(problem, "dropout_p")
    mask, bias, slopes, softcap, sinks = x.mask, x.bias, x.alibi_slopes, problem.softcap, x.sinks
    if (mask is not None and mask.shape[1] != 1) or (bias is not None and bias.shape[0] != 1):
        raise Cannot("written for masks shared by heads and biases shared by the batch")

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = j <= i if problem.causal else j >= 0
        if problem.pattern:
            visible = problem.sees(i, j, x.documents)
        if problem.window is not None:
            visible = visible & (j >= i - problem.window)
        if mask is not None:
            visible = visible & mask[b, 0, i if mask.shape[2] > 1 else 0, j]
        return visible

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[0, h, i, j]
        if slopes is not None:
            score = score - slopes[h] * (i - j).abs()
        return score

    block_mask = None
    if problem.causal or problem.window is not None or mask is not None or problem.pattern:
        batch = None if mask is None else problem.batch
        block_mask = create_block_mask(allowed, batch, None, x.q.shape[2], x.k.shape[2], device=x.q.device)
    changes = any(option is not None for option in (bias, slopes, softcap))
    run = functools.partial(
        compiled_flex(x.q.device.type), x.q, x.k, x.v, score_mod=change if changes else None, block_mask=block_mask,
        enable_gqa=problem.q_heads != problem.kv_heads,
    )  # fmt: skip
    if sinks is None:
        return Prepared(run, x.leaves, x.dout)

    def with_sinks() -> Tensor:
        out, aux = run(return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(aux.lse - sinks[:, None])[..., None].to(out.dtype)

    return Prepared(with_sinks, x.leaves, x.dout)


def tokens_first(x: Inputs) -> list[Tensor]:
    """q, k, v as contiguous (B, L, H, D) leaves."""
    return [t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for t in (x.q, x.k, x.v)]


def heads_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def only_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Several of these return (out, lse), or did so in some version."""
    return result[0] if isinstance(result, tuple) else result


def prepare_varlen(problem: Problem, x: Inputs) -> Prepared:
    """`torch.nn.attention.varlen`: the batch packed, as sequences of equal length or as documents."""
    from torch.nn.attention.varlen import varlen_attn

    refuse_all_but(problem, "window", "pattern")
    refuse_pattern_but_documents(problem)
    arguments: dict[str, Any] = {}
    known = inspect.signature(varlen_attn).parameters
    if "window_size" in known:
        arguments["window_size"] = window_size(problem)
    elif problem.window is not None:
        raise Cannot("no window in this torch")
    else:
        arguments["is_causal"] = problem.causal
    if problem.q_heads != problem.kv_heads:
        if "enable_gqa" not in known:
            raise Cannot("no GQA in this torch")
        arguments["enable_gqa"] = True
    q, k, v = leaves = packed_tokens(x)
    starts, most = problem.starts().to(x.q.device), longest(problem)

    def call() -> Tensor:
        return only_output(varlen_attn(q, k, v, starts, starts, most, most, **arguments))

    return Prepared(call, leaves, x.dout.transpose(1, 2).flatten(0, 1), unpacked(problem))


def window_size(problem: Problem) -> tuple[int, int]:
    """As flash-attn and torch's varlen write it: -1 leaves a side open."""
    return -1 if problem.window is None else problem.window, 0 if problem.causal else -1


def prepare_flash_attn(problem: Problem, x: Inputs, module: str, features: tuple[str, ...]) -> Prepared:
    """flash-attn's ``flash_attn_func`` in any generation, for documents its ``flash_attn_varlen_func``; ``features`` is
    what this one has.
    """
    refuse_all_but(problem, "pattern", *features)
    refuse_pattern_but_documents(problem)
    arguments: dict[str, Any] = {"causal": problem.causal}
    if problem.window is not None:
        arguments["window_size"] = window_size(problem)
    if problem.softcap is not None:
        arguments["softcap"] = problem.softcap
    if x.alibi_slopes is not None:
        arguments["alibi_slopes"] = x.alibi_slopes
    if problem.dropout_p:
        arguments["dropout_p"] = problem.dropout_p
    if problem.pattern:
        leaves, starts = packed_tokens(x), problem.starts().to(x.q.device)
        run = functools.partial(
            importlib.import_module(module).flash_attn_varlen_func, *leaves, cu_seqlens_q=starts, cu_seqlens_k=starts,
            max_seqlen_q=longest(problem), max_seqlen_k=longest(problem), **arguments,
        )  # fmt: skip
        dout = x.dout.transpose(1, 2).flatten(0, 1)
        return Prepared(lambda: only_output(run()), leaves, dout, unpacked(problem))
    leaves = tokens_first(x)
    run = functools.partial(importlib.import_module(module).flash_attn_func, *leaves, **arguments)
    return Prepared(lambda: only_output(run()), leaves, x.dout.transpose(1, 2), heads_first)


def prepare_xformers(problem: Problem, x: Inputs) -> Prepared:
    ops = importlib.import_module("xformers.ops")
    if problem.q_heads != problem.kv_heads:
        raise Cannot("no GQA with a gradient")
    refuse_all_but(problem, "bias", "dropout_p", "pattern")
    refuse_pattern_but_documents(problem)
    attn_bias: Any = None
    if problem.pattern:
        if problem.batch != 1 or not problem.causal:
            raise Cannot("written for causal documents in one batch entry")
        lengths = document_lengths(problem.length)
        attn_bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths).make_causal()
    elif x.bias is not None:
        if problem.causal:
            raise Cannot("no gradient for the bias under its causal mask")
        attn_bias = x.bias.expand(problem.batch, -1, -1, -1)
    elif problem.causal:
        attn_bias = ops.LowerTriangularMask()
    leaves = tokens_first(x)
    call = functools.partial(ops.memory_efficient_attention, *leaves, attn_bias=attn_bias, p=problem.dropout_p)
    bias_leaf = [x.bias] if x.bias is not None and x.bias.requires_grad else []
    return Prepared(call, [*leaves, *bias_leaf], x.dout.transpose(1, 2), heads_first)


def prepare_flashinfer(problem: Problem, x: Inputs) -> Prepared:
    """FlashInfer's ragged prefill. It plans before the call and has no backward pass."""
    refuse_all_but(problem, "pattern")
    refuse_pattern_but_documents(problem)
    if any(t.requires_grad for t in x.leaves):
        raise Cannot("no backward")
    flashinfer = importlib.import_module("flashinfer")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device=x.q.device), "NHD"
    )
    q, k, v = packed_tokens(x)
    starts = problem.starts().to(x.q.device)
    heads = (problem.q_heads, problem.kv_heads)
    wrapper.plan(starts, starts, *heads, problem.head_dim, causal=problem.causal, q_data_type=x.q.dtype)
    return Prepared(lambda: wrapper.run(q, k, v), [], x.dout, unpacked(problem))


def sdpa_peer(name: str, backend: SDPBackend, cpu: bool = False) -> Peer:
    return Peer(name, functools.partial(prepare_sdpa, backend=backend), cpu=cpu)


def flash_attn_peer(name: str, module: str, *features: str) -> Peer:
    prepare = functools.partial(prepare_flash_attn, module=module, features=features)
    return Peer(name, prepare, module, "flash_attn_func")


OWN = "fastattn"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(OWN, prepare_fastattn, cpu=True, compiles=True),
        Peer(CUDA, prepare_cuda, problem=cuda.problem),
        sdpa_peer("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        sdpa_peer("sdpa-flash", SDPBackend.FLASH_ATTENTION, cpu=True),
        sdpa_peer("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        sdpa_peer("sdpa-math", SDPBackend.MATH, cpu=True),
        Peer("sdpa", functools.partial(prepare_sdpa, backend=None), cpu=True),
        Peer("flex", prepare_flex, "torch.nn.attention.flex_attention", cpu=True, compiles=True),
        Peer("varlen", prepare_varlen, "torch.nn.attention.varlen", "varlen_attn"),
        flash_attn_peer("flash-attn-2", "flash_attn", "window", "softcap", "alibi", "dropout_p"),
        flash_attn_peer("flash-attn-3", "flash_attn_interface", "window", "softcap"),
        flash_attn_peer("flash-attn-4", "flash_attn.cute"),
        Peer("xformers", prepare_xformers, "xformers.ops", "memory_efficient_attention"),
        Peer("flashinfer", prepare_flashinfer, "flashinfer", "BatchPrefillWithRaggedKVCacheWrapper"),
    )
}
FAST = (OWN, "sdpa-cudnn", "sdpa-flash", "flash-attn-2", "flash-attn-3", "flash-attn-4")
"""Peers that are measured in every cell."""
OTHERS = ("sdpa-efficient", "flex", "varlen", "xformers", "flashinfer", "sdpa-math")
"""Peers that are slower here, or slow to compile: measured in fewer cells."""
