"""KV caches in pages: one forgets tokens that have left every window, the other shares a pool among its entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _check as check
from fastattn.nn.cache import KVCache, as_bytes, check_index, check_new, selected

__all__ = ["PagedCache", "SlidingWindowCache"]


class SlidingWindowCache(KVCache):
    """A cache that keeps only the tokens that a window still sees: memory for `window + chunk` tokens, however long the
    text.

    Each entry uses its pages in turn: a new token replaces one that has left every window. Tokens keep their true
    positions, so RoPE, ALiBi and several tokens per step work as in other caches.

    Args:
        num_layers, batch, num_kv_heads, head_dim, device, dtype: as in `KVCache`.
        capacity: tokens of the longest text; they cost 4 bytes per page.
        window: the left side of the attention window.
        chunk: most tokens per step. `prefill` splits a longer prompt.
        page_size: at least 1.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int,
        chunk: int = 128,
        page_size: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.integer("window", window, least=0)
        check.integer("chunk", chunk)
        check.integer("page_size", page_size)
        self.window, self.page_size = window, page_size
        self.chunk = chunk
        # `window + chunk` positions can touch as many pages
        self._pages_per_entry = -(-(window + chunk - 1) // page_size) + 1
        super().__init__(num_layers, batch, capacity, num_kv_heads, head_dim, device=device, dtype=dtype)
        with torch.inference_mode(False):
            self.block_table = self._table(self.batch)

    def _table(self, batch: int) -> Tensor:
        """The page of the cache for each page of a text, for every entry: int32 (batch, pages of a text)."""
        options: dict[str, Any] = {"dtype": torch.int32, "device": self.lens.device}
        table = torch.arange(-(-self.capacity // self.page_size), **options) % self._pages_per_entry
        return torch.arange(batch, **options)[:, None] * self._pages_per_entry + table

    def _buffer_sizes(self, batch: int) -> tuple[int, int]:
        return batch * self._pages_per_entry, self.page_size

    def reserve(self, new: int) -> None:
        if self.chunk is not None and new > self.chunk:
            raise ValueError(f"cache: expected at most chunk == {self.chunk} tokens in a step, got {new}")
        super().reserve(new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        window = options.get("window")
        if window is None or window[0] is None or window[0] > self.window:
            raise ValueError(f"window: expected at most the cache's {self.window} to the left, got {window}")
        return super().attend(layer, q, k, v, **options)

    def crop(self, length: int) -> None:
        raise ValueError("cache: a sliding window cannot go back, because it has forgotten the earlier tokens")

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        check_index(index, self.batch)
        each = torch.arange(self._pages_per_entry, device=index.device)
        pages = (index[:, None] * self._pages_per_entry + each).flatten()
        self._replace_buffers(lambda x: selected(x, pages))
        self._select_lengths(index)
        if self.block_table is not None and index.shape[0] != self.block_table.shape[0]:
            self.block_table = self._table(index.shape[0])


class PagedCache(KVCache):
    """Entries take pages from a common pool as they grow and give them back (Kwon et al. 2023, arXiv:2309.06180).

    `reserve` assigns pages. It reads `lens` only when a page may be full, which on a GPU synchronises every `page_size`
    steps. Under `torch.compile` and CUDA graphs, call it before each step yourself.

    Args:
        num_layers, batch, num_kv_heads, head_dim, device, dtype: as in `KVCache`.
        capacity: tokens of the longest entry; they cost 4 bytes per page.
        num_pages: pages in the pool. None: enough for every entry at full capacity, even after `select` has added
            entries.
        page_size: at least 1.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int | None = None,
        page_size: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.integer("page_size", page_size)
        if num_pages is not None:
            check.integer("num_pages", num_pages)
        for name, value in (("batch", batch), ("capacity", capacity)):  # the pool's size follows from them
            check.integer(name, value)
        self.page_size, self._num_pages = page_size, num_pages
        super().__init__(num_layers, batch, capacity, num_kv_heads, head_dim, device=device, dtype=dtype)
        with torch.inference_mode(False):
            self.block_table = torch.zeros(
                self.batch, -(-self.capacity // page_size), dtype=torch.int32, device=self.lens.device
            )
        self._owned: list[list[int]] = [[] for _ in range(self.batch)]
        self._free = list(range(self.k[0].shape[0]))[::-1]
        self._reserved = 0  # every entry has pages for at least this many more tokens

    def _buffer_sizes(self, batch: int) -> tuple[int, int]:
        pages = self._num_pages if self._num_pages is not None else batch * -(-self.capacity // self.page_size)
        return pages, self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no entry owns."""
        return len(self._free)

    def reserve(self, new: int) -> None:
        check_new(new)
        if new <= self._reserved:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("cache.reserve: expected a call before the compiled step, which cannot assign pages")
        lens = self.lens.tolist()
        self.length = max(lens)
        super().reserve(new)
        self._assign([length + new for length in lens], lens)

    def _assign(self, wanted: list[int], lens: list[int]) -> None:
        """Give each entry b pages for `wanted[b]` tokens."""
        missing = [-(-n // self.page_size) - len(own) for n, own in zip(wanted, self._owned, strict=True)]
        needed = sum(max(n, 0) for n in missing)
        if needed > len(self._free):
            raise ValueError(f"cache: expected {needed} free pages, got {len(self._free)}")
        for own, n in zip(self._owned, missing, strict=True):
            own.extend(self._free.pop() for _ in range(n))
        self._write_table()
        places = [len(own) * self.page_size - n for own, n in zip(self._owned, lens, strict=True)]
        self._reserved = min(*places, self.capacity - self.length)

    def _write_table(self) -> None:
        assert self.block_table is not None
        width = self.block_table.shape[1]
        rows = [own + [0] * (width - len(own)) for own in self._owned]
        self.block_table.copy_(torch.tensor(rows, dtype=torch.int32, device="cpu"))

    def count(self, new: int) -> None:
        super().count(new)
        self._reserved -= new

    def release(self, entry: int) -> None:
        """Empty one entry and return its pages to the pool, so that another sequence can take its place."""
        check.integer("entry", entry, least=0)
        if entry >= self.batch:
            raise ValueError(f"entry: expected 0 to {self.batch - 1}, got {entry}")
        self._free.extend(self._owned[entry])
        self._owned[entry] = []
        self.lens[entry] = 0
        self._reserved = 0

    def crop(self, length: int) -> None:
        super().crop(length)
        kept = -(-length // self.page_size)
        for own in self._owned:
            self._free.extend(own[kept:])
            del own[kept:]
        self._reserved = 0

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        check_index(index, self.batch)
        sources, lens = index.tolist(), self.lens.tolist()
        used = [-(-lens[b] // self.page_size) for b in sources]
        kept = [page for b, n in zip(sources, used, strict=True) for page in self._owned[b][:n]]
        pool = max(self.k[0].shape[0], self._buffer_sizes(len(sources))[0])
        if len(kept) > pool:
            raise ValueError(f"cache: expected a pool of {len(kept)} pages for this selection, got {pool}")
        pages = torch.tensor(kept, dtype=torch.int64, device=self.lens.device)
        # Every entry gets its own copies of pages: entries write to their pages, so they never share one.
        self._free = list(range(pool))[::-1]
        self._owned = [[self._free.pop() for _ in range(n)] for n in used]
        target = torch.tensor([p for own in self._owned for p in own], dtype=torch.int64, device=self.lens.device)

        def moved(x: Tensor) -> Tensor:
            larger = x if pool == x.shape[0] else x.new_empty(pool, *x.shape[1:])
            as_bytes(larger)[target] = as_bytes(x)[pages]
            return larger

        self._replace_buffers(moved)
        self._select_lengths(index)
        if self.block_table is not None and len(sources) != self.block_table.shape[0]:
            self.block_table = self.block_table.new_zeros(len(sources), self.block_table.shape[1])
        self._write_table()
        self._reserved = 0
