"""Which backends can serve a call, and why not: pure functions of the spec. `choose` is what `explain` prints."""

import dataclasses
import importlib.util
import math
import os

import torch
from torch.autograd import forward_ad

from fastattn.backends import cuda
from fastattn.spec import AttentionSpec, known

BACKENDS = ("triton", "cuda", "torch", "reference")

# PyTorch's kernel takes one float mask: a mask and a bias that broadcast differently are joined up to 16 MiB.
_JOINT_ELEMENTS = 1 << 22

# A constant, because a trace cannot ask for it.
_TRITON_MISSING = importlib.util.find_spec("triton") is None


def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors. Slow: for tests of the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_reasons(spec: AttentionSpec) -> list[str]:
    reasons = []
    if _TRITON_MISSING:
        reasons.append("the triton package is not installed")
    device = spec.q.device
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            reasons.append(f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}")
    elif not (device.type == "cpu" and _interpreting()):
        reasons.append(f"runs on CUDA and ROCm devices, the tensors are on {device.type!r}")
    if spec.q.dtype == torch.float64:
        reasons.append("float64 is served by the torch and reference backends")
    if spec.q.shape[3] > 256 or spec.v.shape[3] > 256:
        reasons.append(f"head dims up to 256, got D = {spec.q.shape[3]}, Dv = {spec.v.shape[3]}")
    return reasons


def _cuda_reasons(spec: AttentionSpec) -> list[str]:
    """What keeps the CUDA C++ kernel from serving this spec; whether its parity is recorded is `_proven`.

    On another device nothing else is said: no other argument would change it.
    """
    q, k, v = spec.q, spec.k, spec.v
    device, head_dim = q.device, q.shape[3]
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"runs on Hopper GPUs (compute capability 9.0), the tensors are on {device.type!r}"]
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return ["runs on Hopper GPUs (compute capability 9.0), this GPU has {}.{}".format(*capability)]
    reasons = []
    # Tracing cannot look for files: there the call itself says what is missing.
    if not torch.compiler.is_compiling() and (problem := cuda.problem()):
        reasons.append(problem)
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}")
    if head_dim not in cuda.HEAD_DIMS or v.shape[3] != head_dim:
        reasons.append(f"head dims 64 and 128, the same for v, got D = {head_dim}, Dv = {v.shape[3]}")
    absent = {
        "packed sequences": spec.cu_seqlens_q is not None,
        "mask": spec.mask is not None,
        "block masks": spec.block_mask is not None,
        "bias": spec.bias is not None,
        "alibi_slopes": spec.alibi_slopes is not None,
        "sinks": spec.sinks is not None,
        "softcap": spec.softcap is not None,
        "dropout": spec.dropout_p > 0.0,
        "window": spec.left is not None or spec.right not in (None, 0),
        "q_offset per batch entry": spec.q_offset_tensor is not None,
    }
    reasons += [f"it has no {name}" for name, wanted in absent.items() if wanted]
    if not spec.scale > 0.0:
        reasons.append(f"expects scale > 0, got {spec.scale:g}")
    if (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))) or forward_ad._current_level >= 0:
        reasons.append("it has no gradient")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        reasons.append("it has no torch.func transforms")
    return reasons + cuda.layout_reasons(q, k, v)


def _proven(spec: AttentionSpec) -> bool:
    """Whether the CUDA C++ kernel may serve ``spec`` unasked."""
    return bool(cuda.PROVEN) and cuda.proven(spec.q.dtype, spec.q.shape[3], spec.causal)


def _torch_reasons(spec: AttentionSpec) -> list[str]:
    """What keeps PyTorch's fused kernel from computing exactly this spec without an Lq x Lk buffer."""
    reasons = []
    q, k, _, mask, bias, slopes, sinks, offsets, left, right, q_offset, scale, softcap, dropout_p, return_lse = spec[
        :15
    ]
    if spec.cu_seqlens_q is not None:
        return ["it has no packed sequences"]
    if spec.block_mask is not None:
        reasons.append("it has no block masks")
    if slopes is not None:
        reasons.append("it has no alibi_slopes")
    if sinks is not None:
        reasons.append("it has no sinks")
    if softcap is not None:
        reasons.append("it has no softcap")
    if dropout_p:
        reasons.append("its dropout is not a function of (seed, b, h, i, j)")
    if return_lse:
        reasons.append("it does not return lse")
    if left is not None or right not in (None, 0):
        reasons.append("it has no window")
    elif right == 0 and (offsets is not None or not known(q_offset == 0)):
        reasons.append("its causal mask is top-left only (q_offset == 0)")
    if right is not None and scale <= 0.0:
        reasons.append("it scales its causal mask too: NaN unless scale > 0")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("empty tensors")
    if forward_ad._current_level >= 0:
        reasons.append("it has no derivatives along a direction (forward mode)")
    if mask is not None or bias is not None:
        if q.device.type != "cpu":
            reasons.append("a mask or bias is exact only in its CPU kernel")
        elif mask is not None and bias is not None:
            joint = math.prod([b if a == 1 else a for a, b in zip(mask.shape, bias.shape, strict=True)])
            if not any(known(joint <= most) for most in (_JOINT_ELEMENTS, mask.numel(), bias.numel())):
                reasons.append("mask and bias together would need a large buffer")
        # PyTorch's switch for flash kernels holds for the CPU one too. Tracing cannot read it.
        if right is not None and not (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()):
            reasons.append("its flash kernel is switched off, and the other refuses a mask or bias with causal")
        if spec.needs_dbias:
            reasons.append("it has no fused gradient for the bias")
    return reasons


def _reference_reasons(spec: AttentionSpec) -> list[str]:
    return []


_REASONS = {
    "triton": _triton_reasons,
    "cuda": _cuda_reasons,
    "torch": _torch_reasons,
    "reference": _reference_reasons,
}

# Order of preference. On CPU, Triton only ever interprets: never a default. "cuda" counts only where `_proven`.
_PREFERENCE = {"cuda": ("cuda", "triton", "torch", "reference")}
_PREFERENCE_ELSEWHERE = ("torch", "reference")


def reasons_against(backend: str, spec: AttentionSpec) -> list[str]:
    """Why ``backend`` cannot serve ``spec``; empty if it can.

    Raises:
        ValueError: no such backend.
    """
    if not isinstance(backend, str) or backend not in _REASONS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    return _REASONS[backend](spec)


def choose(spec: AttentionSpec, backend: str | None = None) -> str:
    """The backend that serves ``spec``: the one asked for, or the first in order of preference that can.

    Raises:
        ValueError: the backend asked for does not exist or cannot serve ``spec``, with every reason.
    """
    if backend is None:
        for name in _PREFERENCE.get(spec.q.device.type, _PREFERENCE_ELSEWHERE):
            if (name != "cuda" or _proven(spec)) and not _REASONS[name](spec):
                return name
    elif reasons := reasons_against(backend, spec):
        raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend or "reference"


_UNPROVEN = "no GPU run of this kernel is on record"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and for each other one the reasons why it does not; ``str()`` is a table."""

    backend: str
    """The one that serves the call."""
    reasons: dict[str, list[str]]
    """Backend name -> why it cannot serve the call; empty for one that could."""
    call: str
    """The call as it was understood: shapes, dtype, device and terms."""
    cuda_proven: bool = False
    """Whether the parity of the CUDA C++ kernel is recorded on a GPU for such calls: else it must be asked for."""

    def __str__(self) -> str:
        lines = [self.call]
        for name in BACKENDS:
            if name == self.backend:
                verdict = "<- chosen"
                if name == "reference":
                    verdict += ": eager PyTorch in blocks of queries, memory O(block x Lk)"
                elif name == "cuda" and not self.cuda_proven:
                    verdict += f": {_UNPROVEN}"
            elif name == "cuda" and not (self.reasons[name] or self.cuda_proven):
                verdict = f"could serve it if asked for: {_UNPROVEN}"
            else:
                verdict = "; ".join(self.reasons[name]) or "could serve it, not preferred here"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)


def explain(spec: AttentionSpec, backend: str | None = None) -> Explanation:
    """What `choose` decides for ``spec``, with reasons. An explicit ``backend`` that cannot serve it raises."""
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
    for name in ("mask", "bias", "alibi_slopes", "sinks"):
        if (operand := getattr(spec, name)) is not None:
            parts.append(f"{name} {tuple(operand.shape)}")
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
    chosen = choose(spec, backend)
    reasons = {name: reasons_against(name, spec) for name in BACKENDS}
    return Explanation(chosen, reasons, ", ".join(parts), _proven(spec))
