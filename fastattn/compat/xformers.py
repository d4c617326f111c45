"""xformers' attention, with its signatures and conventions.

``import fastattn.compat.xformers as xops`` serves code that calls ``xops.memory_efficient_attention``. It recognises
bias classes by their names, so xformers' own classes, those defined here and a caller's copies all work. None becomes a
dense mask. A class with another name is an error.

The differences extend xformers: every dtype and head dim of `fastattn.attention`, on every device, with gradients; a
row that sees nothing gives 0. A call first copies keys with padding, gaps or pages together, which reads and writes the
keys in use once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.compat.packing import cumulative, gather
from fastattn.functional import attention, attention_varlen

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]


class _Kind(NamedTuple):
    """The meaning of a bias class within each sequence."""

    causal: bool = False
    top_left: bool = False
    """the first query is at the first key; False: the last query is at the last key"""
    window: tuple[str, str] | tuple[str] | None = None
    """attributes with (left, right), or with the number of keys that a query sees, up to its own"""
    keys: str = ""
    """the layout of keys: "packed", "gaps", "pages"; "" without sequences"""


_LOCAL = ("_window_size",)
_SIDES = ("window_left", "window_right")
_KINDS = {
    "LowerTriangularMask": _Kind(causal=True, top_left=True),
    "LowerTriangularMaskWithTensorBias": _Kind(causal=True, top_left=True),
    "LowerTriangularFromBottomRightMask": _Kind(causal=True),
    "LowerTriangularFromBottomRightLocalAttentionMask": _Kind(causal=True, window=_LOCAL),
    "LocalAttentionFromBottomRightMask": _Kind(window=_SIDES),
    "BlockDiagonalMask": _Kind(keys="packed"),
    "BlockDiagonalCausalMask": _Kind(causal=True, top_left=True, keys="packed"),
    "BlockDiagonalCausalFromBottomRightMask": _Kind(causal=True, keys="packed"),
    "BlockDiagonalCausalLocalAttentionMask": _Kind(causal=True, top_left=True, window=_LOCAL, keys="packed"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _Kind(causal=True, window=_LOCAL, keys="packed"),
    "BlockDiagonalPaddedKeysMask": _Kind(keys="gaps"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _Kind(causal=True, keys="gaps"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _Kind(window=_SIDES, keys="gaps"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _Kind(causal=True, window=_LOCAL, keys="gaps"),
    "BlockDiagonalGappyKeysMask": _Kind(keys="gaps"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _Kind(causal=True, keys="gaps"),
    "PagedBlockDiagonalPaddedKeysMask": _Kind(keys="pages"),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": _Kind(causal=True, keys="pages"),
    "PagedBlockDiagonalGappyKeysMask": _Kind(keys="pages"),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": _Kind(causal=True, keys="pages"),
}


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """xformers.ops.memory_efficient_attention on `fastattn.attention` and `fastattn.attention_varlen`.

    Args:
        query: (B, M, H, K), (B, M, K) for one head, or (B, M, G, H, K) for G groups of H heads.
        key: the same with another length; the heads of a group may be one expanded head. Without a gradient, the call
            reads such keys in place; with one, it repeats them in memory.
        value: like key, with head dim Kv.
        attn_bias: None; a float tensor (B, H, M, N), (B, M, N) for a query of three dimensions, or (B, G, H, M, N) for
            one of five, in which any size may be 1; or one of xformers' biases.
        p: probability of dropout; it applies as given.
        scale: default ``1 / sqrt(K)``.
        op: ignored.
        output_dtype: that of the query, or None.

    Returns:
        (B, M, H, Kv), (B, M, Kv) or (B, M, G, H, Kv).

    Raises:
        NotImplementedError: a bias class with another name; another ``output_dtype``.
        TypeError, ValueError: the text names the argument, the expected and the given value; or as
            `fastattn.attention`, under its names.
    """
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`memory_efficient_attention` under its other name."""
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`memory_efficient_attention` that also returns lse (B, H, M), (B, M) or (B, G, H, M), natural logarithm."""
    return _attend(query, key, value, attn_bias, p, scale, output_dtype, return_lse=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None,
    output_dtype: torch.dtype | None, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse); lse is empty unless requested."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or not 3 <= x.ndim <= 5 or x.ndim != query.ndim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected (B, M, H, K), (B, M, K) or (B, M, G, H, K), one for all, got {got}")
    if output_dtype not in (None, query.dtype):
        raise NotImplementedError(f"output_dtype: expected query.dtype == {query.dtype} or None, got {output_dtype}")
    heads = query.shape[2:-1]
    if key.shape[2:-1] != heads or value.shape[2:-1] != heads:
        raise ValueError(
            f"key.shape[2:-1], value.shape[2:-1]: expected query.shape[2:-1] == {tuple(heads)}, got "
            f"{tuple(key.shape[2:-1])} and {tuple(value.shape[2:-1])}; expand them"
        )
    q, k, v = (query.flatten(2, -2) if heads else query.unsqueeze(2), *_kv_heads(key, value))
    options: dict[str, Any] = {"dropout_p": p, "scale": scale, "return_lse": return_lse}
    kind = _Kind()
    if isinstance(attn_bias, Tensor):
        options["bias"] = _bias_4d(attn_bias, query)
    elif attn_bias is not None:
        kind = _kind(attn_bias)
        options |= {"causal": kind.causal, "q_offset": 0 if kind.top_left else None}
        if kind.window is not None:
            sides = [getattr(attn_bias, name) for name in kind.window]
            options["window"] = tuple(sides) if len(sides) == 2 else (sides[0] - 1, 0)
        if type(attn_bias).__name__ == "LowerTriangularMaskWithTensorBias":
            options["bias"] = _bias_4d(attn_bias._bias, query)
    if kind.keys:
        result: Any = _packed(q, k, v, attn_bias, kind, options)
    else:
        result = attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    out, lse = result if return_lse else (result, q.new_empty(0))
    out = (out[None] if kind.keys else out.transpose(1, 2)).unflatten(2, heads or (1,))
    if return_lse:
        lse = (lse[None] if kind.keys else lse).unflatten(1, heads or (1,))
        lse = lse if heads else lse.squeeze(1)
    return (out if heads else out.squeeze(2)), lse


def _kind(attn_bias: Any) -> _Kind:
    name = type(attn_bias).__name__
    if name not in _KINDS:
        raise NotImplementedError(f"attn_bias: expected a float Tensor, None or one of {', '.join(_KINDS)}, got {name}")
    return _KINDS[name]


def _kv_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, N, heads, head dim), with one head per group if all heads of each group share memory."""
    if key.ndim == 3:
        return key.unsqueeze(2), value.unsqueeze(2)
    if key.ndim == 4:
        return key, value
    learned = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if key.stride(3) == value.stride(3) == 0 and not learned:
        return key[:, :, :, 0], value[:, :, :, 0]
    return key.flatten(2, 3), value.flatten(2, 3)  # each head of a group has its own gradient


def _bias_4d(bias: Tensor, query: Tensor) -> Tensor:
    if bias.ndim != query.ndim:
        raise ValueError(
            f"attn_bias: expected {query.ndim} dimensions, (B, heads as in query, M, N), got shape {tuple(bias.shape)}"
        )
    if query.ndim == 3:
        return bias.unsqueeze(1)
    if query.ndim == 4:
        return bias
    return bias.expand(-1, *query.shape[2:4], -1, -1).flatten(1, 2) if bias.shape[1:3] != (1, 1) else bias[:, 0]


def _packed(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, kind: _Kind, options: dict[str, Any]) -> Any:
    """`fastattn.attention_varlen` over the sequences of a block diagonal mask."""
    for name, x, info in (("query", q, attn_bias.q_seqinfo), ("key", k, attn_bias.k_seqinfo)):
        if x.shape[0] != 1:
            raise ValueError(f"{name}: expected one batch entry with a {type(attn_bias).__name__}, got {x.shape[0]}")
        if info.seqstart.device != q.device:
            raise ValueError(f"attn_bias: expected it on {q.device}, got {info.seqstart.device}; attn_bias.to(device)")
        if (name == "query" or kind.keys != "pages") and info.seqstart_py[-1] != x.shape[1]:
            raise ValueError(f"{name}.shape[1]: expected {info.seqstart_py[-1]} as in attn_bias, got {x.shape[1]}")
    cu_seqlens_q, keys = attn_bias.q_seqinfo.seqstart, attn_bias.k_seqinfo
    cu_seqlens_k = keys.seqstart
    if kind.keys == "gaps":
        starts = keys.seqstart[:-1]
        k, v, cu_seqlens_k = gather(
            k, v, starts, keys.seqlen, entries=torch.zeros_like(starts), longest=keys.max_seqlen
        )  # fmt: skip
    elif kind.keys == "pages":
        starts = torch.zeros_like(keys.seqlen)
        if "Gappy" in type(attn_bias).__name__:  # its lengths are ends within the pages of each sequence
            starts = keys.seqstart[:-1]
        k, v = (x[0].unflatten(0, (-1, attn_bias.page_size)) for x in (k, v))
        k, v, cu_seqlens_k = gather(k, v, starts, keys.seqlen - starts, pages=attn_bias.block_tables)
    else:
        k, v = k[0], v[0]
    return attention_varlen(q[0], k, v, cu_seqlens_q, cu_seqlens_k.to(cu_seqlens_q.dtype), **options)


# The most common classes, for code that makes its biases by name without xformers.


class LowerTriangularMask:
    """Causal, the first query at the first key."""

    def __init__(self, device: Any = None) -> None:
        pass


class LowerTriangularFromBottomRightMask:
    """Causal, the last query at the last key."""


@dataclass
class LocalAttentionFromBottomRightMask:
    """A window of so many keys to both sides, the last query at the last key."""

    window_left: int
    window_right: int


@dataclass
class _Lengths:
    seqstart: Tensor
    seqstart_py: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int], device: Any) -> "_Lengths":
        starts = cumulative(torch.tensor(list(lengths), dtype=torch.int64))
        return cls(
            starts.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu"), starts.tolist()
        )


@dataclass
class BlockDiagonalMask:
    """Packed sequences: queries of each sequence see the keys of the sequence with the same number."""

    q_seqinfo: _Lengths
    k_seqinfo: _Lengths
    _batch_sizes: list[int] | None = field(default=None)

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Any = None
    ) -> "BlockDiagonalMask":
        """Make a mask from the length of each sequence; None for the keys means the queries' lengths."""
        queries = _Lengths.of(q_seqlen, device)
        return cls(queries, queries if kv_seqlen is None else _Lengths.of(kv_seqlen, device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        """The mask of tensors (B_i, M_i, ...), and the tensors joined as one, (1, total, ...)."""
        lengths = [x.shape[1] for x in tensors for _ in range(x.shape[0])]
        mask = cls.from_seqlens(lengths, device=tensors[0].device)
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor that `from_tensor_list` joined."""
        starts = self.q_seqinfo.seqstart_py
        sizes = self._batch_sizes or [1] * (len(starts) - 1)
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        parts = zip(sizes, ends, ends[1:], strict=False)
        return [tensor[:, starts[a] : starts[b]].reshape(n, -1, *tensor.shape[2:]) for n, a, b in parts]

    def make_causal(self) -> "BlockDiagonalCausalMask":
        """Causal in each sequence, the first query at the first key."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        """Causal in each sequence, the last query at the last key."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """`BlockDiagonalMask`, causal, the first query of each sequence at its first key."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """`BlockDiagonalMask`, causal, the last query of each sequence at its last key."""
