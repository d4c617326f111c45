"""PyTorch's flash attention on fastattn's kernels, through torch's own registry of implementations.

`torch.nn.attention` lets a package replace the flash kernels behind `F.scaled_dot_product_attention`,
``torch.nn.MultiheadAttention`` and ``varlen_attn``. Importing this module replaces nothing: `activate` does, and
`deactivate` undoes it.

Three contracts are PyTorch's and differ from `fastattn.attention`:

- Causal is bottom-right in the CUDA operators (with SDPA's ``is_causal``, which is top-left, PyTorch calls them for
  square scores only; ``causal_lower_right`` calls them for all) and top-left in the CPU operator.
- The CUDA operators return the random state of dropout for their backward pass; ours is the seed. The CPU operator
  returns none.

The CUDA table has run on CPU tensors in the tests, not yet on a GPU.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library

from fastattn import backends, ops
from fastattn.functional import divided
from fastattn.functional.attention import Backend
from fastattn.spec import AttentionSpec, make_cache_spec, make_spec

_NAME = "fastattn"
_FUNCTIONS = (
    "register_flash_attention_impl", "activate_flash_attention_impl", "restore_flash_attention_impl",
    "current_flash_attention_impl",
)  # fmt: skip


class _Flash:
    """PyTorch's flash operators, with their signatures and layouts, on a backend."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend

    def tables(self) -> dict[str, dict[str, Callable[..., Any]]]:
        """Dispatch key -> operator -> kernel. On CPU fastattn's own default is PyTorch's kernel: it stays."""
        cuda: dict[str, Callable[..., Any]] = {
            "_scaled_dot_product_flash_attention": self.sdpa,
            "_scaled_dot_product_flash_attention_backward": self.sdpa_backward,
            "_flash_attention_forward": self.forward,
            "_flash_attention_backward": self.backward,
        }
        if hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):  # not in torch 2.11
            cuda["_flash_attention_forward_no_dropout_inplace"] = self.forward_out
        cpu: dict[str, Callable[..., Any]] = {
            "_scaled_dot_product_flash_attention_for_cpu": self.sdpa_cpu,
            "_scaled_dot_product_flash_attention_for_cpu_backward": self.sdpa_cpu_backward,
        }
        return {"CUDA": cuda} if self.backend is None else {"CUDA": cuda, "CPU": cpu}

    def _forward(self, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor | None]:
        divided.refuse("query", "PyTorch's function under fastattn.activate(); call fastattn's own")
        seed = ops.draw_seed(spec.q.device) if spec.dropout_p > 0.0 else None
        call = ops.Forward(
            spec.q, spec.k, spec.v, spec.operands(seed), spec.options, backends.choose(spec, self.backend)
        )
        out, lse, _ = torch.ops.fastattn.attention_forward(*ops.flatten(call))
        return out, lse, seed

    def _backward(
        self, spec: AttentionSpec, dout: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        backend = backends.choose(spec, self.backend)
        operands = spec.operands(seed)
        statistics = backends.statistics_of(lse, operands, backend)
        call = ops.Backward(
            dout, None, spec.q, spec.k, spec.v, out, statistics, operands, spec.options, backend, [False] * 3
        )
        dq, dk, dv, *_ = torch.ops.fastattn.attention_backward(*ops.flatten(call))
        return dq, dk, dv

    # (B, H, L, D), CUDA

    def sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        _refuse(return_debug_mask=return_debug_mask)
        out, lse, seed = self._forward(_spec(query, key, value, dropout_p, scale, causal=is_causal))
        state, unused = _random_state(seed, query.device)
        out = _stored_like(out, query)
        return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)

    def sdpa_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
        philox_seed: Tensor, philox_offset: Tensor, *, scale: float | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        spec = _spec(query, key, value, dropout_p, scale, causal=is_causal)
        gradients = self._backward(spec, grad_out, out, logsumexp, _seed(philox_seed, dropout_p))
        return tuple(map(_stored_like, gradients, (query, key, value)))

    # (B, L, H, D), or (total, H, D) with cum_seq, CUDA

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None,
        max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
        seqused_k: Tensor | None = None, alibi_slopes: Tensor | None = None, block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        _refuse(return_debug_mask=return_debug_mask)
        window = _window(window_size_left, window_size_right)
        unknown_backward = {"seqused_k": seqused_k, "alibi_slopes": alibi_slopes, "block_table": block_table}
        _refuse_gradients(unknown_backward, query, key, value)
        if block_table is not None or (cum_seq_q is None and seqused_k is not None):
            out, lse = self._cached(
                query, key, value, cum_seq_q, seqused_k, dropout_p, scale=scale, causal=is_causal, window=window,
                block_table=block_table, alibi_slopes=alibi_slopes, num_splits=num_splits or None,
            )  # fmt: skip
            return _stored_like(out, query), lse, *_random_state(None, query.device), query.new_empty(0)
        if cum_seq_q is not None and cum_seq_k is None:
            raise ValueError("cum_seq_k: expected a Tensor, since the keys are packed without a block_table, got None")
        # num_splits applies to the keys of a cache only: the kernel for long sequences never splits.
        q, k, v = _heads_first(cum_seq_q, query, key, value)
        spec = _spec(
            q, k, v, dropout_p, scale, causal=is_causal, window=window, cu_seqlens_q=cum_seq_q,
            cu_seqlens_k=cum_seq_k, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
        )  # fmt: skip
        out, lse, seed = self._forward(spec)
        out = _stored_like(_heads_last(cum_seq_q, out), query)
        return out, lse if cum_seq_q is None else lse[0], *_random_state(seed, query.device), query.new_empty(0)

    def _cached(
        self, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, seqused_k: Tensor | None,
        dropout_p: float, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keys and values in pages, or (B, Lk, H, D) with a length each: out in the layout of the query, and lse."""
        _refuse(dropout_p=dropout_p)
        divided.refuse("key", "PyTorch's function under fastattn.activate()")
        if seqused_k is None:
            raise ValueError("seqused_k: expected how many keys each sequence has in its block_table, got None")
        q = query.transpose(1, 2) if cum_seq_q is None else query
        with ops.without_autocast(query.device):
            spec = make_cache_spec(
                q, key, value, cache_lens=seqused_k, cu_seqlens_q=cum_seq_q, return_lse=True, **options
            )  # fmt: skip
        out, lse = ops.attention_kvcache(spec, backends.choose(spec, self.backend))
        assert lse is not None  # the spec asks for it
        return _heads_last(cum_seq_q, out), lse if cum_seq_q is None else lse[0]

    def forward_out(self, out: Tensor, *args: Any, **options: Any) -> Tensor:
        result, lse, *_ = self.forward(*args, **options)
        out.copy_(result)
        return lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
        rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q, k, v, out, grad_out = _heads_first(cum_seq_q, query, key, value, out, grad_out)
        spec = _spec(
            q, k, v, dropout_p, scale, causal=is_causal, window=_window(window_size_left, window_size_right),
            cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k,
        )  # fmt: skip
        lse = logsumexp if cum_seq_q is None else logsumexp[None]
        gradients = self._backward(spec, grad_out, out, lse, _seed(rng_state, dropout_p))
        return tuple(
            _stored_like(_heads_last(cum_seq_q, g), x) for g, x in zip(gradients, (query, key, value), strict=True)
        )

    # (B, H, L, D), CPU

    def sdpa_cpu(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _refuse(dropout_p=dropout_p)
        spec = _spec(query, key, value, 0.0, scale, causal=is_causal, q_offset=0, **_operand(attn_mask))
        out, lse, _ = self._forward(spec)
        return _stored_like(out, query), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def sdpa_cpu_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        spec = _spec(query, key, value, 0.0, scale, causal=is_causal, q_offset=0, **_operand(attn_mask))
        gradients = self._backward(spec, grad_out, out, logsumexp)
        return tuple(g.transpose(1, 2).contiguous().transpose(1, 2) for g in gradients)


def _spec(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, **options: Any) -> AttentionSpec:
    """The spec of a call. Autocast has already run. Asking for lse keeps PyTorch's kernel from calling itself."""
    with ops.without_autocast(q.device):
        return make_spec(
            q, k, v, dropout_p=dropout_p, scale=scale, return_lse=True,
            names=("query", "key", "value", "attn_mask", "attn_mask", "is_causal"), **options,
        )  # fmt: skip


def _operand(attn_mask: Tensor | None) -> dict[str, Tensor | None]:
    return {"mask" if attn_mask is not None and attn_mask.dtype == torch.bool else "bias": attn_mask}


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if isinstance(value, Tensor) or value:
            raise ValueError(
                f"{name}: expected none while fastattn serves PyTorch's flash attention, got "
                f"{'a Tensor' if isinstance(value, Tensor) else value}; fastattn.deactivate() brings PyTorch's back"
            )


def _refuse_gradients(operands: dict[str, Tensor | None], *inputs: Tensor) -> None:
    """Refuse gradients with arguments that PyTorch gives to its forward operator but not to the backward operator."""
    given = [name for name, operand in operands.items() if operand is not None]
    if given and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(
            f"{given[0]}: expected none where a gradient is asked for, since PyTorch's backward operator does not get "
            f"it, got a Tensor; call fastattn's own function, or this one under torch.no_grad()"
        )


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None]:
    """-1 is open."""
    return None if left == -1 else left, None if right == -1 else right


def _heads_first(packed: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) if packed is None else x.transpose(0, 1)[None] for x in tensors]


def _heads_last(packed: Tensor | None, x: Tensor) -> Tensor:
    return x.transpose(1, 2) if packed is None else x[0].transpose(0, 1)


def _stored_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x with the strides that tracing promised."""
    result = torch.empty_like(like)
    return x if x.stride() == result.stride() else result.copy_(x)


def _random_state(seed: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The seed, in the shapes and dtypes of the seed and offset of PyTorch's kernels."""
    seed = torch.zeros(1, dtype=torch.int64, device=device) if seed is None else seed
    if torch.version.hip is not None:
        return seed[0], torch.zeros_like(seed[0])
    return torch.cat((seed, torch.zeros_like(seed))).view(torch.uint64), torch.zeros_like(seed[0]).view(torch.uint64)


def _seed(state: Tensor, dropout_p: float) -> Tensor | None:
    return state.view(torch.int64).reshape(-1)[:1] if dropout_p > 0.0 else None


class _Override:
    """The kernels in PyTorch's dispatcher. torch's registry keeps this object and removes it."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self._libraries: list[Library] = []
        with warnings.catch_warnings():  # the caller asked for the override
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
            for key, table in _Flash(backend).tables().items():
                library = Library("aten", "IMPL", key)
                self._libraries.append(library)
                for name, kernel in table.items():
                    library.impl(name, kernel, key)

    def remove(self) -> None:
        self._libraries.clear()


_backend: str | None = None  # of the last activation
_foreign: str | None = None  # the implementation that was active before ours


def _registry() -> ModuleType:
    missing = [name for name in _FUNCTIONS if not hasattr(torch.nn.attention, name)]
    if missing:
        raise RuntimeError(
            f"fastattn.activate: expected torch.nn.attention's registry of flash implementations (torch 2.11), torch "
            f"{torch.__version__} has no {', '.join(missing)}; fastattn.convert(model) swaps the layers instead"
        )
    return torch.nn.attention


def _switch(name: str | None, backend: str | None, foreign: str | None) -> None:
    """Make ``name`` the active implementation; None means PyTorch's own."""
    global _backend, _foreign
    registry = _registry()
    if name == _NAME:
        registry.register_flash_attention_impl(_NAME, register_fn=functools.partial(_Override, backend))
    if name is not None:
        registry.activate_flash_attention_impl(name)
    elif registry.current_flash_attention_impl() is not None:
        registry.restore_flash_attention_impl()
    _backend, _foreign = backend, foreign


def activate(*, backend: Backend | None = None) -> contextlib.AbstractContextManager[object]:
    """Serve PyTorch's flash attention with fastattn, in the whole process, until `deactivate`.

    fastattn's kernels then serve every call that PyTorch sends to its flash kernels:
    `F.scaled_dot_product_attention` without a mask in half precision on a GPU, and through it
    ``torch.nn.MultiheadAttention(need_weights=False)`` and the Transformer layers in training; and
    ``torch.nn.attention.varlen.varlen_attn``, over pages too. PyTorch still decides which calls these are;
    ``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` forces the choice. Run backward passes before the
    activation ends.

    The kernels for CUDA have not yet run on a GPU.

    Args:
        backend: as in `attention`, but not ``"torch"``, which this replaces. None chooses as `explain` shows; on CPU
            that is PyTorch's kernel, which then stays. A named backend also serves CPU tensors.

    Returns:
        A context manager, for ``with fastattn.activate():``. Its end restores the previous implementation. Without
        ``with``, ignore it.

    Raises:
        RuntimeError: this version of torch has no such registry.
        ValueError: the backend does not exist. A call under activation raises if the backend cannot serve it, or if it
            asks for gradients with ``seqused_k``, ``block_table`` or ``alibi_slopes``, which PyTorch does not pass to
            its backward operator.
    """
    if backend not in (None, "triton", "cuda", "reference"):
        raise ValueError(f"backend: expected 'triton', 'cuda', 'reference' or None, got {backend!r}")
    before = (_registry().current_flash_attention_impl(), _backend, _foreign)
    _switch(_NAME, backend, _foreign if before[0] == _NAME else before[0])
    end = contextlib.ExitStack()
    end.callback(_switch, *before)
    return end


def deactivate() -> None:
    """Undo all calls of `activate`: restore the implementation that was active before the first one.

    Raises:
        RuntimeError: fastattn is not active.
    """
    if (current := _registry().current_flash_attention_impl()) != _NAME:
        raise RuntimeError(f"fastattn.deactivate: fastattn is not active, torch's registry has {current!r}")
    _switch(_foreign, None, None)
