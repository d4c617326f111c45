"""FlexAttention's functions, with PyTorch's signatures, on fastattn.

``from fastattn.compat.flex_attention import create_block_mask, flex_attention`` is the whole migration. It needs no
compilation: calls are fused in eager mode, also on CPUs, and have gradients there.

``score_mod`` may be the score itself or ``softcap * tanh(score / softcap)``, plus a term of (b, h, q_idx, kv_idx) that
does not depend on the score: ALiBi, tables of relative or absolute positions, -inf. Every call examines it: it traces
the function to find the indices that it depends on, and compares it on all of these with the form that it found.
Softcap and ALiBi cost nothing more. Any other term becomes a bias with the size of its indices, which is Lq x Lk for a
term of q_idx and kv_idx. Tensors that the function captures get their gradients through this bias. Under a causal
``block_mask``, ``slope * (kv_idx - q_idx)``, without an absolute value, also counts as ALiBi.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastattn.block_mask import BlockMask
from fastattn.compat.score_mod import score_terms
from fastattn.functional import attention

__all__ = ["create_block_mask", "flex_attention"]


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None, block_mask: Any = None,
    scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None, *, return_aux: Any = None,
) -> Any:  # fmt: skip
    """torch.nn.attention.flex_attention.flex_attention on `fastattn.attention`.

    Args:
        query: (B, Hq, Lq, D).
        key: (B or 1, Hk, Lk, D).
        value: (B or 1, Hk, Lk, Dv).
        score_mod: (score, b, h, q_idx, kv_idx) -> score, of one of the forms above.
        block_mask: a `fastattn.BlockMask`, from `create_block_mask`, or PyTorch's. `BlockMask.from_flex` converts
            PyTorch's on every call, so convert it once yourself.
        scale: default ``1 / sqrt(D)``.
        enable_gqa: Hq may be a multiple of Hk.
        return_lse: also return lse.
        kernel_options: ignored.
        return_aux: a `torch.nn.attention.flex_attention.AuxRequest`, for lse only.

    Returns:
        out (B, Hq, Lq, Dv); with ``return_lse`` also lse (B, Hq, Lq) in float32, natural logarithm; with
        ``return_aux`` an AuxOutput in its place.

    Raises:
        NotImplementedError: ``score_mod`` has no form above, and the text says what it found; or ``max_scores`` in
            ``return_aux``.
        TypeError, ValueError: as `fastattn.attention`, under its names.
    """
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"enable_gqa: expected a bool, got {type(enable_gqa).__name__}")
    if return_lse and return_aux is not None:
        raise ValueError("return_lse, return_aux: expected one of them, got both")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux.max_scores: expected False, got True; only lse is available")
    tensors = all(isinstance(x, Tensor) and x.ndim == 4 for x in (query, key, value))
    if tensors and not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key.shape[1]: expected query.shape[1] == {query.shape[1]} unless enable_gqa=True, got {key.shape[1]}"
        )
    if tensors:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) if len(x) == 1 else x for x in (key, value))
    options: dict[str, Any] = {"block_mask": block_mask}
    if tensors and (score_mod is not None or not isinstance(block_mask, (BlockMask, type(None)))):
        options = _examined(score_mod, block_mask, query, key.shape[2])
    wanted = return_lse or return_aux is not None
    result: Any = attention(query, key, value, q_offset=0, scale=scale, return_lse=wanted, **options)
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import AuxOutput

    return result[0], AuxOutput(lse=result[1] if return_aux.lse else None)


@_disable_dynamo  # torch.compile compiles the code before and after this, but not this
def _examined(score_mod: Any, block_mask: Any, query: Tensor, kv_len: int) -> dict[str, Any]:
    """The arguments of `fastattn.attention` that replace ``score_mod`` and ``block_mask``."""
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        block_mask = BlockMask.from_flex(block_mask)
    terms = {} if score_mod is None else score_terms(score_mod, query, kv_len, block_mask)._asdict()
    return {"block_mask": block_mask, **terms}


def create_block_mask(
    mask_mod: Callable[..., Tensor], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
    device: torch.device | str | int | None = None, BLOCK_SIZE: int | tuple[int, int] = 128, _compile: bool = False,
    separate_full_blocks: bool = True, compute_dq_write_order: bool = False, dq_kv_order: bool = True,
) -> BlockMask:  # fmt: skip
    """torch.nn.attention.flex_attention.create_block_mask, which holds 128 rows of the mask in memory at a time.

    Args:
        mask_mod: (b, h, q_idx, kv_idx) -> bool, called with one position at a time, under vmap.
        B, H: None if the mask is the same for all.
        Q_LEN, KV_LEN: the lengths.
        device: None is the accelerator that this process can use, or the CPU.
        BLOCK_SIZE, _compile, separate_full_blocks, compute_dq_write_order, dq_kv_order: ignored.

    Returns:
        A `fastattn.BlockMask`.

    Raises:
        TypeError, ValueError: as `fastattn.BlockMask.from_predicate`.
    """
    from torch.nn.attention.flex_attention import create_mask

    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    where = torch.device(device)

    def strip(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        first = i.flatten()[0]
        return create_mask(
            lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx + first, kv_idx), len(b), h.shape[1], i.shape[2],
            j.shape[3], where,
        )  # fmt: skip

    return BlockMask.from_predicate(strip, (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN), where)
