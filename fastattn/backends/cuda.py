"""Find, load and call the CUDA C++ library through ctypes. `csrc/cuda/interface.cuh` declares its functions.

This module imports the standard library only: `setup.py` takes `source_digest` from it where PyTorch is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastattn.spec import AttentionSpec, CacheSpec, Gradients, Operands, Options

ABI = 5
HEAD_DIMS = (64, 128, 256)
PROVEN: dict[tuple[str, int, bool], str] = {}
"""(dtype, head dim, causal) -> digest of the kernel sources that passed parity on a GPU, as benchmarks/results records,
and were faster than Triton's kernel in the same run. Only these calls choose this backend unasked."""

_LIBRARY = Path(__file__).parents[1] / "libfastattn_cuda.so"
_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"  # in a checkout, through any link
_DTYPES = {"float16": 0, "bfloat16": 1}
_BAD_ARGUMENT = 1
_OPEN = 1 << 40
"""a side of the window that forbids nothing"""
_ENDS = 1 << 40
"""the offset of packed sequences that puts the last query of each at its last key"""


_PACKED = ("q_starts", "k_starts", "k_used")


class Forward(ctypes.Structure):
    """`FastattnForward` of csrc/cuda/interface.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "statistics", "sinks")),
        *((name, ctypes.c_void_p) for name in (*_PACKED, "q_offsets", "stream")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("q_offset", "left", "right")),
        *((name, ctypes.c_int32) for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim")),
        *((name, ctypes.c_int32) for name in ("dtype", "device")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]  # fmt: skip


class Backward(ctypes.Structure):
    """`FastattnBackward` of csrc/cuda/interface.cuh."""

    _fields_ = [
        ("f", Forward),
        *((name, ctypes.c_void_p) for name in ("dout", "dlse", "dq", "dk", "dv", "rows")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("dout", "dq", "dk", "dv")),
    ]


def source_digest(folder: Path) -> str:
    """The digest of the CUDA sources in ``folder``, names and contents. The library contains it too."""
    hasher = hashlib.sha256()
    for path in sorted(folder.glob("*.cu*")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """The library at ``path``, with the types of its functions.

    Raises:
        OSError: the library is missing or does not load.
        ValueError: it has another version, or other sources than this checkout.
    """
    library = ctypes.CDLL(str(path))
    try:
        abi = library.fastattn_abi()
        if abi != ABI:
            raise ValueError(f"{path.name}: expected ABI {ABI}, got {abi}; build it again: make ext")
        for name in ("fastattn_source_digest", "fastattn_last_error"):
            getattr(library, name).restype = ctypes.c_char_p
        library.fastattn_supported.argtypes = [ctypes.c_int, ctypes.c_int]
        library.fastattn_attention_forward.argtypes = [ctypes.POINTER(Forward)]
        library.fastattn_backward_rows.argtypes = [ctypes.POINTER(Forward)]
        library.fastattn_backward_rows.restype = ctypes.c_int64
        library.fastattn_attention_backward.argtypes = [ctypes.POINTER(Backward)]
    except AttributeError as error:
        raise ValueError(f"{path.name}: expected the functions of csrc/cuda/interface.cuh: {error}") from None
    if (_SOURCES / "interface.cuh").is_file():
        built, current = library.fastattn_source_digest().decode(), source_digest(_SOURCES)
        if built != current:
            raise ValueError(f"{path.name}: expected sources {current}, built from {built}; build it again: make ext")
    return library


def problem() -> str | None:
    """Why there is no library to call; None if there is one."""
    if not _LIBRARY.is_file():
        return "not built: make ext, or install with FASTATTN_BUILD_CUDA=1"
    try:
        load(_LIBRARY)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def unasked(spec: AttentionSpec) -> bool:
    """Whether this backend may serve ``spec`` by default: its parity on a GPU is on record."""
    extras = (spec.left, spec.softcap, spec.sinks, spec.cu_seqlens_q, spec.q_offset_tensor)
    plain = spec.right in (None, 0) and all(x is None for x in extras)
    if not PROVEN or not plain or _differentiated(spec):
        return False
    digest = PROVEN.get((str(spec.q.dtype).removeprefix("torch."), spec.q.shape[3], spec.causal))
    return digest is not None and problem() is None and load(_LIBRARY).fastattn_source_digest().decode() == digest


def _differentiated(spec: AttentionSpec) -> bool:
    import torch
    from torch.autograd import forward_ad

    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (spec.q, spec.k, spec.v))
    return wanted or forward_ad._current_level >= 0


UNPROVEN = "no GPU run of this kernel is on record"


def reasons(spec: AttentionSpec) -> list[str]:
    """The reasons why the CUDA C++ kernel cannot serve this spec; `unasked` tells whether its parity is on record.

    On another device that is the only reason, because no other argument would change it.
    """
    import torch

    from fastattn.spec import target

    q, k, v = spec.q, spec.k, spec.v
    device, head_dim = q.device, q.shape[3]
    if device.type != "cuda" or target.rocm():
        return [f"runs on Hopper GPUs (compute capability 9.0), the tensors are on {device.type!r}"]
    if (capability := target.capability(device)) != (9, 0):
        return ["runs on Hopper GPUs (compute capability 9.0), this GPU has {}.{}".format(*capability)]
    reasons = []
    # Tracing cannot look for files; there the call itself raises.
    if not torch.compiler.is_compiling() and (missing := problem()):
        reasons.append(missing)
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}")
    if head_dim not in HEAD_DIMS or v.shape[3] != head_dim:
        reasons.append(f"head dims 64, 128 and 256, the same for v, got D = {head_dim}, Dv = {v.shape[3]}")
    absent = {
        "mask": spec.mask is not None,
        "block masks": spec.block_mask is not None,
        "bias": spec.bias is not None,
        "alibi_slopes": spec.alibi_slopes is not None,
        "dropout": spec.dropout_p > 0.0,
        "kv_start": spec.kv_start is not None,
    }
    reasons += [f"it has no {name}" for name, wanted in absent.items() if wanted]
    if not spec.scale > 0.0:
        reasons.append(f"expects scale > 0, got {spec.scale:g}")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        reasons.append("it has no torch.func transforms")
    return reasons + _layout_reasons(q=q, k=k, v=v)


def cache_reasons(spec: CacheSpec) -> list[str]:
    return ["it has no KV cache"]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Batch, head and row stride; 0 for a dimension of size 1, whose stride means nothing."""
    return tuple(s if n > 1 else 0 for s, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True))


def _layout_reasons(**tensors: Tensor) -> list[str]:
    """The strides that TMA cannot take. Heads and batch entries may be expanded (stride 0), rows may not."""
    return [
        f"{name}: expected adjacent elements and distinct rows at multiples of 8 elements, got strides "
        f"{tuple(tensor.stride())}"
        for name, tensor in tensors.items()
        if tensor.stride(3) != 1
        or any(stride % 8 for stride in _strides(tensor))
        or (tensor.shape[2] > 1 and tensor.stride(2) == 0)
    ]


def statistics_unit(operands: Operands) -> float:
    """The unit of the maximum in `statistics`, in natural logarithms."""
    return 1.4426950408889634


def forward(
    out: Tensor, lse: Tensor, statistics: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options
) -> None:
    """Fill ``out`` (B, Hq, Lq, D), ``lse`` (B, Hq, Lq, float32) and ``statistics`` (2, B, Hq, Lq, float32).

    ``q`` is (B, Hq, Lq, D), ``k`` and ``v`` are (B, Hk, Lk, D). `reasons` refuses dropout and all ``operands`` but
    sinks, offsets and packed sequences. Rows outside every sequence stay unwritten.

    Raises:
        ValueError: a tensor does not start at a multiple of 16 bytes, or the library refuses an argument.
        RuntimeError: CUDA reports an error.
    """
    call = _Call(q, k, v, out, statistics, operands, options)
    call.arguments.lse = lse.data_ptr()
    library = load(_LIBRARY)
    with _current(q.device) as call.arguments.stream:
        _check(library, library.fastattn_attention_forward(ctypes.byref(call.arguments)))


def backward(
    gradients: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    statistics: Tensor, operands: Operands, options: Options,
) -> None:  # fmt: skip
    """Fill the ``gradients`` of a call of `forward` from those of its results; repeats are bit-equal.

    ``dout`` may have any strides: a copy replaces one that TMA cannot take. Rows outside every sequence stay unwritten.

    Raises:
        ValueError, RuntimeError: as `forward`.
    """
    import torch

    if dout.data_ptr() % 16 or _layout_reasons(dout=dout):
        dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    call = _Call(q, k, v, out, statistics, operands, options)
    library = load(_LIBRARY)
    sequences = q.shape[0] if operands.cu_seqlens_q is None else 1
    floats = library.fastattn_backward_rows(ctypes.byref(call.arguments))
    rows = torch.empty((sequences, q.shape[1], floats // 2, 2), dtype=torch.float32, device=q.device)
    dq, dk, dv = gradients.dq, gradients.dk, gradients.dv
    tensors = (("dout", dout), ("dq", dq), ("dk", dk), ("dv", dv))
    arguments = Backward(
        f=call.arguments, rows=rows.data_ptr(), dlse=None if dlse is None else dlse.data_ptr(),
        **{name: t.data_ptr() for name, t in tensors}, **{f"{name}_stride": _strides(t) for name, t in tensors},
    )  # fmt: skip
    with _current(q.device) as arguments.f.stream:
        _check(library, library.fastattn_attention_backward(ctypes.byref(arguments)))
        if gradients.dsinks is not None and operands.sinks is not None:  # a score whose value vector is 0
            log, delta = rows.unbind(-1)
            weights = torch.exp2(operands.sinks.float()[:, None] * statistics_unit(operands) - log)
            gradients.dsinks.copy_(-(weights * delta).sum((0, 2)))


class _Call:
    """The arguments of a call, and the tensors that must live until its kernel is queued."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, operands: Operands, options: Options
    ) -> None:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.data_ptr() % 16:
                address = f"{tensor.data_ptr():#x}"
                raise ValueError(f"{name}: expected to start at a multiple of 16 bytes, got address {address}")
        given = (operands.cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k)
        small = {name: None if x is None else x.int() for name, x in zip(_PACKED, given, strict=True)}
        small["q_offsets"] = None if operands.q_offset_tensor is None else operands.q_offset_tensor.long()
        small["sinks"] = None if operands.sinks is None else operands.sinks.float().contiguous()
        self._held = small
        sequences = q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1
        tensors = (("q", q), ("k", k), ("v", v), ("out", out))
        self.arguments = Forward(
            **{name: t.data_ptr() for name, t in (*tensors, ("statistics", statistics))},
            **{f"{name}_stride": _strides(t) for name, t in tensors},
            **{name: None if x is None else x.data_ptr() for name, x in small.items()},
            q_offset=_ENDS if options.q_offset is None else options.q_offset,
            left=_OPEN if options.left is None else options.left,
            right=_OPEN if options.right is None else options.right,
            batch=sequences, q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
            head_dim=q.shape[3], dtype=_DTYPES[str(q.dtype).removeprefix("torch.")], device=q.device.index or 0,
            scale=options.scale, softcap=options.softcap or 0.0,
        )  # fmt: skip


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        error = ValueError if status == _BAD_ARGUMENT else RuntimeError
        raise error(f"fastattn: {library.fastattn_last_error().decode()}")


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Make ``device`` current for the library, hence for PyTorch too; yield the handle of its current stream."""
    import torch

    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
