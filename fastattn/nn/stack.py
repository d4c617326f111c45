"""Stacks of blocks: `Encoder` and `Decoder`, from hidden states to hidden states.

Dimensions in comments: N batch, L length, S source length, E d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import _check as check
from fastattn.functional import divided
from fastattn.nn import keywords
from fastattn.nn.block import Block, make_norm, positions
from fastattn.nn.cache import KVCache
from fastattn.nn.config import TransformerConfig
from fastattn.nn.model_cache import allocate, check_cache, escaped
from fastattn.nn.position import Learned, PositionalEncoding, RoPE, Sinusoidal

__all__ = ["Decoder", "Encoder"]


class _Stack(nn.Module):
    """Positions, blocks and a final norm."""

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        check.instance("config", config, TransformerConfig)
        super().__init__()
        self.config = config
        absolute = isinstance(config.position, (Learned, Sinusoidal))
        self.position = _encoding(config) if absolute else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, cross, layer) for layer in range(config.num_layers))
        final_norm = config.norm_first if config.final_norm is None else config.final_norm
        self.norm = make_norm(config, config.d_model) if final_norm else None
        self._initialise(residual_sums=config.num_layers * (3 if cross else 2))

    @torch.no_grad()
    def _initialise(self, residual_sums: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_in_sum = name.endswith(("out_proj", "down_proj"))
                std = self.config.init_std / math.sqrt(residual_sums) if ends_in_sum else self.config.init_std
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _run(
        self,
        x: Tensor,
        memory: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        cache: KVCache | None = None,
        **inputs: Any,
    ) -> Tensor:
        expected = "(total, d_model)" if cu_seqlens is not None else "(batch, length, d_model)"
        if x.ndim != (2 if cu_seqlens is not None else 3) or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x.shape: expected {expected} with d_model == {self.config.d_model}, got {tuple(x.shape)}"
            )
        rope = self.config.position if isinstance(self.config.position, RoPE) else None
        rotary = None
        if rope is not None:
            rotary = rope.tables(positions(x, cu_seqlens, cache), self.config.dim_per_head, x.dtype)
        elif self.position is not None:
            length, most = _positions_needed(x, cu_seqlens, cache), self.position.table.shape[0]
            if length > most:
                raise ValueError(f"x: expected at most max_len == {most} positions, got {length}")
            x = x + self.position.at(positions(x, cu_seqlens, cache), x)
        x = self.dropout(x)
        for block in self.blocks:
            inputs_of_block = dict(inputs, rotary=rotary, cu_seqlens=cu_seqlens, cache=cache)
            if self.config.checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, memory, use_reentrant=False, **inputs_of_block)
            else:
                x = block(x, memory, **inputs_of_block)
        return x if self.norm is None else self.norm(x)


class Encoder(_Stack):
    """A stack of blocks in which every element sees every other one. Args: config: the settings of the stack."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    @keywords.blocks
    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Encode x; returns a tensor of its shape. Its values at padding have no meaning.

        Args:
            x: (N, L, E); or packed (total, E) with `cu_seqlens`.
            lengths: integer (N,): elements from there on are padding.
            mask: boolean (N, L), True takes part: for padding that is not at the end.
            cu_seqlens: int32 (sequences + 1,), where each packed sequence starts. Padding then costs nothing.
        """
        keep = padding_mask(x, lengths, mask, cu_seqlens)
        return self._run(x, None, cu_seqlens=cu_seqlens, mask=_for_keys(keep))


class Decoder(_Stack):
    """A stack of blocks in which an element sees itself and earlier ones; with `cross` also an encoder's output.

    Args:
        config: the settings of the stack.
        cross: whether the blocks have cross-attention to a `memory`.
    """

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        super().__init__(config, cross)
        self.cross = cross

    @keywords.blocks
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Decode x; returns a tensor of its shape. Its values at padding have no meaning.

        Args:
            x: (N, L, E); or packed (total, E) with `cu_seqlens`. Padding may stand at the end only, where causal order
                hides it.
            memory: (N, S, E), or packed (total_k, E), if the decoder has cross-attention. None if `make_cache` has
                filled the cache from it.
            lengths: integer (N,), with a cache: elements of x from there on are padding, which the cache does not keep.
            memory_lengths: integer (N,): elements of `memory` from there on are padding.
            memory_mask: boolean (N, S), True takes part: for padding that is not at the end.
            cu_seqlens: int32 (sequences + 1,), where each packed sequence starts.
            cu_seqlens_k: the same for a packed `memory`.
            cache: from `make_cache`. x continues the sequences in the cache, which then keeps x too. No gradient.
        """
        if cache is not None:
            check_cache(cache, len(self.blocks), x)
        remembered = cache is not None and cache.memory is not None
        if self.cross and (memory is None) != remembered:
            got = "None" if memory is None else "both a Tensor and a cache that has one"
            raise ValueError(f"memory: expected one, as a Tensor or in the cache, got {got}")
        if not self.cross and memory is not None:
            raise ValueError("memory: expected None for a decoder without cross-attention, got a Tensor")
        keep = padding_mask(memory, memory_lengths, memory_mask, cu_seqlens_k, "memory_")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths: expected None without a cache, since causal order hides padding at the end")
        else:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with a cache, got a Tensor")
            if self.training and self.config.dropout > 0:
                raise RuntimeError("cache: expected evaluation mode, since a cache has no dropout: call eval() first")
            if lengths is not None:
                check.lengths("lengths", lengths, x, x.shape[1])
            cache.settle(x.device)
            cache.reserve(x.shape[1])
            keep = cache.memory_mask if remembered else keep
        out = self._run(
            x, memory, causal=True, memory_mask=_for_keys(keep), cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
            cache=cache,
        )  # fmt: skip
        if cache is not None:
            cache.advance(x.shape[1], lengths)
        return out

    @torch.no_grad()
    def make_cache(
        self,
        batch: int,
        capacity: int,
        kind: Callable[..., KVCache] = KVCache,
        *,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> KVCache:
        """An empty cache of this decoder's shape, on its device.

        Args:
            batch: batch entries.
            capacity: tokens per entry.
            kind, options: `KVCache`, `DynamicCache`, `SlidingWindowCache` or `PagedCache`, a subclass, or
                `functools.partial` of one, and its own arguments. A `SlidingWindowCache` takes the model's `window` by
                default.
            memory, memory_lengths, memory_mask: as in `forward`. This method computes the keys and values of `memory`,
                once.
            dtype: of keys and values. None: the dtype of the first keys, in which the layers compute, also under
                autocast and with quantised or wrapped layers. The first keys also set the device.
        """
        config = self.config
        cache = allocate(
            kind, (config.num_layers, batch, capacity, self._kv_heads(), config.dim_per_head),
            like=next(self.parameters()), model_window=None if config.window is None else config.window[0], dtype=dtype,
            **options,
        )  # fmt: skip
        if self.cross:
            if memory is None:
                raise ValueError("memory: expected a Tensor for a decoder with cross-attention, got None")
            pairs = [block.memory_keys_values(memory) for block in self.blocks]  # pyright: ignore
            cache.memory = [(escaped(k.transpose(1, 2)), escaped(v.transpose(1, 2))) for k, v in pairs]
            keep = padding_mask(memory, memory_lengths, memory_mask, None, "memory_")
            cache.memory_mask = None if keep is None else escaped(keep)
        return cache

    def _kv_heads(self) -> int:
        """The number of key and value heads; of this rank's if a plan divides them."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.self_attn.num_kv_heads


def padding_mask(
    x: Tensor | None, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, prefix: str = ""
) -> Tensor | None:
    """The elements of x (N, S, E) that take part, boolean (N, S), or None for all; from one of three descriptions."""
    given = [f"{prefix}lengths"] * (lengths is not None) + [f"{prefix}mask"] * (mask is not None)
    given += [f"{prefix}cu_seqlens"] * (cu_seqlens is not None)
    if len(given) > 1:
        raise ValueError(f"{given[-1]}: expected one description of padding, got {' and '.join(given)}")
    if x is None or (lengths is None and mask is None):
        return None
    if lengths is not None:
        check.lengths(given[0], lengths, x, whole_length(x))
        return positions(x) < lengths[:, None]
    if not isinstance(mask, Tensor):
        raise TypeError(f"{given[0]}: expected a Tensor or None, got {type(mask).__name__}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{given[0]}.shape: expected {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{given[0]}.dtype: expected bool, True takes part, got {mask.dtype}")
    return mask


def whole_length(x: Tensor) -> int:
    """The whole length of x (N, L, ...); under context parallelism this process holds a part of it."""
    division = divided.current()
    return x.shape[1] if division is None else division.whole(x.shape[1])


def _positions_needed(x: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> int:
    """How many positions x needs, as far as the host knows without waiting."""
    if cu_seqlens is None:
        return whole_length(x) + (0 if cache is None else cache.length)
    if not check.readable(cu_seqlens) or cu_seqlens.shape[0] < 2:
        return 0
    return int(cu_seqlens.diff().max())


def _for_keys(keep: Tensor | None) -> Tensor | None:
    """Expand (N, S) to the mask (N, 1, 1, S) for every head and query."""
    return None if keep is None else keep[:, None, None, :]


def _encoding(config: TransformerConfig) -> PositionalEncoding:
    kind = "learned" if isinstance(config.position, Learned) else "sinusoidal"
    assert isinstance(config.position, (Learned, Sinusoidal))
    return PositionalEncoding(config.d_model, config.position.max_len, 0.0, kind, batch_first=True)
