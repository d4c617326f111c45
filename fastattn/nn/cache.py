"""KV caches for the layers: they keep earlier keys and values, so that a step computes new tokens only.

A model makes one (`make_cache`) and fills it; between steps the caller may select, crop or release entries. Batch
entries may have different lengths, `lens`, a tensor on the device. `length` is an upper bound of them on the host: by
it a full cache raises before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import _check as check
from fastattn.functional.kvcache import FLOAT_DTYPES, QUANTISED, attention_with_kvcache

__all__ = ["DynamicCache", "KVCache"]


class KVCache:
    """Room for `capacity` tokens per batch entry, allocated at once. Safe under CUDA graphs: no buffer ever moves.

    Args:
        num_layers: attention layers that share the cache.
        batch: batch entries.
        capacity: tokens per entry.
        num_kv_heads: heads of keys and values.
        head_dim: of keys and of values.
        device, dtype: of keys and values; the dtype is that of the queries. int8 or float8_e4m3fn: keys and values are
            quantised, with a scale for each token and head.

    Attributes:
        k, v: per layer (batch, capacity, num_kv_heads, head_dim).
        k_scale, v_scale: per layer (batch, capacity, num_kv_heads); empty lists where nothing is quantised.
        lens: int32 (batch,), tokens in the cache.
        length: an upper bound of `lens`, on the host.
        block_table: int32 (batch, pages), or None; see `fastattn.attention_with_kvcache`.
        memory: per layer the keys and values (batch, num_kv_heads, S, head_dim) of what a decoder with
            cross-attention attends to, or None.
        memory_mask: boolean (batch, S), True takes part, or None.
        chunk: most tokens per step, or None for no limit.
        batch_invariant: see `fastattn.attention_with_kvcache`.
    """

    chunk: int | None = None
    batch_invariant: bool | Literal["rows"] = False
    provisional: bool = False
    """True while the cache is empty and nobody chose its dtype or device: the first keys will."""

    @torch.inference_mode(False)  # nothing could write to an inference tensor outside inference mode
    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads}
        for name, value in (sizes | {"head_dim": head_dim}).items():
            check.integer(name, value)
        if dtype is not None and dtype not in (*FLOAT_DTYPES, *QUANTISED):
            expected = ", ".join(str(kind).removeprefix("torch.") for kind in (*FLOAT_DTYPES, *QUANTISED))
            raise TypeError(f"dtype: expected one of {expected}, got {dtype}")
        self.capacity = capacity
        self.block_table: Tensor | None = None
        self.memory: list[tuple[Tensor, Tensor]] | None = None
        self.memory_mask: Tensor | None = None
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = 0
        first_sizes = self._buffer_sizes(batch)
        self.k, self.v = (
            [torch.empty(*first_sizes, num_kv_heads, head_dim, device=device, dtype=dtype) for _ in range(num_layers)]
            for _ in "kv"
        )
        scaled = self.k if dtype in QUANTISED else []
        self.k_scale, self.v_scale = ([x.new_empty(x.shape[:3], dtype=torch.float32) for x in scaled] for _ in "kv")

    def _replace_buffers(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer that has an entry per token by ``function`` of it."""
        self.k, self.v, self.k_scale, self.v_scale = (
            [function(x) for x in buffers] for buffers in (self.k, self.v, self.k_scale, self.v_scale)
        )

    def _buffer_sizes(self, batch: int) -> tuple[int, int]:
        """The first two sizes of a buffer: pages and tokens of a page, or entries and capacity."""
        return batch, self.capacity

    @property
    def batch(self) -> int:
        """Batch entries."""
        return self.lens.shape[0]

    def reserve(self, new: int) -> None:
        """Make sure that every entry has room for `new` more tokens; the models call it before each step.

        Raises:
            ValueError: there is no room. The cache is as before.
        """
        check_new(new)
        if self.length + new > self.capacity:
            raise ValueError(
                f"cache: expected room for {new} more tokens, got {self.length} of {self.capacity} places in use"
            )

    def settle(self, device: torch.device) -> None:
        """If the cache is empty and nobody chose its device, move it to `device`. The models call this before each
        step."""
        if not self.provisional or self.length or self.lens.device == device:
            return
        with torch.inference_mode(False):
            self.lens = torch.zeros_like(self.lens, device=device)
            self._replace_buffers(lambda x: torch.empty_like(x, device=device))
            if self.block_table is not None:
                self.block_table = self.block_table.to(device)

    def positions(self, new: int) -> Tensor:
        """Where the next `new` tokens of each entry stand: (batch, new)."""
        return self.lens[:, None] + torch.arange(new, device=self.lens.device, dtype=self.lens.dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append `k` and `v` (B, Hk, L, D) to `layer`, then attend; see `fastattn.attention_with_kvcache`.

        `lens` does not change, because all layers of a step append at the same position; `advance` changes it.
        """
        if self.provisional and not self.length and (k.dtype, k.device) != _kind_of(self.k[layer]):
            with torch.inference_mode(False):  # the layers compute in another dtype than that of their parameters
                self.k[layer], self.v[layer] = (
                    torch.empty_like(x, dtype=k.dtype, device=k.device) for x in (self.k[layer], self.v[layer])
                )
        own = self.k[layer].dtype
        if own not in (k.dtype, *QUANTISED) and not torch.is_autocast_enabled(k.device.type):
            raise TypeError(f"cache: expected dtype {k.dtype} as the keys have, or a quantised one, got dtype {own}")
        lens: int | Tensor = 0 if not self.length else self.lens  # a prompt is told as such
        table = self.block_table
        if self.lens.device != k.device:  # layers on several devices
            lens = lens if isinstance(lens, int) else lens.to(k.device)
            table = None if table is None else table.to(k.device)
        if self.k_scale:
            options |= {"k_scale": self.k_scale[layer], "v_scale": self.v_scale[layer]}
        return attention_with_kvcache(
            q, self.k[layer], self.v[layer], k, v, cache_lens=lens, block_table=table,
            batch_invariant=self.batch_invariant, **options,
        )  # fmt: skip

    def advance(self, new: int, lengths: Tensor | None = None) -> None:
        """Count the `new` tokens that a step appended. With `lengths`, entry b keeps the first `lengths[b]` of them;
        the rest is padding, which the next step overwrites."""
        check_new(new)
        if lengths is not None:
            check.lengths("lengths", lengths, self.lens, new)
        self.lens += new if lengths is None else lengths.to(self.lens.dtype)
        self.count(new)

    def count(self, new: int) -> None:
        """The host's part of `advance`: the only part that a replayed CUDA graph leaves to do."""
        self.length += new

    def crop(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if length < 0:
            raise ValueError(f"length: expected 0 or more, got {length}")
        self.lens.clamp_(max=length)
        self.length = min(self.length, length)

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Entry b becomes a copy of what entry index[b] was; index (batch,), or of any length for another batch.

        Beam search needs this. Buffers stay in place if the batch size does not change.
        """
        check_index(index, self.batch)
        self._replace_buffers(lambda x: selected(x, index))
        self._select_lengths(index)

    def _select_lengths(self, index: Tensor) -> None:
        self.lens = selected(self.lens, index)
        if self.memory is not None:
            self.memory = [(selected(k, index), selected(v, index)) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = selected(self.memory_mask, index)


class DynamicCache(KVCache):
    """A cache that doubles its buffers when they are full. `capacity` is its first size."""

    def reserve(self, new: int) -> None:
        check_new(new)
        needed = self.length + new
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)
        self._replace_buffers(self._grown)

    @torch.inference_mode(False)
    def _grown(self, x: Tensor) -> Tensor:
        larger = x.new_empty(x.shape[0], self.capacity, *x.shape[2:])
        larger[:, : x.shape[1]] = x
        return larger


def selected(x: Tensor, index: Tensor) -> Tensor:
    """x[index], in x itself where the sizes allow it."""
    chosen = as_bytes(x).index_select(0, index).view(x.dtype)
    return x.copy_(chosen) if chosen.shape == x.shape else chosen


def as_bytes(x: Tensor) -> Tensor:
    """x viewed as bytes for indexing, which PyTorch lacks for float8."""
    return x.view(torch.uint8) if x.dtype in QUANTISED else x


def check_new(new: int) -> None:
    if new < 0:
        raise ValueError(f"new: expected 0 or more, got {new}")


def check_index(index: Tensor, batch: int) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"index: expected an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}"
        )
    if index.ndim != 1 or index.shape[0] == 0:
        raise ValueError(f"index.shape: expected (batch,), got {tuple(index.shape)}")
    if index.device.type == "cpu" and not bool(((index >= 0) & (index < batch)).all()):
        raise ValueError(f"index: expected entries from 0 to {batch - 1}, got {index.tolist()}")


def _kind_of(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device
