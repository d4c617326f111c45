"""The operator as PyTorch knows it: schemas, fakes, autograd.

Only this file and activate.py know about dispatch keys.

``fastattn::attention_forward`` and ``fastattn::attention_backward`` allocate the results and let a backend's
``attention_forward`` / ``attention_backward`` fill them; all backends have the same two signatures. Autograd sits on
the Autograd key of the forward operator, below it the operators are opaque to torch.compile.

``fastattn::attention_double_backward`` serves second derivatives and derivatives along a direction (forward mode), for
every backend: it is always the reference's.
"""

import contextlib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from fastattn.spec import AttentionSpec, known

_LIBRARY = Library("fastattn", "DEF")
_OPTIONS = "SymInt? left, SymInt? right, SymInt? q_offset, float scale, float? softcap, float dropout_p, str backend"
_SCORES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_offset_tensor, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor[] block_mask"
)
_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_SCORES}, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SCORES}, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_double_backward(Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tslopes, Tensor? tsinks, "
    f"Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_SCORES}, {_OPTIONS}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_FORWARD = torch.ops.fastattn.attention_forward.default
_BACKWARD = torch.ops.fastattn.attention_backward.default
_DOUBLE_BACKWARD = torch.ops.fastattn.attention_double_backward.default


def _implementation(backend: str, direction: str) -> ModuleType:
    """The module that holds a backend's function, imported when first used."""
    if backend == "reference":
        return importlib.import_module("fastattn.backends.reference")
    if backend == "cuda":
        return importlib.import_module("fastattn.backends.cuda")
    return importlib.import_module(f"fastattn.kernels.{direction}")


def _empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised (B, H, L, D), stored as (B, L, H, D) where ``like`` is, so that merging heads stays a view."""
    batch, heads, length, dim = shape
    if heads > 1 and like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty(shape)


def _forward_buffers(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_heads(q, (batch, heads, length, v.shape[3])), q.new_empty((batch, heads, length), dtype=lse_dtype)


def _clear_unused(packed: Tensor | None, zero: tuple[Tensor, ...], lse: Tensor | None = None) -> None:
    """Rows behind the last of the packed sequences belong to none: nobody else writes them."""
    if packed is not None:
        for tensor in zero:
            tensor.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)


def _backward_buffers(
    q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor | None, ...], wanted: list[bool]
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and the gradients of ``operands``: an operator cannot return None, so empty where not wanted."""
    dq, dk, dv = (_empty_heads(t, t.shape) for t in (q, k, v))
    others = (
        x.new_empty(x.shape) if x is not None and want else q.new_empty(0)
        for x, want in zip(operands, wanted, strict=True)
    )
    return dq, dk, dv, *others


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The spec has cast what autocast casts: what a backend computes in float32 must stay there."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # which raises for meta
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *operands, left, right, q_offset, scale, softcap, dropout_p, backend = args
    out, lse = _forward_buffers(q, v)
    _clear_unused(operands[6], (out,), lse)
    with without_autocast(q.device):
        _implementation(backend, "forward").attention_forward(
            out, lse, q, k, v, *operands,
            left=left, right=right, q_offset=q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p,
        )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *operands, left, right, q_offset, scale, softcap, dropout_p, backend, wanted = args
    gradients = _backward_buffers(q, k, v, tuple(operands[1:4]), wanted)
    _clear_unused(operands[6], gradients[:3])
    fill = [*gradients[:3], *(g if want else None for g, want in zip(gradients[3:], wanted, strict=True))]
    with without_autocast(q.device):
        _implementation(backend, "backward").attention_backward(
            *fill, dout, dlse, q, k, v, out, lse, *operands,
            left=left, right=right, q_offset=q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p,
        )  # fmt: skip
    return gradients


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _forward_buffers(q, v)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _backward_buffers(q, k, v, args[1:4], args[-1])


def _double_buffers(
    dout: Tensor | None, q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor | None, ...], wanted: list[bool]
) -> tuple[Tensor, ...]:
    """tout, tlse, dq, dk, dv, and the gradients of ``operands``: empty where not wanted."""
    results = (
        q.new_empty(0) if x is None or dout is None or not want else empty(x, x.shape)
        for x, want, empty in zip(
            (q, k, v, *operands), wanted, (_empty_heads,) * 3 + (Tensor.new_empty,) * 3, strict=True
        )
    )
    return *_forward_buffers(q, v), *results


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    direction, (dout, dlse, q, k, v), rest = args[:6], args[6:11], args[11:]
    *operands, left, right, q_offset, scale, softcap, dropout_p, _, wanted = rest
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for t, x in zip(direction[:3], (q, k, v), strict=True))
    results = _double_buffers(dout, q, k, v, tuple(operands[1:4]), wanted)
    tout, tlse, *gradients = results
    _clear_unused(operands[6], results[:5])
    fill = (g if want and dout is not None else None for g, want in zip(gradients, wanted, strict=True))
    with without_autocast(q.device):
        importlib.import_module("fastattn.backends.reference").attention_double_backward(
            tout, tlse, *fill, tq, tk, tv, *direction[3:], dout, dlse, q, k, v, *operands,
            left=left, right=right, q_offset=q_offset, scale=scale, softcap=softcap, dropout_p=dropout_p,
        )  # fmt: skip
    return results


def _double_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[8:11]
    return _double_buffers(args[6], q, k, v, tuple(args[12:15]), args[-1])


def _forward_mode() -> bool:
    """Whether a tensor may carry a derivative along a direction."""
    return forward_ad._current_level >= 0


def _differentiating() -> bool:
    """Whether something may be differentiated through what a derivative computes."""
    return torch.is_grad_enabled() or _forward_mode() or torch._C._are_functorch_transforms_active()


def _below_autograd(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _second_order(*args: Any) -> tuple[Tensor, ...]:
    """`_DOUBLE_BACKWARD`, on the graph only where there may be one."""
    if _differentiating():
        return _AttentionSecond.apply(*args)
    return _below_autograd(_DOUBLE_BACKWARD, *args)


def _first_order(*args: Any) -> tuple[Tensor, ...]:
    """`_BACKWARD`, on the graph only where there may be one."""
    if _differentiating():  # create_graph=True
        return _AttentionBackward.apply(*args)
    return _below_autograd(_BACKWARD, *args)


class _Vmapped(torch.autograd.Function):
    """`torch.func.vmap` by one call after the other: operands such as sinks have no batch dimension to merge with."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        calls = [
            cls.apply(
                *(
                    x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        results = tuple(torch.stack(x) for x in zip(*calls, strict=True))
        return results, (0,) * len(results)


class _Attention(_Vmapped):
    """The derivatives of the forward operator, outputs (out, lse)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _below_autograd(_FORWARD, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:11], *output)
        if _forward_mode():
            ctx.save_for_forward(*inputs[:11], *output)
        ctx.options = inputs[11:]
        ctx.set_materialize_grads(False)  # a gradient through lse costs nothing where there is none

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *operands, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        if dout is None:
            dout = torch.zeros_like(out)
        wanted = tuple(ctx.needs_input_grad[4:7])  # bias, alibi_slopes, sinks
        gradients = _first_order(dout, dlse, q, k, v, out.detach(), lse.detach(), *operands, *ctx.options, wanted)
        dq, dk, dv, *others = gradients
        others = [gradient if want else None for gradient, want in zip(others, wanted, strict=True)]
        return dq, dk, dv, None, *others, *(None,) * (len(ctx.needs_input_grad) - 7)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *operands, _, _ = ctx.saved_tensors
        direction = (*tangents[:3], *tangents[4:7])
        arguments = (*direction, None, None, q, k, v, *operands, *ctx.options)
        return _second_order(*arguments, (False,) * 6)[:2]


class _AttentionBackward(_Vmapped):
    """The derivatives of the backward operator, outputs (dq, dk, dv, dbias, dslopes, dsinks).

    out and lse, which the forward pass stored, count as constants: the formulas know what they depend on.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _below_autograd(_BACKWARD, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:15])
        if _forward_mode():
            ctx.save_for_forward(*inputs[:15])
        ctx.options, ctx.wanted = inputs[15:-1], inputs[-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *direction: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dout, dlse, q, k, v, _, _, *operands = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if all(x is None for x in direction):
            return (None,) * len(needed)
        # Not asked for: the gradient is an empty tensor, and what comes in for it is nothing.
        given = (*direction[:3], *(x if w else None for x, w in zip(direction[3:], ctx.wanted, strict=True)))
        wanted = (*needed[2:5], *needed[8:11])
        results = _second_order(*given, dout, dlse, q, k, v, *operands, *ctx.options, wanted)
        tout, tlse, *others = results
        dq, dk, dv, *others = (x if want else None for x, want in zip(others, wanted, strict=True))
        return (
            tout, None if dlse is None else tlse, dq, dk, dv, None, None, None, *others, *(None,) * (len(needed) - 11)
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The Hessian is symmetric: its product with the direction, and the gradients for the changes of dout, dlse."""
        dout, dlse, q, k, v, out, lse, *operands = ctx.saved_tensors
        direction = (*tangents[2:5], *tangents[8:11])
        arguments = (dout, dlse, q, k, v, *operands, *ctx.options)
        _, _, *results = _second_order(*direction, *arguments, (True, True, True, *ctx.wanted))
        if tangents[0] is not None or tangents[1] is not None:
            tdout = torch.zeros_like(out) if tangents[0] is None else tangents[0]
            more = _first_order(tdout, tangents[1], q, k, v, out, lse, *operands, *ctx.options, ctx.wanted)
            results = [x + y for x, y in zip(results, more, strict=True)]
        return tuple(results)


class _AttentionSecond(_Vmapped):
    """The derivative of a derivative along a direction, where it is one; beyond, an error.

    An error when asked, and not results off the graph: a further derivative would silently take them for constants.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _below_autograd(_DOUBLE_BACKWARD, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:19])
        ctx.options = inputs[19:-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, tout: Tensor | None, tlse: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        direction, (dout, _, q, k, v), operands = saved[:6], saved[6:11], saved[11:]
        needed = ctx.needs_input_grad
        if dout is not None:
            raise RuntimeError(_THRICE)
        if tout is None and tlse is None:
            return (None,) * len(needed)
        arguments = (*operands, *ctx.options)
        if tout is None:
            tout = q.new_zeros((*q.shape[:3], v.shape[3]))
        with torch.no_grad():  # constants there
            out, lse = _Attention.apply(q, k, v, *arguments)
        direct = _first_order(tout, tlse, q, k, v, out, lse, *arguments, tuple(needed[3:6]))
        wanted = (*needed[8:11], *needed[12:15])
        _, _, *results = _second_order(*direction, tout, tlse, q, k, v, *arguments, wanted)
        dq, dk, dv, *learned = (x if want else None for x, want in zip(results, wanted, strict=True))
        through = (x if need else None for x, need in zip(direct, needed[:6], strict=True))
        return *through, None, None, dq, dk, dv, None, *learned, *(None,) * (len(needed) - 15)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(_FORWARD_TWICE)


_THRICE = "fastattn: attention can be differentiated twice, not three times; fastattn.reference.attention can"
_FORWARD_TWICE = (
    "fastattn: a derivative of attention along a direction has none along another; "
    "fastattn.reference.attention has, or differentiate backward (torch.autograd.grad, torch.func.grad) instead"
)


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if _forward_mode() or (
        torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args[:7])
    ):
        # Function.apply looks at the signature and for transforms first, each time; `attention` has.
        return super(torch.autograd.Function, _Attention).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
    return _below_autograd(_FORWARD, *args)


_LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_double_backward", _double_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_forward", _forward_autograd, "Autograd")
torch.library.register_fake("fastattn::attention_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fastattn::attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("fastattn::attention_double_backward", _double_backward_fake, lib=_LIBRARY)


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from the device's default generator: no synchronisation, safe under CUDA graphs and checkpointing."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def operator_arguments(spec: AttentionSpec, backend: str, seed: Tensor | None) -> tuple[Any, ...]:
    """What the forward operator takes; those of the backward operator end in the same, but for q, k and v."""
    return (
        spec.q, spec.k, spec.v, spec.mask, spec.bias, spec.alibi_slopes, spec.sinks, spec.q_offset_tensor, seed,
        spec.cu_seqlens_q, spec.cu_seqlens_k, [] if spec.block_mask is None else list(spec.block_mask.tensors),
        spec.left, spec.right, spec.q_offset, spec.scale, spec.softcap, spec.dropout_p, backend,
    )  # fmt: skip


def attention(spec: AttentionSpec, backend: str) -> tuple[Tensor, Tensor | None]:
    """Run ``spec`` on a backend that can serve it; lse is None from the torch backend."""
    if backend == "torch":
        if spec.bias is None:  # all else has been cast: nothing is left for autocast to change
            return _torch_attention(spec), None
        with without_autocast(spec.q.device):
            return _torch_attention(spec), None
    seed = draw_seed(spec.q.device) if spec.dropout_p > 0.0 else None
    # Tracing sees the operator; torch.func sees a Function, which it knows how to transform.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return (_Attention.apply if transformed else _FORWARD)(*operator_arguments(spec, backend, seed))


def _torch_attention(spec: AttentionSpec) -> Tensor:
    """PyTorch's own kernel, for specs that `backends` found it to compute exactly."""
    q, k, v, attn_mask, bias, _, _, _, _, right, _, scale, *_ = spec
    if bias is not None:
        # Its mask has the query's precision, or float32 beside half precision.
        bias = bias.to(q.dtype if q.dtype.itemsize >= 4 else torch.float32)
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)
    _, q_heads, _, head_dim = q.shape
    _, kv_heads, _, v_dim = v.shape
    if head_dim != v_dim:  # it wants one head dim: zero columns change neither scores nor outputs
        width = max(head_dim, v_dim)
        q, k, v = (pad(t, (0, width - t.shape[3])) for t in (q, k, v))
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:  # would take its slow path
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    grouped = False
    if q_heads != kv_heads:  # a branch, because traced sizes compare to a symbol and not to a bool
        grouped = True
    out = torch_sdpa(q, k, v, attn_mask, 0.0, right is not None, scale=scale, enable_gqa=grouped)
    return out if head_dim == v_dim else out[..., :v_dim]


# The KV cache: two more operators, and one that raises where a gradient is asked for. The new entries k and v take part
# in `attention_kvcache` only so that asking for their gradient raises too; they are in the cache already.

_LIBRARY.define(
    "kv_cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lens, Tensor? block_table, "
    "str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor lens, Tensor? block_table, SymInt added, SymInt? length, SymInt? left, SymInt? right, "
    "float scale, float? softcap, SymInt? num_splits, str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_kvcache_backward(Tensor gradient, SymInt[] shape) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_APPEND = torch.ops.fastattn.kv_cache_append.default
_KVCACHE = torch.ops.fastattn.attention_kvcache.default
_KVCACHE_BACKWARD = torch.ops.fastattn.attention_kvcache_backward.default


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None, backend: str
) -> None:
    _implementation(backend, "decode").kv_cache_append(k_cache, v_cache, k, v, lens, block_table)


def _append_in_place(keys: torch.DispatchKeySet, k_cache: Tensor, v_cache: Tensor, *args: Any) -> None:
    """Let autograd know that the caches have changed, for whoever saved them."""
    torch.autograd.graph.increment_version((k_cache, v_cache))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _APPEND.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, k_cache, v_cache, *args)


def _kvcache_buffers(q: Tensor, v_cache: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = _forward_buffers(q, v_cache)
    return out, q.new_empty(0, dtype=lse.dtype) if backend == "torch" else lse  # which has no lse


def _cached_spec(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | None, right: int | None, scale: float
) -> AttentionSpec:
    """Attention to the first ``length`` entries of contiguous caches."""
    keys, values = (cache[:, :length].transpose(1, 2) for cache in (k_cache, v_cache))
    return AttentionSpec(
        q, keys, values, mask=None, bias=None, alibi_slopes=None, sinks=None, q_offset_tensor=None, left=None,
        right=right, q_offset=0, scale=scale, softcap=None, dropout_p=0.0, return_lse=False,
    )  # fmt: skip


def _kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, lens: Tensor, block_table: Tensor | None, added: int, length: int | None, left: int | None,
    right: int | None, scale: float, softcap: float | None, num_splits: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _kvcache_buffers(q, v_cache, backend)
    with without_autocast(q.device):
        if backend == "torch":
            out.copy_(_torch_attention(_cached_spec(q, k_cache, v_cache, length, right, scale)))
        else:
            _implementation(backend, "decode").attention_kvcache(
                out, lse, q, k_cache, v_cache, lens, block_table, alibi_slopes, sinks, added=added, length=length,
                left=left, right=right, scale=scale, softcap=softcap, num_splits=num_splits,
            )  # fmt: skip
    return out, lse


def _kvcache_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _kvcache_buffers(q, v_cache, args[-1])


def _kvcache_backward(gradient: Tensor, shape: list[int]) -> Tensor:
    raise RuntimeError(
        "fastattn: attention_with_kvcache has no gradient; call it under torch.no_grad(), and train with "
        "fastattn.attention"
    )


class _KVCacheAttention(torch.autograd.Function):
    """Results on a graph that raises when something is differentiated through them.

    Through an operator, so that a compiled step raises when its backward runs and not when it is traced.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.shapes = [x.shape if isinstance(x, Tensor) else None for x in args]
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return _KVCACHE(*args)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient = dlse if dout is None else dout
        return tuple(
            _KVCACHE_BACKWARD(gradient, shape) if needed and gradient is not None else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


def _wants_gradient(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _kvcache_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if _wants_gradient(*args[:7]):
        return _KVCacheAttention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _KVCACHE(*args)


_LIBRARY.impl("kv_cache_append", _append, "CompositeExplicitAutograd")
_LIBRARY.impl("kv_cache_append", _append_in_place, "ADInplaceOrView", with_keyset=True)
_LIBRARY.impl("attention_kvcache", _kvcache, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_kvcache", _kvcache_autograd, "Autograd")
_LIBRARY.impl("attention_kvcache_backward", _kvcache_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::kv_cache_append", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("fastattn::attention_kvcache", _kvcache_fake, lib=_LIBRARY)
torch.library.register_fake(
    "fastattn::attention_kvcache_backward", lambda gradient, shape: gradient.new_empty(shape), lib=_LIBRARY
)


# In eager mode PyTorch's own functions are called as they are: on a CPU an operator of ours would cost a decode step as
# much again as the attention in it.


def kv_cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor, block_table: Tensor | None, backend: str
) -> None:
    """Write new entries into the caches, in place; the torch backend has the reference's way of doing so."""
    if backend == "torch" and not torch.compiler.is_compiling():
        return _append(k_cache, v_cache, k, v, lens, block_table, "reference")
    return _APPEND(k_cache, v_cache, k, v, lens, block_table, "reference" if backend == "torch" else backend)


def attention_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    """Output and lse; the torch backend has no lse. The arguments are those of the operator."""
    *tensors, added, length, left, right, scale, softcap, _splits, backend = args
    if _wants_gradient(q, k_cache, v_cache, *tensors):
        return _KVCACHE(q, k_cache, v_cache, *args)
    k, v, alibi_slopes, sinks, *_ = tensors
    if k is not None and length is not None and known(length == added) and known(added == q.shape[2]):
        # The cache was empty: a prompt, which is attention among its own tokens, for kernels with taller tiles.
        spec = AttentionSpec(
            q, k, v, mask=None, bias=None, alibi_slopes=alibi_slopes, sinks=sinks, q_offset_tensor=None, left=left,
            right=right, q_offset=0, scale=scale, softcap=softcap, dropout_p=0.0, return_lse=False,
        )  # fmt: skip
        with without_autocast(q.device):
            return attention(spec, backend)
    if backend == "torch" and not torch.compiler.is_compiling():
        with without_autocast(q.device):
            return _torch_attention(_cached_spec(q, k_cache, v_cache, length, right, scale)), None
    return _KVCACHE(q, k_cache, v_cache, *args)
