"""Attention over a KV cache, as inference needs it: the public function, its validation and its choice of a backend."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastattn import backends, ops
from fastattn.functional.attention import Backend
from fastattn.spec import FLOAT_DTYPES, _check_head_vector, _check_window, known

_INTEGERS = (torch.int32, torch.int64)
PAGE_MULTIPLE = 16
MAX_SPLITS = 1024


@overload
def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_lens: int | Tensor, block_table: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., softcap: float | None = ..., alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
    num_splits: int | None = ..., backend: Backend | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_lens: int | Tensor, block_table: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., softcap: float | None = ..., alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True],
    num_splits: int | None = ..., backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_lens: int | Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append ``k`` and ``v`` to a KV cache, then let ``q`` attend to what the cache holds. For inference.

    This is the one function of fastattn that modifies arguments: ``k`` and ``v`` are written into ``k_cache`` and
    ``v_cache`` in place, at positions ``cache_lens[b] .. cache_lens[b] + Lnew``. Batch entry b then has
    ``len_b = cache_lens[b] + Lnew`` keys; query i stands at position ``len_b - Lq + i`` and sees keys ``j < len_b`` as
    in `fastattn.attention`. A row that sees nothing gives output 0 and lse -inf (or the sink).

    Args:
        q: (B, Hq, Lq, D), Lq at least 1; float16, bfloat16, float32 or, on the torch and reference backends, float64;
            any strides.
        k_cache: (B, Lmax, Hk, D), or (pages, page_size, Hk, D) with a ``block_table``; dtype and device of q, any
            strides. Hq is a multiple of Hk. What lies beyond a length is never used and may be NaN.
        v_cache: the same with head dim Dv.
        k: (B, Hk, Lnew, D) new keys, or None to append nothing. Lnew may differ from Lq.
        v: (B, Hk, Lnew, Dv) new values; given where k is.
        cache_lens: tokens in the cache before appending: one int for all batch entries, or int32 or int64 (B,). It is
            not modified: the caller adds Lnew.
        block_table: int32 (B, max_pages): position p of entry b is in page ``block_table[b, p // page_size]``, at
            ``p % page_size``. page_size is a multiple of 16. Pages that are written to must belong to one entry only.
        causal, window, softcap, alibi_slopes, sinks, scale, return_lse: as in `fastattn.attention`.
        num_splits: into how many parts the Triton kernel divides the keys; None chooses from shapes and the number of
            multiprocessors. It changes rounding alone, and means nothing to other backends.
        backend: ``"triton"``, ``"torch"``, ``"reference"``; None chooses: on a GPU Triton, elsewhere PyTorch's kernel
            where all lengths are one number known on the host and it computes exactly the same, else the reference.

    Returns:
        out (B, Hq, Lq, Dv) in the dtype of q; with ``return_lse`` also lse (B, Hq, Lq) in float32 (float64 for
        float64 inputs), natural logarithm.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is written. Values
            of lengths and pages are checked where the host sees them (an int, tensors on the CPU), except under
            torch.compile. On a GPU they are not, since that would synchronise: new rows without a place in the cache
            are dropped, lengths and pages that are read are cut to what exists.
        RuntimeError: when a gradient is asked for through the result. There is none.

    Source: flash-decoding, Dao et al., 2023; PagedAttention, Kwon et al., 2023 (arXiv:2309.06180).
    """
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(device_type := q.device.type):
        dtype = torch.get_autocast_dtype(device_type)
        q = q.to(dtype) if q.dtype in FLOAT_DTYPES[:3] else q
        k, v = (t.to(dtype) if t is not None and t.dtype in FLOAT_DTYPES[:3] else t for t in (k, v))
    _check_caches(q, k_cache, v_cache, block_table)
    _check_new(q, k_cache, v_cache, k, v)
    batch, q_heads, q_len, head_dim = q.shape
    added = 0 if k is None else k.shape[2]
    page_size = k_cache.shape[1]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    if alibi_slopes is not None:
        _check_head_vector("alibi_slopes", alibi_slopes, q, ((q_heads,), (batch, q_heads)))
        alibi_slopes = alibi_slopes[None] if alibi_slopes.ndim == 1 else alibi_slopes
    if sinks is not None:
        _check_head_vector("sinks", sinks, q, ((q_heads,),))
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"softcap: expected a float or None, got {type(softcap).__name__}")
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    if scale is not None and (isinstance(scale, Tensor) or not hasattr(scale, "__float__")):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if num_splits is not None:
        if isinstance(num_splits, bool) or not isinstance(num_splits, int):
            raise TypeError(f"num_splits: expected an int or None, got {type(num_splits).__name__}")
        if not 1 <= num_splits <= MAX_SPLITS:
            raise ValueError(f"num_splits: expected 1 to {MAX_SPLITS} or None, got {num_splits}")
    left, right = (None, None) if window is None else _check_window(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    if right is not None and known(right >= q_len - 1):  # a side that forbids nothing, whatever the length, is open
        right = None
    if left is not None and known(left >= capacity - 1):
        left = None
    lens, length = _lengths(cache_lens, q, added, capacity, block_table, k_cache.shape[0])

    reasons: dict[str, Callable[[], list[str]]] = {
        "triton": lambda: _triton_reasons(q, v_cache),
        "cuda": lambda: ["it has no KV cache"],
        "torch": lambda: _torch_reasons(
            q, length, block_table, left, right, softcap, alibi_slopes, sinks, scale, capacity, return_lse
        ),
        "reference": list,
    }
    chosen = _choose(reasons, q.device.type, backend)
    if k is not None and v is not None:
        ops.kv_cache_append(k_cache, v_cache, k.detach(), v.detach(), lens, block_table, chosen)
    out, lse = ops.attention_kvcache(
        q, k_cache, v_cache, k, v, alibi_slopes, sinks, lens, block_table, added, length, left, right,
        float(head_dim**-0.5 if scale is None else scale), softcap, num_splits, chosen,
    )  # fmt: skip
    if not return_lse:
        return out
    assert lse is not None  # the torch backend, which has none, has refused
    return out, lse


def _check_tensor(name: str, x: Tensor, q: Tensor, layout: str) -> None:
    """A dense 4-D tensor of the dtype and on the device of ``q``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense strided tensor, got {kind}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions {layout}, got shape {tuple(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}.dtype: expected q.dtype == {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected q.device == {q.device}, got {x.device}")


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a Tensor, got {type(q).__name__}")
    _check_tensor("q", q, q, "(batch, heads, length, head_dim)")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q.dtype: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    layout = "(batch, length, heads, head_dim)" if block_table is None else "(pages, page_size, heads, head_dim)"
    _check_tensor("k_cache", k_cache, q, layout)
    _check_tensor("v_cache", v_cache, q, layout)
    if q.shape[2] < 1:
        raise ValueError(f"q.shape[2]: expected at least one query, got {q.shape[2]}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache.shape[:3]: expected k_cache.shape[:3] == {tuple(k_cache.shape[:3])}, "
            f"got {tuple(v_cache.shape[:3])}"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache.shape[3]: expected q.shape[3] == {q.shape[3]}, got {k_cache.shape[3]}")
    for name, tensor in (("q", q), ("v_cache", v_cache)):
        if tensor.shape[3] == 0:
            raise ValueError(f"{name}.shape[3]: expected at least 1, got 0")
    heads = k_cache.shape[2]
    if heads == 0 or q.shape[1] == 0 or q.shape[1] % heads != 0:
        raise ValueError(
            f"q.shape[1]: expected a positive multiple of k_cache.shape[2] == {heads} heads, got {q.shape[1]}"
        )
    if block_table is None:
        if k_cache.shape[0] != q.shape[0]:
            raise ValueError(f"k_cache.shape[0]: expected q.shape[0] == {q.shape[0]}, got {k_cache.shape[0]}")
        return
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table: expected a Tensor or None, got {type(block_table).__name__}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table.dtype: expected int32, got {block_table.dtype}")
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table.shape: expected (B, max_pages) with B == {q.shape[0]}, got {tuple(block_table.shape)}"
        )
    if block_table.device != q.device:
        raise ValueError(f"block_table.device: expected q.device == {q.device}, got {block_table.device}")
    if k_cache.shape[1] == 0 or k_cache.shape[1] % PAGE_MULTIPLE != 0:
        raise ValueError(
            f"k_cache.shape[1]: expected a page size that is a positive multiple of {PAGE_MULTIPLE}, "
            f"got {k_cache.shape[1]}"
        )


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    if k is None and v is None:
        return
    if k is None or v is None:
        raise ValueError(f"{'k' if k is None else 'v'}: expected k and v together or neither, got None")
    for name, x in (("k", k), ("v", v)):
        _check_tensor(name, x, q, "(batch, heads, length, head_dim)")
    batch, heads, new = q.shape[0], k_cache.shape[2], k.shape[2]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (batch, heads, new, cache.shape[3])
        if x.shape != expected:
            raise ValueError(f"{name}.shape: expected (B, Hk, Lnew, D) == {expected}, got {tuple(x.shape)}")
        if cache.requires_grad:
            raise ValueError(f"{name}_cache.requires_grad: expected False, since {name} is written into it in place")
        strides = cache.stride()
        if 0 in strides and any(step == 0 and size > 1 for step, size in zip(strides, cache.shape, strict=True)):
            raise ValueError(
                f"{name}_cache: expected every element in a place of its own, got strides {cache.stride()}"
            )


def _lengths(
    cache_lens: int | Tensor, q: Tensor, added: int, capacity: int, block_table: Tensor | None, pages: int
) -> tuple[Tensor, int | None]:
    """(cache_lens as a tensor, the one length of all batch entries after appending if the host knows it).

    Checks what can be known without waiting for a device.
    """
    batch = q.shape[0]
    tracing = torch.compiler.is_compiling()
    if not isinstance(cache_lens, Tensor):
        if isinstance(cache_lens, bool) or not isinstance(cache_lens, (int, torch.SymInt)):
            raise TypeError(f"cache_lens: expected an int or an integer tensor, got {type(cache_lens).__name__}")
        length = cache_lens + added
        if not tracing:
            _check_range([int(cache_lens)] * min(batch, 1), added, capacity)
            _check_pages([int(length)] * batch, block_table, pages, capacity)
        return torch.full((batch,), cache_lens, dtype=torch.int32, device=q.device), length
    if cache_lens.dtype not in _INTEGERS:
        raise TypeError(f"cache_lens.dtype: expected int32 or int64, got {cache_lens.dtype}")
    if cache_lens.shape != (batch,):
        raise ValueError(f"cache_lens.shape: expected (B,) == ({batch},), got {tuple(cache_lens.shape)}")
    if cache_lens.device != q.device:
        raise ValueError(f"cache_lens.device: expected q.device == {q.device}, got {cache_lens.device}")
    if tracing or cache_lens.device.type != "cpu":
        return cache_lens, None
    values = cache_lens.tolist()
    _check_range(values, added, capacity)
    lengths = [value + added for value in values]
    _check_pages(lengths, block_table, pages, capacity)
    return cache_lens, lengths[0] if len(set(lengths)) == 1 else None


def _check_range(values: Sequence[int], added: int, capacity: int) -> None:
    for entry, value in enumerate(values):
        if not 0 <= value <= capacity - added:
            raise ValueError(
                f"cache_lens: expected 0 to {capacity - added} (the cache holds {capacity}, {added} are appended), "
                f"got {value} for batch entry {entry}"
            )


def _check_pages(lengths: Sequence[int], block_table: Tensor | None, pages: int, capacity: int) -> None:
    """Every page that holds one of the first ``lengths[b]`` positions exists; the rest of the table may be anything."""
    if block_table is None or block_table.device.type != "cpu" or not lengths or capacity == 0:
        return
    page_size = capacity // block_table.shape[1]
    used = -(-torch.tensor(lengths) // page_size)
    bad = (torch.arange(block_table.shape[1]) < used[:, None]) & ((block_table < 0) | (block_table >= pages))
    if bad.any():
        entry, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages from 0 to {pages - 1}, got {int(block_table[entry, column])} at "
            f"[{entry}, {column}]"
        )


def _triton_reasons(q: Tensor, v_cache: Tensor) -> list[str]:
    reasons = []
    if backends._TRITON_MISSING:
        reasons.append("the triton package is not installed")
    device = q.device
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            reasons.append(f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}")
    elif not (device.type == "cpu" and backends._interpreting()):
        reasons.append(f"runs on CUDA and ROCm devices, the tensors are on {device.type!r}")
    if q.dtype == torch.float64:
        reasons.append("float64 is served by the torch and reference backends")
    if q.shape[3] > 256 or v_cache.shape[3] > 256:
        reasons.append(f"head dims up to 256, got D = {q.shape[3]}, Dv = {v_cache.shape[3]}")
    return reasons


def _torch_reasons(
    q: Tensor, length: int | None, block_table: Tensor | None, left: int | None, right: int | None,
    softcap: float | None, alibi_slopes: Tensor | None, sinks: Tensor | None, scale: float | None, capacity: int,
    return_lse: bool,
) -> list[str]:  # fmt: skip
    """What keeps PyTorch's kernel on a slice of the cache from computing exactly this."""
    reasons = []
    if block_table is not None:
        reasons.append("it has no block_table")
    if length is None:
        reasons.append("it needs one length for all batch entries, known on the host")
    elif length == 0 or q.numel() == 0:
        reasons.append("empty tensors")
    elif right == 0 and q.shape[2] != length:
        reasons.append("its causal mask is top-left only (Lq == 1 or Lq == length)")
    if left is not None or right not in (None, 0):
        reasons.append("it has no window")
    if right is not None and scale is not None and scale <= 0.0:
        reasons.append("it scales its causal mask too: NaN unless scale > 0")
    for name, term in (("softcap", softcap), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if term is not None:
            reasons.append(f"it has no {name}")
    if return_lse:
        reasons.append("it does not return lse")
    return reasons


def _choose(reasons: dict[str, Callable[[], list[str]]], device_type: str, backend: str | None) -> str:
    """As `backends.choose`: the backend asked for, or the first in order of preference that can."""
    if backend is None:
        preference = backends._PREFERENCE.get(device_type, backends._PREFERENCE_ELSEWHERE)
        return next(name for name in preference if not reasons[name]())
    if not isinstance(backend, str) or backend not in reasons:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, backends.BACKENDS))} or None, got {backend!r}")
    if found := reasons[backend]():
        raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(found)}")
    return backend
