"""What one attention call asks for, validated and normalised once; every backend reads only this."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.block_mask import BlockMask, check_block_mask

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_DTYPES = (torch.int32, torch.int64)
_FAR = 1 << 30  # positions are int32 in the kernels: sums of two such offsets and a length still fit


class AttentionSpec(NamedTuple):
    """One call. Sizes: batch B, query heads Hq, key heads Hk, lengths Lq and Lk, head dims D and Dv."""

    q: Tensor
    """(B, Hq, Lq, D); packed sequences, one behind the other, are one batch entry: (1, Hq, total, D)"""
    k: Tensor
    """(B, Hk, Lk, D), Hq a multiple of Hk"""
    v: Tensor
    """(B, Hk, Lk, Dv)"""
    mask: Tensor | None
    """bool, 4-D, broadcastable to (B, Hq, Lq, Lk); True takes part"""
    bias: Tensor | None
    """float, 4-D, broadcastable to (B, Hq, Lq, Lk); added to the scaled scores"""
    alibi_slopes: Tensor | None
    """float (1 or B, Hq); slope * |i + q_offset - j| is subtracted from the scores"""
    sinks: Tensor | None
    """float (Hq,); one more logit in each row's softmax, with no value"""
    q_offset_tensor: Tensor | None
    """int (B,), in place of q_offset"""
    left: int | None
    """Key j is visible to query i only if i + q_offset - left <= j <= i + q_offset + right; None is open."""
    right: int | None
    """0 is causal. None also where this side forbids nothing."""
    q_offset: int | None
    """None, for packed sequences only: the last query of each stands at its last key"""
    scale: float
    softcap: float | None
    dropout_p: float
    return_lse: bool
    cu_seqlens_q: Tensor | None = None
    """int32 (sequences + 1,): where each packed sequence begins in q, and the total; per batch entry then means per
    sequence"""
    cu_seqlens_k: Tensor | None = None
    block_mask: BlockMask | None = None
    """(B or 1, Hq or 1, Lq, Lk)"""

    @property
    def causal(self) -> bool:
        """Whether what is visible is the plain causal triangle."""
        return self.right == 0 and self.left is None

    @property
    def needs_dbias(self) -> bool:
        """Whether autograd will ask for the gradient of the bias."""
        return self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()


def make_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_mask: BlockMask | None = None,
    names: tuple[str, str, str, str, str, str] = ("q", "k", "v", "mask", "bias", "causal"),
) -> AttentionSpec:
    """Validate the arguments of `fastattn.attention`; with ``cu_seqlens_q`` and ``cu_seqlens_k`` packed sequences.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or range that does not fit; the text names the argument, what was expected and
            what came. ``names`` are what the caller calls q, k, v, mask, bias and causal.
    """
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(device_type := q.device.type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (t.to(dtype) if getattr(t, "dtype", None) in FLOAT_DTYPES[:3] else t for t in (q, k, v))
    _check_qkv(q, k, v, names[:3])
    batch, q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        cu_seqlens_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        cu_seqlens_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k.shape: expected cu_seqlens_q.shape == {tuple(cu_seqlens_q.shape)}, "
                f"got {tuple(cu_seqlens_k.shape)}"
            )
        batch = cu_seqlens_q.shape[0] - 1
    if mask is not None:
        mask = _score_operand(names[3], mask, q, kv_len, (torch.bool,))
    if bias is not None:
        bias = _score_operand(names[4], bias, q, kv_len, FLOAT_DTYPES)
    if block_mask is not None:
        block_mask = check_block_mask(block_mask, (batch, q_heads, q_len, kv_len), q.device)
    if alibi_slopes is not None:
        _check_head_vector("alibi_slopes", alibi_slopes, q, ((q_heads,), (batch, q_heads)))
        alibi_slopes = alibi_slopes[None] if alibi_slopes.ndim == 1 else alibi_slopes
    if sinks is not None:
        _check_head_vector("sinks", sinks, q, ((q_heads,),))
    offset_tensor = None
    if q_offset is None:
        q_offset = kv_len - q_len if cu_seqlens_q is None else None
    elif isinstance(q_offset, Tensor):
        offset_tensor, q_offset = _offset_tensor(q_offset, batch, q.device), 0
    elif isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise TypeError(f"q_offset: expected an int or an integer tensor, got {type(q_offset).__name__}")
    elif not -_FAR <= q_offset <= _FAR:
        raise ValueError(f"q_offset: expected at most 2**30 in size, got {q_offset}")
    elif q_offset == 0:
        q_offset = 0  # PyTorch's own order; a trace may ask for it, unlike for what follows from lengths
    if not isinstance(causal, bool):
        raise TypeError(f"{names[5]}: expected a bool, got {type(causal).__name__}")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {type(return_lse).__name__}")
    left, right = (None, None) if window is None else _check_window(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    if offset_tensor is None and q_offset is not None:  # a side that forbids nothing is open
        if right is not None and known(q_offset + right >= kv_len - 1):
            right = None
        if left is not None and known(q_len - 1 + q_offset - left <= 0):
            left = None
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a float in [0, 1], got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"softcap: expected a float or None, got {type(softcap).__name__}")
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    # Numbers first: those of a trace are symbolic and have no attributes to ask for.
    number = scale is None or isinstance(scale, (int, float))
    if not number and (isinstance(scale, Tensor) or not hasattr(scale, "__float__")):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")  # a tensor would lose its gradient
    scale = float(head_dim**-0.5 if scale is None else scale)
    return AttentionSpec(
        q, k, v, mask, bias, alibi_slopes, sinks, offset_tensor, left, right, q_offset, scale, softcap, dropout_p,
        return_lse, cu_seqlens_q, cu_seqlens_k, block_mask,
    )  # fmt: skip


def known(condition: bool) -> bool:
    """Whether it holds; in a trace, where lengths may be symbols, whether it holds for every length, so that nothing
    that only saves work ties the trace to the lengths it was made with."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """One quick look for the common case, which is every call of a training step; the reasons only if it fails."""
    try:
        batch, q_heads, _, head_dim = q.shape
        k_batch, kv_heads, kv_len, k_dim = k.shape
        v_batch, v_heads, v_len, v_dim = v.shape
        good = (
            batch == k_batch == v_batch
            and kv_heads == v_heads
            and kv_len == v_len
            and head_dim == k_dim
            and head_dim > 0
            and v_dim > 0
            and kv_heads > 0
            and q_heads > 0
            and q_heads % kv_heads == 0
            and q.dtype == k.dtype == v.dtype
            and q.dtype in FLOAT_DTYPES
            and q.device == k.device == v.device
            and q.layout is k.layout is v.layout is torch.strided
            and not (q.is_nested or k.is_nested or v.is_nested)
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):  # not tensors, nested, or not 4-D
        good = False
    if not good:
        _explain_qkv(q, k, v, names)


def _explain_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """Raise the error that says what is wrong with q, k and v."""
    for name, tensor in zip(names, (q, k, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name}: expected a dense strided tensor, got {kind}")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, heads, length, head_dim), got shape {tuple(tensor.shape)}"
            )
    q_name, k_name, v_name = names
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{q_name}.dtype: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}.dtype: expected {q_name}.dtype == {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}.device: expected {q_name}.device == {q.device}, got {tensor.device}")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name}.shape[0]: expected {q_name}.shape[0] == {q.shape[0]}, got {tensor.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{k_name}.shape[-1]: expected {q_name}.shape[-1] == {q.shape[3]}, got {k.shape[3]}")
    for name, tensor in ((q_name, q), (v_name, v)):
        if tensor.shape[3] == 0:
            raise ValueError(f"{name}.shape[-1]: expected at least 1, got 0")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"{v_name}.shape[1:3]: expected {k_name}.shape[1:3] == {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}"
        )
    raise ValueError(
        f"{q_name}.shape[1]: expected a positive multiple of {k_name}.shape[1] == {k.shape[1]} heads, got {q.shape[1]}"
    )


def _score_operand(name: str, x: Tensor, q: Tensor, kv_len: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A mask or bias as a 4-D view."""
    expected = (q.shape[0], q.shape[1], q.shape[2], kv_len)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense strided tensor, got layout {x.layout}")
    if x.dtype not in dtypes:
        kinds = "bool (True takes part)" if dtypes == (torch.bool,) else "a floating-point dtype"
        raise TypeError(f"{name}.dtype: expected {kinds}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected {q.device}, got {x.device}")
    if x.ndim < 4:
        x = x[(None,) * (4 - x.ndim)]
    if x.ndim != 4 or any(size != 1 and size != full for size, full in zip(x.shape, expected, strict=True)):
        raise ValueError(
            f"{name}.shape: expected broadcastable to (B, Hq, Lq, Lk) == {tuple(expected)}, got {tuple(x.shape)}"
        )
    return x


def _check_head_vector(name: str, x: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}.dtype: expected a floating-point dtype, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected {q.device}, got {x.device}")
    if tuple(x.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}.shape: expected {expected} for {q.shape[1]} query heads, got {tuple(x.shape)}")


def _check_window(window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), each an int or None, got {window!r}")
    for side in window:
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window: expected (left, right), each an int or None, got {window!r}")
        if not -_FAR <= side <= _FAR:
            raise ValueError(f"window: expected sides of at most 2**30 (None is open), got {window!r}")
    return window[0], window[1]


def _offset_tensor(q_offset: Tensor, batch: int, device: torch.device) -> Tensor:
    if q_offset.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"q_offset.dtype: expected int32 or int64, got {q_offset.dtype}")
    if q_offset.shape != (batch,):
        raise ValueError(f"q_offset.shape: expected (B,) == ({batch},), got {tuple(q_offset.shape)}")
    if q_offset.device != device:
        raise ValueError(f"q_offset.device: expected {device}, got {q_offset.device}")
    return q_offset.contiguous()


def _check_cu_seqlens(name: str, cu_seqlens: Tensor | None, packed: Tensor) -> Tensor:
    """``packed`` is (1, heads, total, head_dim)."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name}.dtype: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}.shape: expected (sequences + 1,) with a sequence at least, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != packed.device:
        raise ValueError(f"{name}.device: expected {packed.device}, got {cu_seqlens.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, reading it would wait
        values, total = cu_seqlens.tolist(), packed.shape[2]
        if values[0] != 0 or values[-1] > total or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{name}: expected to rise from 0 to at most the {total} rows there are, got {values}")
    return cu_seqlens.contiguous()
