"""The KV cache as operators: one appends in place, the other attends. Asking for a gradient raises.

`attention_kvcache` takes the new entries k and v, which the cache holds already, only so that asking for their
gradient raises too.
"""

from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import plain
from fastattn.ops.attention import attention
from fastattn.ops.autograd import below_autograd
from fastattn.ops.direct import DIRECT, Way, way, without_autocast
from fastattn.ops.implementations import unwritten
from fastattn.ops.schema import LIBRARY, CacheCall, arguments, cache_results, define, flatten, unflatten
from fastattn.spec import UNDIVIDED, AttentionSpec, CacheSpec, Rotary, known
from fastattn.spec.checks import check_scale_value

APPEND = define(
    "kv_cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lens, Tensor? block_table, "
    "Tensor? cu_seqlens_q, Tensor(c!)? k_scale, Tensor(d!)? v_scale, str backend) -> ()"
)
KVCACHE = define(f"attention_kvcache({arguments(CacheCall)}) -> (Tensor out, Tensor lse)")
KVCACHE_BACKWARD = define("attention_kvcache_backward(Tensor gradient, SymInt[] shape) -> Tensor")


def attention_kvcache(
    spec: CacheSpec, backend: str, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Append the new entries, then attend: (out, lse) on the chosen backend; lse is None from the torch backend.

    Eager mode calls PyTorch's own functions directly. On a CPU, an operator of ours would double the time of a decode
    step. ``rotary``, if `turns_in_append`, turns the queries and the new keys.
    """
    if plain.wanted():
        plain.refuse_cache(spec)
    direct = backend in DIRECT and way(spec) is Way.AT_ONCE
    if direct and _in_one(spec, backend):
        return _append_and_attend(spec, rotary)
    assert rotary is None
    if spec.k is not None and spec.v is not None:
        _append_new(spec, spec.k, spec.v, backend, direct)
    if not direct and _wants_gradient(spec):
        return KVCACHE(*flatten(CacheCall(spec, backend)))
    if spec.k is not None and spec.v is not None and spec.length is not None and _is_prompt(spec):
        with without_autocast(spec.q.device):
            return attention(_prompt(spec, spec.k, spec.v), backend)
    if backend == "torch" and not torch.compiler.is_compiling():
        with without_autocast(spec.q.device):
            return backends.module("torch").attention_cached(spec), None
    if direct:
        return _attend(spec, backend)
    return KVCACHE(*flatten(CacheCall(spec, backend)))


def turns_in_append(spec: CacheSpec, backend: str, rotary: Rotary) -> bool:
    """Whether `attention_kvcache` takes ``rotary``: whether the launch that appends turns what it reads."""
    if spec.num_splits == UNDIVIDED or not _in_one(spec, backend):
        return False
    return way((*spec, rotary.cos, rotary.sin)) is Way.AT_ONCE and not plain.wanted()


def _in_one(spec: CacheSpec, backend: str) -> bool:
    """Whether the backend appends and attends in one call."""
    return backend == "triton" and spec.k is not None and not (spec.length is not None and _is_prompt(spec))


def _is_prompt(spec: CacheSpec) -> bool:
    """Whether the cache was empty: the call is then attention among the new entries, whose kernels have taller tiles.

    False if the cache is quantised, or if a mask starts after the first key or ends before the last.
    """
    if not (known(spec.length == spec.added) and known(spec.added == spec.q.shape[2])):
        return False
    if spec.quantised or spec.mask_start is not None or spec.num_splits == UNDIVIDED:
        return False
    return all(x is None or known(x.shape[3] >= spec.q.shape[2]) for x in (spec.mask, spec.bias))


def _prompt(spec: CacheSpec, k: Tensor, v: Tensor) -> AttentionSpec:
    mask, bias = (x if x is None else x[..., : spec.length] for x in (spec.mask, spec.bias))
    return AttentionSpec(
        spec.q, k, v, mask=mask, bias=bias, alibi_slopes=spec.alibi_slopes, sinks=spec.sinks, q_offset_tensor=None,
        left=spec.left, right=spec.right, q_offset=0, scale=spec.scale, softcap=spec.softcap, dropout_p=0.0,
        return_lse=spec.return_lse, kv_start=spec.kv_start,
    )  # fmt: skip


def _append_new(spec: CacheSpec, k: Tensor, v: Tensor, backend: str, direct: bool) -> None:
    """Write new entries into the caches in place; the torch backend uses the reference's implementation."""
    arguments = (
        spec.k_cache, spec.v_cache, k.detach(), v.detach(), spec.lens, spec.block_table, spec.cu_seqlens_q,
        spec.k_scale, spec.v_scale,
    )  # fmt: skip
    if direct:
        _append(*arguments, backend)
        _count_change(spec)
        return
    append = _append if backend == "torch" and not torch.compiler.is_compiling() else APPEND
    append(*arguments, "reference" if backend == "torch" else backend)


def _append_and_attend(spec: CacheSpec, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """A decode step of the Triton backend, which launches its kernels together."""
    out, lse = _results(spec, "triton")
    backends.triton.append_and_attend(out, lse, spec, rotary)
    _count_change(spec)
    return out, lse


def _count_change(spec: CacheSpec) -> None:
    """Tell autograd that the tensors have changed, in case it saved them; it cannot save inference tensors.

    Scales change if each token has its own.
    """
    changed = [spec.k_cache, spec.v_cache]
    if spec.k_scale is not None:
        changed += [x for x in (spec.k_scale, spec.v_scale) if x is not None and x.ndim == 3]
    if not any(x.is_inference() for x in changed):
        torch.autograd.graph.increment_version(changed)


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, backend: str,
) -> None:  # fmt: skip
    append = backends.module(backend).kv_cache_append
    append(k_cache, v_cache, k, v, lens, block_table, cu_seqlens_q, k_scale, v_scale)


def _append_in_place(keys: torch.DispatchKeySet, k_cache: Tensor, v_cache: Tensor, *others: Any) -> None:
    """Append, then tell autograd that the caches and scales have changed."""
    *_, k_scale, v_scale, _backend = others
    scales = [x for x in (k_scale, v_scale) if x is not None]
    torch.autograd.graph.increment_version((k_cache, v_cache, *scales))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        APPEND.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, k_cache, v_cache, *others)


def _kvcache(*args: Any) -> tuple[Tensor, Tensor]:
    spec, backend = unflatten(CacheCall, args)
    check_scale_value(spec.scale)
    return _attend(spec, backend)


def _results(spec: CacheSpec, backend: str) -> tuple[Tensor, Tensor]:
    """The results for a backend to fill. Packed rows that it leaves unwritten hold the result of a row that sees
    nothing."""
    out, lse = cache_results(spec, backend)
    if spec.cu_seqlens_q is not None:
        rows = unwritten(spec.cu_seqlens_q, backend)
        out[:, :, rows].zero_()
        lse[..., rows].fill_(-torch.inf)
    return out, lse


def _attend(spec: CacheSpec, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = _results(spec, backend)
    with without_autocast(spec.q.device):
        if backend == "torch":
            out.copy_(backends.module("torch").attention_cached(spec))
        else:
            backends.module(backend).attention_kvcache(out, lse, spec)
    return out, lse


def _kvcache_backward(gradient: Tensor, shape: list[int]) -> Tensor:
    raise RuntimeError(
        "fastattn: attention_with_kvcache has no gradient; call it under torch.no_grad(), and train with "
        "fastattn.attention"
    )


class _KVCacheAttention(torch.autograd.Function):
    """Results on a graph that raises when something is differentiated through them.

    The backward pass calls an operator, so that a compiled step raises when its backward runs, not when it is traced.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.shapes = [x.shape if isinstance(x, Tensor) else None for x in args]
        ctx.set_materialize_grads(False)
        return below_autograd(KVCACHE, *args)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient = dlse if dout is None else dout
        return tuple(
            KVCACHE_BACKWARD(gradient, shape) if needed and gradient is not None else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


def _wants_gradient(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _kvcache_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if _wants_gradient(args):
        return _KVCacheAttention.apply(*args)
    return below_autograd(KVCACHE, *args)


LIBRARY.impl("kv_cache_append", _append, "CompositeExplicitAutograd")
LIBRARY.impl("kv_cache_append", _append_in_place, "ADInplaceOrView", with_keyset=True)
LIBRARY.impl("attention_kvcache", _kvcache, "CompositeExplicitAutograd")
LIBRARY.impl("attention_kvcache", _kvcache_autograd, "Autograd")
LIBRARY.impl("attention_kvcache_backward", _kvcache_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::kv_cache_append", lambda *_: None, lib=LIBRARY)
torch.library.register_fake(
    "fastattn::attention_kvcache", lambda *args: cache_results(*unflatten(CacheCall, args)), lib=LIBRARY
)
torch.library.register_fake(
    "fastattn::attention_kvcache_backward", lambda gradient, shape: gradient.new_empty(shape), lib=LIBRARY
)
