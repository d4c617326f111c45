"""Checks of single arguments: each raises an error that names the argument, the expected and the given value."""

import math
import warnings

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64)
MAX_POSITION = 1 << 30  # positions are int32 in the kernels: sums of two such offsets and a length still fit
# float32's smallest normal number: below it scores / softcap overflows, and kernels take a scale for 0.
_LEAST = 2.0**-126


def known(condition: bool) -> bool:
    """True only if the condition is certain.

    Under torch.compile a symbolic size never is: shortcuts that only save work are then skipped instead of adding a
    guard.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def readable(x: Tensor) -> bool:
    """Whether a check may read the tensor's values: on a CPU, where reading does not wait, but not in a trace or
    vmap."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor. It compares names, because importing the class takes half a second."""
    kind = type(x)
    return kind is not Tensor and kind.__name__ == "DTensor"


def check_plain(name: str, x: Tensor, q: Tensor) -> None:
    """Refuse a subclass whose Python code changes the meaning of its memory, such as MaskedTensor, and a DTensor if
    the queries are not DTensors."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return
    function = kind.__torch_function__
    if function is torch._C._disabled_torch_function_impl:  # FakeTensor, DTensor: the dispatcher serves them
        if is_dtensor(x) and not is_dtensor(q):
            raise TypeError(f"{name}: expected a plain Tensor like the query, got a DTensor")
        return
    if getattr(function, "__func__", None) is not Tensor.__torch_function__.__func__:
        raise TypeError(f"{name}: expected a plain Tensor, got {kind.__module__}.{kind.__name__}")


def causal_bias_offset(name: str, x: Tensor | None, q_len: int, kv_len: int) -> int | None:
    """The q_offset whose causal order equals that of a `torch.nn.attention.bias.CausalBias`; None for other values."""
    if x is None or type(x).__module__ != "torch.nn.attention.bias":
        return None
    lengths = (x.seq_len_q, x.seq_len_kv)  # pyright: ignore[reportAttributeAccessIssue]
    if lengths != (q_len, kv_len):
        raise ValueError(f"{name}: expected a CausalBias for (Lq, Lk) == {(q_len, kv_len)}, got {lengths}")
    top_left = x.variant.name == "UPPER_LEFT"  # pyright: ignore[reportAttributeAccessIssue]
    return 0 if top_left else kv_len - q_len


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """Check q, k and v with one quick test, which most calls pass; find the reason only if it fails."""
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
    if not type(q) is type(k) is type(v) is Tensor:
        for name, tensor in zip(names, (q, k, v), strict=True):
            check_plain(name, tensor, q)


def _explain_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """Raise an error that says what is wrong with q, k or v."""
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


def check_head_vector(name: str, x: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}.dtype: expected a floating-point dtype, got {x.dtype}")
    check_plain(name, x, q)
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected {q.device}, got {x.device}")
    if tuple(x.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}.shape: expected {expected} for {q.shape[1]} query heads, got {tuple(x.shape)}")


def check_window(window: tuple[int | None, int | None] | None, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of the window and causal order combined."""
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), each an int or None, got {window!r}")
    for side in window:
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window: expected (left, right), each an int or None, got {window!r}")
        if not -MAX_POSITION <= side <= MAX_POSITION:
            raise ValueError(f"window: expected sides of at most 2**30 (None is open), got {window!r}")
        if side == -1:
            raise ValueError(f"window: expected sides other than -1, got {window!r}; None leaves a side open")
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None and right is not None and left + right < 0:
        raise ValueError(
            f"window: expected left + right >= 0, since it forbids everything otherwise, got {window!r}"
            f"{' with causal' if causal else ''}; None leaves a side open"
        )
    return left, right


def check_integers(name: str, value: Tensor, q: Tensor) -> None:
    """Check that value has int32 or int64, is plain if q is, and is on q's device."""
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}.dtype: expected int32 or int64, got {value.dtype}")
    check_plain(name, value, q)
    if value.device != q.device:
        raise ValueError(f"{name}.device: expected {q.device}, got {value.device}")


def check_per_entry(name: str, value: Tensor, batch: int, q: Tensor) -> Tensor:
    """Check for one integer per batch entry; return them contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor (B,), got {type(value).__name__}")
    check_integers(name, value, q)
    if value.shape != (batch,):
        raise ValueError(f"{name}.shape: expected (B,) == ({batch},), got {tuple(value.shape)}")
    return value.contiguous()


def check_kv_start(kv_start: Tensor, batch: int, q: Tensor, kv_len: int) -> Tensor:
    """Check the first key of each batch entry that takes part; at most ``kv_len``."""
    kv_start = check_per_entry("kv_start", kv_start, batch, q)
    if readable(kv_start):
        for entry, start in enumerate(kv_start.tolist()):
            if not 0 <= start <= kv_len:
                raise ValueError(f"kv_start: expected 0 to {kv_len}, got {start} for batch entry {entry}")
    return kv_start


def check_cu_seqlens(name: str, cu_seqlens: Tensor | None, packed: Tensor) -> Tensor:
    """Check where packed sequences begin; ``packed`` is (1, heads, total, head_dim)."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(cu_seqlens).__name__}")
    check_integers(name, cu_seqlens, packed)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}.shape: expected (sequences + 1,) with at least one sequence, got {tuple(cu_seqlens.shape)}"
        )
    if readable(cu_seqlens):
        values, total = cu_seqlens.tolist(), packed.shape[2]
        if values[0] != 0 or values[-1] > total or values != sorted(values):
            raise ValueError(f"{name}: expected to rise from 0 to at most {total}, the number of rows, got {values}")
    return cu_seqlens.contiguous()


def check_seqused_k(seqused_k: Tensor, cu_seqlens_k: Tensor, packed: Tensor) -> Tensor:
    """Check how many keys each packed sequence uses against the lengths that `check_cu_seqlens` has read."""
    if not isinstance(seqused_k, Tensor):
        raise TypeError(f"seqused_k: expected a Tensor or None, got {type(seqused_k).__name__}")
    check_integers("seqused_k", seqused_k, packed)
    sequences = cu_seqlens_k.shape[0] - 1
    if seqused_k.shape != (sequences,):
        raise ValueError(f"seqused_k.shape: expected (sequences,) == ({sequences},), got {tuple(seqused_k.shape)}")
    if readable(seqused_k) and readable(cu_seqlens_k):
        for number, (used, given) in enumerate(zip(seqused_k.tolist(), cu_seqlens_k.diff().tolist(), strict=True)):
            if not 0 <= used <= given:
                raise ValueError(f"seqused_k: expected 0 to the {given} keys of sequence {number}, got {used}")
    return seqused_k.contiguous()


def check_scores(name: str, x: Tensor, q: Tensor, kv_len: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A mask or bias as a 4-D view."""
    expected = (q.shape[0], q.shape[1], q.shape[2], kv_len)
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        cure = "; it goes to block_mask=" if kind == "BlockMask" else ""
        if callable(x):
            cure = "; BlockMask.from_predicate makes a mask from a function"
        raise TypeError(f"{name}: expected a Tensor, got {kind}{cure}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense strided tensor, got layout {x.layout}")
    check_plain(name, x, q)
    if x.dtype not in dtypes:
        kinds = "bool (True takes part)" if dtypes == (torch.bool,) else "a floating-point dtype"
        cure = ""
        if dtypes == (torch.bool,) and not x.dtype.is_floating_point:
            cure = f"; {name}.bool() if 1 takes part"
        elif dtypes == (torch.bool,):
            cure = "; pass what is added to the scores as bias="
        elif x.dtype == torch.bool:
            cure = "; it goes to mask="
        raise TypeError(f"{name}.dtype: expected {kinds}, got {x.dtype}{cure}")
    if x.device != q.device:
        raise ValueError(f"{name}.device: expected {q.device}, got {x.device}")
    given = tuple(x.shape)
    per_entry = len(given) == 2 and given == (expected[0], expected[3])
    if x.ndim < 4:
        x = x[(None,) * (4 - x.ndim)]
    if x.ndim != 4 or any(size != 1 and size != full for size, full in zip(x.shape, expected, strict=True)):
        cure = f"; one row per batch entry is {name}[:, None, None, :]" if per_entry else ""
        raise ValueError(
            f"{name}.shape: expected broadcastable to (B, Hq, Lq, Lk) == {tuple(expected)}, got {given}{cure}"
        )
    if per_entry and given[0] > 1 and not torch.compiler.is_compiling():
        _warn_of_two_readings(name, given)
    return x


_warned: set[str] = set()


def _warn_of_two_readings(name: str, shape: tuple[int, ...]) -> None:
    """Warn once per process about a shape that is both (B, Lk) and (Lq, Lk)."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} of shape {shape} is read as (Lq, Lk), the same for every batch entry; for one row per batch entry "
            f"(padding) pass {name}[:, None, None, :]. Shown once.",
            stacklevel=5,
        )


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def check_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a float in [0, 1], got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def check_softcap(softcap: float | None) -> None:
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: expected a float or None, got {type(softcap).__name__}")
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    if softcap < _LEAST:
        raise ValueError(f"softcap: expected at least 2**-126, float32's smallest normal number, got {softcap}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a float; None is 1 / sqrt(D)."""
    # Test for numbers first: a trace has symbolic ones, without the attributes that the test for tensors reads.
    number = scale is None or isinstance(scale, (int, float))
    if not number and (isinstance(scale, Tensor) or not hasattr(scale, "__float__")):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")  # a tensor would lose its gradient
    scale = float(head_dim**-0.5 if scale is None else scale)
    if not torch.compiler.is_compiling():  # testing a symbolic number would add a guard, hence recompilation
        check_scale_value(scale)
    return scale


def check_scale_value(scale: float) -> None:
    """The part of `check_scale` that a compiled program leaves to the operators, because only they see the value."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if 0.0 < abs(scale) < _LEAST:
        raise ValueError(
            f"scale: expected 0 or at least 2**-126 in size, float32's smallest normal number, got {scale}"
        )


def check_alibi_slopes(alibi_slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    """Check the slopes and return them as (1 or B, Hq)."""
    if alibi_slopes is None:
        return None
    check_head_vector("alibi_slopes", alibi_slopes, q, ((q.shape[1],), (batch, q.shape[1])))
    return alibi_slopes[None] if alibi_slopes.ndim == 1 else alibi_slopes


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is not None:
        check_head_vector("sinks", sinks, q, ((q.shape[1],),))


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of an active autocast, on the device of the first one."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOAT_DTYPES[:3] else x for x in tensors
    )  # fmt: skip
