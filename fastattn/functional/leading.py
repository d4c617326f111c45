"""Any number of dimensions before (length, head_dim), as PyTorch's function takes them, merged into batch and heads."""

import torch
from torch import Tensor

NAMES = ("query", "key", "value", "attn_mask", "attn_mask", "is_causal")
"""What PyTorch calls q, k, v, mask, bias and causal."""


def is_4d(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the tensors are (batch, heads, length, head_dim) already, with nothing to broadcast or merge."""
    try:
        q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    except (AttributeError, RuntimeError):  # no tensor, or nested without a shape: validation follows
        return all(isinstance(t, Tensor) for t in (query, key, value))
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return False
    (q_batch, q_heads, _, _), (k_batch, k_heads, _, _), (v_batch, v_heads, _, _) = q_shape, k_shape, v_shape
    return q_batch == k_batch == v_batch and (enable_gqa or q_heads == k_heads == v_heads)


def to_4d(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Broadcast the dimensions before (length, head_dim) as torch does, and merge them into batch and heads.

    With ``enable_gqa`` each tensor keeps its own number of heads. The last result is the output's shape before (length,
    head_dim).
    """
    leads = []
    for name, tensor in zip(NAMES, (query, key, value), strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.ndim < 2:
            raise ValueError(
                f"{name}: expected at least 2 dimensions (length, head_dim), got shape {tuple(tensor.shape)}"
            )
        leads.append(tuple(tensor.shape[:-2]))
    of_query, of_key, of_value = leads
    for name, lead in (("key", of_key), ("value", of_value)):
        if not _broadcastable(of_query[:-1], lead[:-1]) or not (enable_gqa or _broadcastable(of_query, lead)):
            hint = "" if enable_gqa or of_query[:-1] != lead[:-1] else " unless enable_gqa=True"
            raise ValueError(
                f"{name}.shape[:-2]: expected broadcastable with query.shape[:-2] == {of_query}{hint}, got {lead}"
            )
    if enable_gqa:
        batch = torch.broadcast_shapes(*(lead[:-1] for lead in leads))
        full = [(*batch, *lead[-1:]) for lead in leads]
    else:
        full = [torch.broadcast_shapes(*leads)] * 3
    q, k, v = (_merge(t.expand(*lead, *t.shape[-2:])) for t, lead in zip((query, key, value), full, strict=True))
    if isinstance(attn_mask, Tensor) and attn_mask.ndim > 3 and len(full[0]) > 2:
        if not _broadcastable(attn_mask.shape[:-3], full[0][:-1]):
            raise ValueError(
                f"attn_mask.shape[:-3]: expected broadcastable to {tuple(full[0][:-1])}, "
                f"got {tuple(attn_mask.shape[:-3])}"
            )
        attn_mask = _merge(attn_mask.expand(*full[0][:-1], *attn_mask.shape[-3:]))
    return q, k, v, attn_mask, full[0]


def _broadcastable(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(a), reversed(b), strict=False))


def _merge(tensor: Tensor) -> Tensor:
    """4-D: the dimensions before the last three merged, or dimensions of size 1 put in front."""
    return tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]
