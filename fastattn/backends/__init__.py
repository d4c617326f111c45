"""Which backend serves a call, and why not another: pure functions of the spec. `choose` is what `explain` prints.

Each backend is one module with ``reasons(spec)``, ``forward`` and ``backward``; for a KV cache ``cache_reasons(spec)``,
``kv_cache_append`` and ``attention_kvcache``. To add one, write the module and give it a line in `_MODULES`.
"""

import dataclasses
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastattn.backends import cpu, cuda, reference, torch_sdpa, triton
from fastattn.backends.cpu.program import Program as Program
from fastattn.spec import UNDIVIDED, AttentionSpec, CacheSpec, Operands, target

_MODULES: dict[str, ModuleType] = {
    "triton": triton,
    "cuda": cuda,
    "cpu": cpu,
    "torch": torch_sdpa,
    "reference": reference,
}
BACKENDS = tuple(_MODULES)

# Order of preference. On CPU, Triton only ever interprets: never a default. "cuda" counts only where it is `unasked`.
_PREFERENCE = {"cuda": ("cuda", "triton", "torch", "reference")}
_PREFERENCE_ELSEWHERE = ("torch", "cpu", "reference")  # "cpu" refuses what is not on a CPU
_PREFERENCE_FUSED = ("cpu", "torch", "reference")
_PREFERENCE_PRECISE = ("cpu", "reference", "torch")
# From this many scores on, "cpu" is preferred to "torch". PyTorch's call has less overhead, which decides below.
_LARGE = 1 << 16
_LARGE_TRAINED_HALF = 1 << 9  # with gradients in half precision, where PyTorch's backward is slow
_LARGE_CACHED = 1 << 13  # over a KV cache, where PyTorch's kernel has few rows for its threads and copies grouped heads
_LARGE_CACHED_HALF = 1 << 6  # in half precision, where PyTorch's kernel is slower still


def module(backend: str) -> ModuleType:
    """The module of a backend."""
    return _MODULES[backend]


def statistics_of(lse: Tensor, operands: Operands, backend: str) -> Tensor:
    """Softmax statistics for a backward pass, from the lse (B, Hq, Lq) of the forward pass alone.

    They are only as exact as a float32 lse, which is too little where scores are very large.
    """
    unit = getattr(module(backend), "statistics_unit", None)
    maximum = lse.masked_fill(lse == -torch.inf, 0.0) * (1.0 if unit is None else unit(operands))
    return torch.stack((maximum, torch.zeros_like(maximum)))


def statistics_within(statistics: Tensor, more: Tensor, backend: str) -> Tensor:
    """Softmax statistics of rows that also see keys outside this call; those keys raise lse by ``more``."""
    in_base_2 = hasattr(module(backend), "statistics_unit")
    maximum, log_total = statistics
    return torch.stack((maximum, log_total + more * (math.log2(math.e) if in_base_2 else 1.0)))


def reasons_against(backend: str, spec: AttentionSpec | CacheSpec) -> list[str]:
    """Why ``backend`` cannot serve ``spec``; empty if it can.

    Raises:
        ValueError: no such backend.
    """
    if not isinstance(backend, str) or backend not in _MODULES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    return _reasons(backend, spec)


def _reasons(backend: str, spec: AttentionSpec | CacheSpec) -> list[str]:
    of = _MODULES[backend]
    return of.cache_reasons(spec) if isinstance(spec, CacheSpec) else of.reasons(spec)


def cuda_may_serve_unasked() -> bool:
    """Whether the choice between "cuda" and "triton" may differ between calls of one layout: "cuda" records no
    gradients."""
    return bool(cuda.PROVEN)


def _cuda_unasked(spec: AttentionSpec | CacheSpec) -> bool:
    return isinstance(spec, AttentionSpec) and cuda.unasked(spec)


_BATCH_INVARIANT = ("triton", "cpu")  # PyTorch's products may add up in another order where there are more rows
_ROW_INVARIANT = (*_BATCH_INVARIANT, "reference")  # which then computes row by row


def choose(spec: AttentionSpec | CacheSpec, backend: str | None = None, batch_invariant: bool | str = False) -> str:
    """The backend that serves ``spec``: the one asked for, or the first in order of preference that can.

    ``batch_invariant`` considers only backends whose result for a batch entry does not depend on the other entries;
    with "rows" it may not depend on how many rows are computed together either.

    Raises:
        ValueError: the backend asked for does not exist or cannot serve ``spec``, with every reason.
    """
    if batch_invariant:
        if backend is None:
            backend = "cpu" if spec.q.device.type == "cpu" else "triton"
        if backend not in (_ROW_INVARIANT if batch_invariant == "rows" else _BATCH_INVARIANT):
            raise ValueError(
                f"batch_invariant: expected False with backend {backend!r}, got {batch_invariant!r}; 'triton' and "
                "'cpu' have it"
            )
    if backend is None:
        for name in _preference(spec):
            if (name != "cuda" or _cuda_unasked(spec)) and not _reasons(name, spec):
                return name
    elif reasons := reasons_against(backend, spec):
        raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend or "reference"


def _preference(spec: AttentionSpec | CacheSpec) -> tuple[str, ...]:
    """The order of preference.

    On a CPU the fused kernels come first where they are faster, and for every bias. PyTorch's gradients lose precision
    where a float mask holds very low numbers, so its kernel comes last where a call needs gradients; also under
    torch.func, for which it has no batching rule. Other traced calls keep PyTorch's kernel, so that plain models export
    without an operator of ours.
    """
    device = spec.q.device.type
    if device != "cpu":
        return _PREFERENCE.get(device, _PREFERENCE_ELSEWHERE)
    traced = torch.compiler.is_compiling()
    if not traced and torch._C._are_functorch_transforms_active():
        return _PREFERENCE_PRECISE
    least = _LARGE_CACHED_HALF if spec.q.dtype.itemsize < 4 else _LARGE_CACHED
    if isinstance(spec, AttentionSpec):
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (spec.q, spec.k, spec.v))
        if spec.bias is not None:
            return _PREFERENCE_PRECISE if gradients else _PREFERENCE_FUSED
        least = _LARGE_TRAINED_HALF if gradients and spec.q.dtype.itemsize < 4 else _LARGE
    return _PREFERENCE_FUSED if not traced and _scores(spec) >= least else _PREFERENCE_ELSEWHERE


def _scores(spec: AttentionSpec | CacheSpec) -> int:
    batch, heads, length, _ = spec.q.shape
    return batch * heads * length * (spec.capacity if isinstance(spec, CacheSpec) else spec.k.shape[2])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and for each other one the reasons why it does not; ``str()`` is a table."""

    backend: str
    """The one that serves the call."""
    reasons: dict[str, list[str]]
    """Backend name -> why it cannot serve the call; empty for one that could."""
    call: str
    """How the call was read: shapes, dtype, device and terms."""
    cuda_proven: bool = False
    """Whether a parity run on a GPU is on record for such calls of the CUDA C++ kernel; without one the caller must ask
    for it."""

    def __str__(self) -> str:
        lines = [self.call]
        for name in BACKENDS:
            if name == self.backend:
                verdict = "<- chosen"
                if name == "reference":
                    verdict += ": eager PyTorch in blocks of queries, memory O(block x Lk)"
                elif name == "cuda" and not self.cuda_proven:
                    verdict += f": {cuda.UNPROVEN}"
            elif name == "cuda" and not (self.reasons[name] or self.cuda_proven):
                verdict = f"could serve it if asked for: {cuda.UNPROVEN}"
            else:
                verdict = "; ".join(self.reasons[name]) or "could serve it, not preferred here"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)


def explain(
    spec: AttentionSpec | CacheSpec,
    backend: str | None = None,
    batch_invariant: bool | str = False,
    also: Sequence[str] = (),
) -> Explanation:
    """What `choose` decides for ``spec``, with reasons. An explicit ``backend`` that cannot serve it raises.

    ``also`` describes what the call has beyond ``spec``.
    """
    chosen = choose(spec, backend, batch_invariant)
    parts = _describe(spec) if isinstance(spec, AttentionSpec) else _describe_cache(spec, chosen)
    parts += also
    reasons = {name: reasons_against(name, spec) for name in BACKENDS}
    if batch_invariant == "rows":
        parts.append("batch_invariant 'rows'")
        for name in set(BACKENDS).difference(_ROW_INVARIANT):
            reasons[name].append("the bits of a row may follow the others")
    elif batch_invariant:
        parts.append("batch_invariant")
        for name in set(BACKENDS).difference(_BATCH_INVARIANT):
            reasons[name].append("the bits of an entry may follow the batch")
    return Explanation(chosen, reasons, ", ".join(parts), _cuda_unasked(spec))


def _describe(spec: AttentionSpec) -> list[str]:
    q, k, v = spec.q, spec.k, spec.v
    parts = [
        f"q {tuple(q.shape)} k {tuple(k.shape)} v {tuple(v.shape)} {str(q.dtype).removeprefix('torch.')} on {q.device}"
    ]
    if spec.left is not None or spec.right is not None:
        shape = "causal" if spec.causal else f"window ({spec.left}, {spec.right})"
        offset = "Lk - Lq" if spec.q_offset is None else spec.q_offset
        parts.append(f"{shape}, q_offset={offset if spec.q_offset_tensor is None else 'per batch entry'}")
    if spec.cu_seqlens_q is not None:
        parts.append(f"{spec.cu_seqlens_q.shape[0] - 1} packed sequences")
    if spec.seqused_k is not None:
        parts.append("some of their keys")
    if spec.kv_start is not None:
        parts.append("kv_start per batch entry")
    parts += _describe_tensors(mask=spec.mask, bias=spec.bias, alibi_slopes=spec.alibi_slopes, sinks=spec.sinks)
    if spec.block_mask is not None:
        parts.append(repr(spec.block_mask))
    if spec.softcap is not None:
        parts.append(f"softcap {spec.softcap:g}")
    if spec.needs_dbias:
        parts.append("gradient of the bias")
    if spec.dropout_p:
        parts.append(f"dropout {spec.dropout_p}")
    if spec.return_lse:
        parts.append("lse")
    return parts


def _describe_cache(spec: CacheSpec, backend: str) -> list[str]:
    q, k_cache, v_cache = spec.q, spec.k_cache, spec.v_cache
    parts = [
        f"q {tuple(q.shape)} k_cache {tuple(k_cache.shape)} v_cache {tuple(v_cache.shape)} "
        f"{str(q.dtype).removeprefix('torch.')} on {q.device}",
        f"{'its own' if spec.added is None else spec.added} appended",
        "lengths per batch entry" if spec.length is None else f"length {spec.length}",
    ]
    if spec.cu_seqlens_q is not None:
        parts.append(f"packed queries of {spec.entries} entries")
    if spec.left is not None or spec.right is not None:
        plain = spec.right == 0 and spec.left is None
        parts.append("causal" if plain else f"window ({spec.left}, {spec.right})")
    if spec.kv_start is not None:
        parts.append("kv_start per batch entry")
    if spec.quantised:
        kind = str(k_cache.dtype).removeprefix("torch.")
        parts.append(f"{kind} cache with k_scale {_shape(spec.k_scale)} v_scale {_shape(spec.v_scale)}")
    parts += _describe_tensors(
        block_table=spec.block_table, mask=spec.mask, bias=spec.bias, alibi_slopes=spec.alibi_slopes, sinks=spec.sinks
    )  # fmt: skip
    if spec.softcap is not None:
        parts.append(f"softcap {spec.softcap:g}")
    if spec.return_lse:
        parts.append("lse")
    return [*parts, f"scale {spec.scale:g}", _describe_division(spec, backend)]


def _describe_division(spec: CacheSpec, backend: str) -> str:
    """How the backend divides the keys of an entry among programs or threads."""
    if backend == "triton" and spec.num_splits is None and target.is_assumed():
        return "num_splits by the multiprocessors of the GPU"
    if backend == "triton" and spec.num_splits != UNDIVIDED:
        return f"num_splits {triton.splits(spec)}"
    if backend == "cpu" and spec.num_splits != UNDIVIDED:
        return "keys divided by shapes and lengths alone"
    return "keys not divided"


def _shape(x: Tensor | None) -> tuple[int, ...]:
    return () if x is None else tuple(x.shape)


def _describe_tensors(**tensors: Tensor | None) -> list[str]:
    return [f"{name} {tuple(x.shape)}" for name, x in tensors.items() if x is not None]
