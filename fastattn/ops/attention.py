"""Run attention on the chosen backend: through PyTorch's function, or through the operator."""

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import plain
from fastattn.ops.autograd import attend, draw_seed
from fastattn.ops.direct import without_autocast
from fastattn.ops.schema import Forward
from fastattn.ops.torch_kernel import add_second_derivative
from fastattn.spec import AttentionSpec


def attention(spec: AttentionSpec, backend: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of ``spec``; lse is None from the torch backend.

    Without ``seed``, dropout draws one with `draw_seed`.
    """
    for_onnx = plain.wanted()
    if backend == "torch" and not (for_onnx and (spec.mask is not None or spec.bias is not None)):
        return _by_torch(spec), None
    if spec.dropout_p > 0.0 and seed is None:
        seed = draw_seed(spec.q.device)
    call = Forward(spec.q, spec.k, spec.v, spec.operands(seed), spec.options, backend)
    if for_onnx:
        out, lse, _ = plain.run(call)
        return out, lse
    return attend(call)


def _by_torch(spec: AttentionSpec) -> Tensor:
    run = backends.module("torch").attention
    if spec.bias is None:  # the spec has cast all other tensors: autocast has nothing to change
        out = run(spec)
    else:
        with without_autocast(spec.q.device):
            out = run(spec)
    if not torch.compiler.is_compiling() and out.requires_grad:
        add_second_derivative(out)
    return out
