"""The parts of a Transformer block, as `TransformerConfig` describes them: attention, feed-forward, and both together.

Dimensions in comments: N batch, L query length, S key length, E d_model, H query heads, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import _check as check
from fastattn.functional import attention, divided
from fastattn.functional.one_pass import rms_norm, swiglu
from fastattn.functional.parts import attention_of_heads, attention_varlen_of_heads, for_own_heads, own_part
from fastattn.nn import keywords
from fastattn.nn.cache import KVCache
from fastattn.nn.config import TransformerConfig
from fastattn.nn.position import ALiBi, RoPE, rotate_both

__all__ = ["Attention", "Block", "FeedForward"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


def make_norm(config: TransformerConfig, size: int) -> nn.Module:
    """The norm that the config names, over the last `size` numbers."""
    if config.norm == "rms":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`; training on a CPU takes one pass."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm over a head, in the dtype of its input, also under autocast: torch's fused kernel wants equal dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.eps is not None
        return rms_norm(x, for_own_heads(self.weight).to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with the additions of today's models; `TransformerConfig` describes each.

    Args:
        config: its attention fields are read.
        cross: queries come from `x`, keys and values from `memory`: no positions, no window.
        layer: which layer of a cache is this one's.
    """

    def __init__(self, config: TransformerConfig, cross: bool = False, layer: int = 0) -> None:
        check.instance("config", config, TransformerConfig)
        super().__init__()
        E, D = config.d_model, config.dim_per_head
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.kv_heads, D  # of this rank
        self.all_heads, self.first_head = config.num_heads, 0
        self.q_proj = nn.Linear(E, config.num_heads * D, bias=config.bias)
        self.k_proj = nn.Linear(E, config.kv_heads * D, bias=config.bias)
        self.v_proj = nn.Linear(E, config.kv_heads * D, bias=config.bias)
        self.out_proj = nn.Linear(config.num_heads * D, E, bias=config.bias)
        self.q_norm = HeadNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None
        position = None if cross else config.position
        self.rope = position if isinstance(position, RoPE) else None
        self.alibi = position if isinstance(position, ALiBi) else None
        learned = self.alibi is not None and self.alibi.learned
        self.alibi_slopes = nn.Parameter(ALiBi().slopes(config.num_heads)) if learned else None
        self.cross, self.layer = cross, layer
        self.window = None if cross else config.window
        self.softcap = config.softcap
        self.dropout = config.dropout

    @keywords.blocks
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend; returns a tensor of x's shape and dtype.

        Args:
            x: (N, L, E); or packed (total, E) with `cu_seqlens`.
            memory: for cross-attention (N, S, E), or packed (total_k, E). None with a `cache` that has it already.
            causal: no element sees a later one.
            mask: boolean, broadcastable to (N, H, L, S), True takes part; not with packed input nor with a cache of
                self-attention.
            rotary: `RoPE.tables` of the positions (N or 1, L, D / 2), packed (total, D / 2). None: positions 0, 1, ...
                of each sequence, or those that follow what is in the cache.
            cu_seqlens: int32 (sequences + 1,), where each packed sequence starts.
            cu_seqlens_k: likewise for a packed `memory`.
            cache: self-attention appends to it and attends to all it holds, without gradient; the caller makes room and
                counts (`KVCache.reserve`, `advance`), as the models do.
        """
        if memory is not None and not self.cross:
            raise ValueError("memory: expected None for self-attention, got a Tensor")
        if mask is not None and (cu_seqlens is not None or (cache is not None and not self.cross)):
            raise ValueError("mask: expected None with packed input and with a cache, got a Tensor")
        if cu_seqlens is None and cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: expected None without cu_seqlens, got a Tensor")
        if rotary is not None and self.rope is None:
            raise ValueError("rotary: expected None for a layer without RoPE, got a value")
        q = self.queries(x)  # (N, L, H, D), packed (total, H, D)
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "softcap": self.softcap,
            "sinks": None if self.sinks is None else own_part(self.sinks),
        }
        if self.cross:
            if cache is not None and cache.memory is not None:
                k, v = (t.to(q.dtype) for t in cache.memory[self.layer])  # (N, K, S, D)
                out = attention(q.transpose(1, 2), k, v, mask=mask, **options).transpose(1, 2)
                return self.out_proj(out.flatten(-2))
            if memory is None:
                raise ValueError("memory: expected a Tensor for cross-attention, got None")
            k, v = self.keys_values(memory)
        else:
            k, v = self.keys_values(x)
            options.update(causal=causal, window=self.window)
            if self.alibi is not None:
                options["alibi_slopes"] = self._slopes(self.alibi, x.device)
            if self.rope is not None:
                if rotary is None:
                    rotary = self.rope.tables(positions(x, cu_seqlens, cache), self.head_dim, x.dtype)
                else:
                    _check_rotary(rotary, q, packed=cu_seqlens is not None)
                q, k = rotate_both(q, k, rotary)

        if cu_seqlens is not None:
            options["dropout_p"] = dropout_p
            out = attention_varlen_of_heads(self.first_head, q, k, v, cu_seqlens, cu_seqlens_k, **options)
            return self.out_proj(out.flatten(-2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None and not self.cross:
            out = cache.attend(self.layer, q, k, v, **options)
        else:
            out = attention_of_heads(self.first_head, q, k, v, mask=mask, dropout_p=dropout_p, **options)
        return self.out_proj(out.transpose(1, 2).flatten(-2))

    def _slopes(self, alibi: ALiBi, device: torch.device) -> Tensor:
        if (slopes := own_part(self.alibi_slopes)) is not None:
            return slopes
        return alibi.slopes(self.all_heads, device)[self.first_head : self.first_head + self.num_heads]

    def queries(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., H, D), normalised if the layer normalises; under tensor parallelism H are this rank's."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., E) -> keys, normalised if the layer normalises, and values, (..., K, D) each."""
        shape = (-1, self.head_dim)
        k, v = self.k_proj(x).unflatten(-1, shape), self.v_proj(x).unflatten(-1, shape)
        return (k if self.k_norm is None else self.k_norm(k)), v


def _check_rotary(rotary: tuple[Tensor, Tensor], q: Tensor, packed: bool) -> None:
    """Check the tables against q (N, L, H, D), or packed (total, H, D): against the projection, because a plan may
    divide the layer's input."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or not all(isinstance(t, Tensor) for t in rotary):
        raise TypeError(f"rotary: expected two Tensors, cos and sin, got {type(rotary).__name__}")
    for table in rotary:
        shape = tuple(table.shape)
        rows = (q.shape[0],) if packed else (1 if shape[:1] == (1,) else q.shape[0], q.shape[1])
        if shape != (*rows, q.shape[-1] // 2):
            expected = "(total, D / 2)" if packed else "(N or 1, L, D / 2)"
            raise ValueError(f"rotary: expected tables {expected} == {(*rows, q.shape[-1] // 2)}, got {shape}")


class FeedForward(nn.Module):
    """down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        check.instance("config", config, TransformerConfig)
        super().__init__()
        E, hidden = config.d_model, config.ff_dim
        self.gate_proj = nn.Linear(E, hidden, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(E, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, E, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        activation = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if self.activation == "swiglu" else activation(gate) * up)


class Block(nn.Module):
    """Self-attention, optional cross-attention and feed-forward; each with a norm and a residual sum.

    Args:
        config: what they are made of.
        cross: with cross-attention.
        layer: which layer of a cache is this one's.
    """

    def __init__(self, config: TransformerConfig, cross: bool = False, layer: int = 0) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer=layer)
        self.self_norm = make_norm(config, config.d_model)
        self.cross_attn = Attention(config, cross=True, layer=layer) if cross else None
        self.cross_norm = make_norm(config, config.d_model) if cross else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.norm_first = config.norm_first

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        memory_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cache: KVCache | None = None,
        **self_attention: Any,
    ) -> Tensor:
        """(N, L, E) -> (N, L, E). `memory_mask` is cross-attention's mask; the rest as in `Attention.forward`."""
        x = self._add(x, self.self_norm, self.self_attn, cu_seqlens=cu_seqlens, cache=cache, **self_attention)
        if self.cross_attn is not None:
            x = self._add(
                x, self.cross_norm, self.cross_attn, memory=memory, mask=memory_mask, cu_seqlens=cu_seqlens,
                cu_seqlens_k=cu_seqlens_k, cache=cache,
            )  # fmt: skip
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def memory_keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`Attention.keys_values` of the cross-attention, for a cache."""
        assert self.cross_attn is not None
        return self.cross_attn.keys_values(memory)

    def _add(self, x: Tensor, norm: nn.Module | None, part: nn.Module, **inputs: Any) -> Tensor:
        assert norm is not None
        if self.norm_first:
            return x + self.dropout(part(norm(x), **inputs))
        return norm(x + self.dropout(part(x, **inputs)))


def positions(x: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
    """Where each element of x (N, L, E) stands, (N or 1, L); of packed x (total, E), (total,)."""
    if cu_seqlens is not None:
        if (division := divided.current()) is None:
            index = torch.arange(x.shape[0], device=x.device)
        else:
            index = division.positions(x.shape[0], x.device, cu_seqlens)
        sequence = torch.bucketize(index, cu_seqlens[1:-1], right=True)
        return index - cu_seqlens[sequence]
    if cache is not None:
        return cache.positions(x.shape[1])
    if (division := divided.current()) is not None:
        return division.positions(x.shape[1], x.device)[None]
    return torch.arange(x.shape[1], device=x.device)[None]
