"""When the dispatcher has nothing to do for a call of an operator but to find the kernel, which then is called at once.

On a small input PyTorch's way through the dispatcher and back into Python costs more than the kernel of a CPU backend.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad


def _keys(x: Tensor) -> int:
    """Whose kernels the dispatcher calls for a tensor: its device, and all that wraps or views it in a special way."""
    return torch._C._dispatch_keys(x).raw_repr()


with torch.inference_mode():
    _INFERENCE = _keys(torch.empty(0, device="cpu"))
_PLAIN = (_keys(torch.empty(0, device="cpu")), _INFERENCE)


def nothing_to_dispatch(operands: Iterable[object]) -> bool:
    """Whether the tensors among ``operands`` are plain ones on a CPU, and nobody records or transforms calls."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    recording = torch.is_grad_enabled()
    return all(
        _keys(x) in _PLAIN and not (recording and x.requires_grad) for x in operands if isinstance(x, Tensor)
    )  # fmt: skip
