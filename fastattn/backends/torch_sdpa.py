"""PyTorch's own `scaled_dot_product_attention`, used only where it computes exactly what the caller asked for."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from fastattn.spec import AttentionSpec, CacheSpec, known

# PyTorch's kernel takes one float mask: a mask and a bias that broadcast differently are joined up to 16 MiB.
_JOINT_ELEMENTS = 1 << 22


def reasons(spec: AttentionSpec) -> list[str]:
    """What keeps PyTorch's fused kernel from computing exactly this spec without an Lq x Lk buffer."""
    reasons = []
    q, k, mask, bias, left, right = spec.q, spec.k, spec.mask, spec.bias, spec.left, spec.right
    if spec.cu_seqlens_q is not None:
        return ["it has no packed sequences"]
    if spec.block_mask is not None:
        reasons.append("it has no block masks")
    if spec.alibi_slopes is not None:
        reasons.append("it has no alibi_slopes")
    if spec.sinks is not None:
        reasons.append("it has no sinks")
    if spec.softcap is not None:
        reasons.append("it has no softcap")
    if spec.dropout_p:
        reasons.append("its dropout is not a function of (seed, b, h, i, j)")
    if spec.return_lse:
        reasons.append("it does not return lse")
    if left is not None or right not in (None, 0):
        reasons.append("it has no window")
    elif right == 0 and (spec.q_offset_tensor is not None or not known(spec.q_offset == 0)):
        reasons.append("its causal mask is top-left only (q_offset == 0)")
    if right is not None and spec.scale <= 0.0:
        reasons.append("it scales its causal mask too: NaN unless scale > 0")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("empty tensors")
    if forward_ad._current_level >= 0:
        reasons.append("it has no derivatives along a direction (forward mode)")
    shapes = [x.shape for x in (mask, bias) if x is not None]
    if spec.kv_start is not None:
        shapes.append(torch.Size((q.shape[0], 1, 1, k.shape[2])))
    if shapes:
        if q.device.type != "cpu":
            reasons.append("a mask or bias, also one for kv_start, is exact only in its CPU kernel")
        elif len(shapes) > 1:
            joint = math.prod(max(sizes) for sizes in zip(*shapes, strict=True))
            if not any(known(joint <= most) for most in (_JOINT_ELEMENTS, *map(math.prod, shapes))):
                reasons.append("mask, bias and kv_start together would need a large buffer")
        # PyTorch's switch for flash kernels also governs the CPU kernel. Tracing cannot read it.
        if right is not None and not (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()):
            reasons.append("its flash kernel is switched off, and the other refuses a mask or bias with causal")
        if spec.needs_dbias:
            reasons.append("it has no fused gradient for the bias")
    return reasons


def cache_reasons(spec: CacheSpec) -> list[str]:
    """What keeps PyTorch's kernel on a slice of the cache from computing exactly this."""
    reasons = []
    if spec.cu_seqlens_q is not None:
        return ["it has no packed queries"]
    if spec.block_table is not None:
        reasons.append("it has no block_table")
    if spec.length is None:
        reasons.append("it needs one length for all batch entries, known on the host")
    elif spec.length == 0 or spec.q.numel() == 0:
        reasons.append("empty tensors")
    elif spec.right == 0 and spec.q.shape[2] != spec.length:
        reasons.append("its causal mask is top-left only (Lq == 1 or Lq == length)")
    if spec.left is not None or spec.right not in (None, 0):
        reasons.append("it has no window")
    if spec.right is not None and spec.scale <= 0.0:
        reasons.append("it scales its causal mask too: NaN unless scale > 0")
    for name, term in (("softcap", spec.softcap), ("alibi_slopes", spec.alibi_slopes), ("sinks", spec.sinks)):
        if term is not None:
            reasons.append(f"it has no {name}")
    if spec.return_lse:
        reasons.append("it does not return lse")
    if spec.quantised:
        reasons.append("it has no quantised caches")
    if spec.kv_start is not None:
        reasons.append("it has no kv_start")
    if spec.mask_start is not None:
        reasons.append("it has no mask_start")
    elif (spec.mask is not None or spec.bias is not None) and not reasons:
        length = spec.length
        assert length is not None  # there would be a reason
        if not all(x is None or known(x.shape[3] >= length) for x in (spec.mask, spec.bias)):
            return ["it needs a column of mask and bias for each key"]
        return _reasons_of_cached(spec)
    return reasons


def attention(spec: AttentionSpec) -> Tensor:
    """Run a spec that `reasons` accepts. It is differentiable like PyTorch's function, and returns no lse."""
    q, k, v, attn_mask, bias = spec.q, spec.k, spec.v, spec.mask, spec.bias
    if spec.kv_start is not None:
        seen = torch.arange(k.shape[2], device=k.device) >= spec.kv_start.view(-1, 1, 1, 1)
        attn_mask = seen if attn_mask is None else attn_mask & seen
    if bias is not None:
        # Its mask has the query's precision, or float32 beside half precision.
        bias = bias.to(q.dtype if q.dtype.itemsize >= 4 else torch.float32)
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)
    _, q_heads, _, head_dim = q.shape
    _, kv_heads, _, v_dim = v.shape
    if head_dim != v_dim:  # PyTorch wants one head dim: pad with zero columns, which change neither scores nor outputs
        width = max(head_dim, v_dim)
        q, k, v = (pad(t, (0, width - t.shape[3])) for t in (q, k, v))
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:  # would take its slow path
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    grouped = False
    if q_heads != kv_heads:  # a branch, because traced sizes compare to a symbol and not to a bool
        grouped = True
    causal = spec.right is not None
    if causal and attn_mask is not None and torch.compiler.is_exporting():
        # PyTorch's CPU kernel takes both, but the operators of a lowered export do not.
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        attn_mask = attn_mask & visible if bias is None else attn_mask.masked_fill(~visible, -torch.inf)
        causal = False
    out = torch_sdpa(q, k, v, attn_mask, 0.0, causal, scale=spec.scale, enable_gqa=grouped)
    return out if head_dim == v_dim else out[..., :v_dim]


def attention_cached(spec: CacheSpec) -> Tensor:
    """`attention` to the first ``spec.length`` entries of contiguous caches."""
    return attention(_over_cached(spec))


def _reasons_of_cached(spec: CacheSpec) -> list[str]:
    return reasons(_over_cached(spec))


def _over_cached(spec: CacheSpec) -> AttentionSpec:
    keys, values = (cache[:, : spec.length].transpose(1, 2) for cache in (spec.k_cache, spec.v_cache))
    mask, bias = (x if x is None else x[..., : spec.length] for x in (spec.mask, spec.bias))
    return AttentionSpec(
        spec.q, keys, values, mask=mask, bias=bias, alibi_slopes=None, sinks=None, q_offset_tensor=None, left=None,
        right=spec.right, q_offset=0, scale=spec.scale, softcap=None, dropout_p=0.0, return_lse=False,
    )  # fmt: skip
