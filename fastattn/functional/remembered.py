"""Calls without tensors besides q, k, v and a mask: checked once, and from then on handed straight over.

On a tiny input, checks and choice cost more than attention itself. For such a call they depend only on what its key
holds, so a call with an equal key passes the same checks and goes to the same backend. A call gets no key, and goes the
full way, if a key could not tell it from another (a subclass of Tensor), or if a trace, a transform or autocast would
change it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from fastattn import backends, ops
from fastattn.spec import AttentionSpec, Operands, Options
from fastattn.spec.checks import check_scale

_Key = tuple[Any, ...]
_MOST = 1024  # then all are forgotten, so that lengths that change with every call do not fill the memory


class _Call(NamedTuple):
    """What the kernel takes besides q, k, v and the mask."""

    backend: str
    options: Options
    mask_index: tuple[None, ...]
    """gives the mask the dimensions of size 1 that it lacks"""
    torch_options: dict[str, Any]
    """what PyTorch's kernel would not do unasked: to pass an option costs it as much as a few checks here"""


_calls: dict[_Key, _Call] = {}


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, q_offset: int | Tensor | None,
    scale: float | None, grouped: bool, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, return_lse: bool = False,
) -> tuple[_Key | None, Any]:  # fmt: skip
    """(key of the call, to be given to `remember`, or None where it has none; its result if the key is known).

    The result is out, with ``return_lse`` (out, lse).
    """
    if (
        torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
    ):
        return None, None
    if not type(q) is type(k) is type(v) is Tensor:
        return None, None
    if q.is_cpu:
        if not (k.is_cpu and v.is_cpu) or torch.is_autocast_enabled("cpu"):
            return None, None
    elif not q.is_cuda or not q.device == k.device == v.device or torch.is_autocast_enabled("cuda"):
        return None, None
    # Types too: True and 1 are equal keys, and 1 is refused where a bool belongs.
    if not (type(causal) is type(grouped) is bool and type(q_offset) in _OFFSET and type(scale) in _SCALE):
        return None, None
    try:
        if not q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:  # sparse and nested tensors have no strides
            return None, None
        key: _Key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, causal, q_offset, scale, grouped,
            q.dtype.itemsize < 4 and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )  # fmt: skip
        if not (window is softcap is None and return_lse is False):
            sides = () if window is None else window
            if not (type(return_lse) is bool and type(softcap) in _SCALE and all(type(x) in _OFFSET for x in sides)):
                return None, None
            key += (window, softcap, return_lse)
        if mask is not None:
            if (
                type(mask) is not Tensor
                or causal
                or window is not None
                or mask.layout is not torch.strided
                or mask.device != q.device
            ):
                return None, None
            key += (mask.shape, mask.dtype)
        call = _calls.get(key)
    except (IndexError, RuntimeError, TypeError):  # the checks say what is wrong; symbolic sizes have no hash
        return None, None
    if call is None:
        return key, None
    backend, options, mask_index, torch_options = call
    if mask is not None and mask_index:
        mask = mask[mask_index]
    if backend == "torch":
        out = torch_sdpa(q, k, v, mask, 0.0, options.right is not None, **torch_options)
        if out.requires_grad:
            ops.add_second_derivative(out)
        return key, out
    out, lse = ops.attend(ops.Forward(q, k, v, Operands(mask), options, backend))
    return key, (out, lse) if return_lse else out


_OFFSET = (int, type(None))
_SCALE = (float, type(None))


def remember(key: _Key | None, spec: AttentionSpec, backend: str) -> None:
    """Remember the choice for a call, if the kernel takes its tensors unchanged and the layout alone decided."""
    if key is None or spec.bias is not None or torch._C._get_tracing_state() is not None:  # whose sizes are tensors
        return
    if backend == "torch":
        plain = spec.q.is_cpu and spec.q.shape[3] == spec.v.shape[3]
    else:
        plain = backend == "cpu" or (backend == "triton" and not backends.cuda_may_serve_unasked())
    if not plain:
        return
    missing = 0
    if spec.mask is not None:
        given = key[-2]
        # PyTorch's kernel takes a mask (Lq, Lk) as it is; others need all four dimensions.
        as_it_is = backend == "torch" and given == (spec.q.shape[2], spec.k.shape[2])
        missing = 0 if as_it_is else 4 - len(given)
    if len(_calls) >= _MOST:
        _calls.clear()
    usual = check_scale(None, spec.q.shape[3])
    torch_options: dict[str, Any] = {} if spec.options.scale == usual else {"scale": spec.options.scale}
    if spec.q.shape[1] != spec.k.shape[1]:
        torch_options["enable_gqa"] = True
    _calls[key] = _Call(backend, spec.options, (None,) * missing, torch_options)
