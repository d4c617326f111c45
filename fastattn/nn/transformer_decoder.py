"""The Transformer's decoder (Vaswani et al. 2017, section 3.1) with torch.nn's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import keywords
from fastattn.nn.attention import MultiheadAttention, adopt
from fastattn.nn.cache import KVCache
from fastattn.nn.model_cache import escaped
from fastattn.nn.parts import DecoderBlocks
from fastattn.nn.tracing import fx_leaf, refuse_torchscript
from fastattn.nn.transformer_stack import empty_cache, is_batch_first, is_causal_mask, next_step


class TransformerDecoderLayer(DecoderBlocks):
    """Drop-in replacement for `torch.nn.TransformerDecoderLayer`: self-attention, cross-attention, feed-forward.

    `TransformerDecoder` describes shapes and masks. Subclasses may override `_sa_block`, `_mha_block` and `_ff_block`.
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention

    @keywords.transformer
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        adopt(self.self_attn)
        adopt(self.multihead_attn)

    forward = fx_leaf(keywords.decode(nn.TransformerDecoderLayer.forward))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    def step(self, tgt: Tensor, cache: KVCache, layer: int = 0) -> Tensor:
        """`forward` with a causal mask for the elements that follow those in `cache`; see `TransformerDecoder.step`."""
        assert cache.memory is not None
        k, v = cache.memory[layer]
        mask = None if cache.memory_mask is None else cache.memory_mask[:, None, None, :]
        x = tgt
        if self.norm_first:
            x = x + self.dropout1(self.self_attn.step(self.norm1(x), cache, layer))
            x = x + self.dropout2(self.multihead_attn.step_cross(self.norm2(x), k, v, mask))
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self.dropout1(self.self_attn.step(x, cache, layer)))
        x = self.norm2(x + self.dropout2(self.multihead_attn.step_cross(x, k, v, mask)))
        return self.norm3(x + self._ff_block(x))

    def memory_keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`MultiheadAttention.keys_values` of the cross-attention, for a cache."""
        return self.multihead_attn.keys_values(memory)


class TransformerDecoder(nn.TransformerDecoder):
    """Drop-in replacement for `torch.nn.TransformerDecoder`: a stack of copies of `decoder_layer`."""

    __init__ = keywords.stack(nn.TransformerDecoder.__init__)

    @fx_leaf
    @keywords.decode
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass `tgt` through the layers, which attend to `memory`, and the final norm; returns a tensor of its shape.

        Args:
            tgt: (N, T, E) with `batch_first`, else (T, N, E); or (T, E) unbatched.
            memory: the encoder's output: (N, S, E), (S, N, E) or (S, E).
            tgt_mask: (T, T) or (N*H, T, T), boolean (True = may not attend) or float (added to the scores).
            memory_mask: (T, S) or (N*H, T, S), boolean or float in the same sense.
            tgt_key_padding_mask: (N, T), or (T) unbatched, boolean (True = padding) or float.
            memory_key_padding_mask: (N, S) or (S), in the same sense.
            tgt_is_causal: whether `tgt_mask` is the causal mask; None as in `TransformerEncoder.forward`.
            memory_is_causal: promises that `memory_mask` is the causal mask.
        """
        causal = is_causal_mask(tgt_mask, tgt_is_causal, tgt, self.layers)
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else self.norm(x)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    @torch.no_grad()
    def make_cache(
        self,
        memory: Tensor,
        capacity: int,
        kind: Callable[..., KVCache] = KVCache,
        *,
        memory_key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> KVCache:
        """A cache for `step`: no target elements yet, and the keys and values of `memory`, computed once.

        Args:
            memory: the encoder's output: (N, S, E) with `batch_first`, else (S, N, E).
            capacity: target elements per sequence.
            kind, options: as in `TransformerEncoder.make_cache`.
            memory_key_padding_mask: boolean (N, S), True = padding.
        """
        if memory.dim() != 3:
            raise ValueError(f"memory: expected 3 dimensions, got shape {tuple(memory.shape)}")
        N, S = memory.shape[:2] if is_batch_first(self.layers) else memory.shape[:2][::-1]
        cache = empty_cache(self.layers, TransformerDecoderLayer, N, capacity, kind, options)
        if memory_key_padding_mask is not None:
            if memory_key_padding_mask.dtype != torch.bool:
                raise TypeError(f"memory_key_padding_mask.dtype: expected bool, got {memory_key_padding_mask.dtype}")
            if memory_key_padding_mask.shape != (N, S):
                raise ValueError(
                    f"memory_key_padding_mask.shape: expected {(N, S)}, got {tuple(memory_key_padding_mask.shape)}"
                )
            cache.memory_mask = escaped(~memory_key_padding_mask)
        pairs = [layer.memory_keys_values(memory) for layer in self.layers]  # pyright: ignore
        cache.memory = [(escaped(k), escaped(v)) for k, v in pairs]
        return cache

    def step(self, tgt: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Append `tgt` to the elements in `cache`; return what `forward` with a causal mask gives for them.

        Args:
            tgt: (N, T, E) with `batch_first`, else (T, N, E).
            cache: from `make_cache`.
            lengths: integer (N,): elements of `tgt` from there on are padding, which the cache does not keep.

        Returns:
            A tensor of tgt's shape, without gradient.
        """
        if cache.memory is None:
            raise ValueError("cache: expected one from TransformerDecoder.make_cache, got one without a memory")
        return next_step(self, tgt, cache, lengths)
