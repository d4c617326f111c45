"""KV caches for the layers: what has been seen, as keys and values, so that a step computes new tokens only.

A model makes one (`make_cache`) and fills it; between steps the caller may select, crop or release entries. Batch
entries may have different lengths: `lens` is a tensor, read on the device. `length` is what the host knows, the longest
entry or more, by which a cache that is full raises before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import _check as check
from fastattn.functional.kvcache import FLOAT_DTYPES, QUANTISED, attention_with_kvcache

__all__ = ["DynamicCache", "KVCache", "PagedCache", "SlidingWindowCache"]


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
        length: the longest entry, on the host; entries may be shorter.
        block_table: int32 (batch, pages), or None; see `fastattn.attention_with_kvcache`.
        memory: per layer the keys and values (batch, num_kv_heads, S, head_dim) of what a decoder with
            cross-attention attends to, or None.
        memory_mask: boolean (batch, S), True takes part, or None.
        chunk: most tokens per step, or None for no limit.
        batch_invariant: see `fastattn.attention_with_kvcache`.
    """

    chunk: int | None = None
    batch_invariant: bool = False
    provisional: bool = False
    """Nobody chose the dtype or the device: the first keys do, while the cache is empty."""

    @torch.inference_mode(False)  # an inference tensor could not be written to outside
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
        rows = self._rows(batch)
        self.k, self.v = (
            [torch.empty(*rows, num_kv_heads, head_dim, device=device, dtype=dtype) for _ in range(num_layers)]
            for _ in "kv"
        )
        scaled = self.k if dtype in QUANTISED else []
        self.k_scale, self.v_scale = ([x.new_empty(x.shape[:3], dtype=torch.float32) for x in scaled] for _ in "kv")

    def _replace_buffers(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put ``function`` of it in the place of every buffer that holds something for each token."""
        self.k, self.v, self.k_scale, self.v_scale = (
            [function(x) for x in buffers] for buffers in (self.k, self.v, self.k_scale, self.v_scale)
        )

    def _rows(self, batch: int) -> tuple[int, int]:
        """The two first sizes of a buffer."""
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
        _check_new(new)
        if self.length + new > self.capacity:
            raise ValueError(
                f"cache: expected room for {new} more tokens, got {self.length} of {self.capacity} places in use"
            )

    def settle(self, device: torch.device) -> None:
        """Move an empty cache whose device nobody chose to `device`; the models call it before each step."""
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

        `lens` stays as it is, since all layers of a step append at one place: `advance` moves it.
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
        """Count what a step appended: `new` tokens; or for entry b the first `lengths[b]` of them, the rest being
        padding, which the next step overwrites."""
        _check_new(new)
        if lengths is not None:
            check.lengths("lengths", lengths, self.lens, new)
        self.lens += new if lengths is None else lengths.to(self.lens.dtype)
        self.count(new)

    def count(self, new: int) -> None:
        """The host's share of `advance`: all that is left to do after a step that a CUDA graph has replayed."""
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

        As beam search needs it. Buffers stay where they are if the batch stays what it is.
        """
        _check_index(index, self.batch)
        self._replace_buffers(lambda x: _selected(x, index))
        self._select_lengths(index)

    def _select_lengths(self, index: Tensor) -> None:
        self.lens = _selected(self.lens, index)
        if self.memory is not None:
            self.memory = [(_selected(k, index), _selected(v, index)) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = _selected(self.memory_mask, index)


class DynamicCache(KVCache):
    """A cache that doubles its buffers when they are full. `capacity` is what it starts with."""

    def reserve(self, new: int) -> None:
        _check_new(new)
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


class SlidingWindowCache(KVCache):
    """A cache that keeps only what a window still sees: memory for `window + chunk` tokens, however long the text.

    The pages of an entry are used in turn: a new token takes the place of one that has left every window. Tokens keep
    their true positions, so that RoPE, ALiBi and several tokens per step work as elsewhere.

    Args:
        num_layers, batch, num_kv_heads, head_dim, device, dtype: as in `KVCache`.
        capacity: tokens of the longest text; they cost 4 bytes per page.
        window: the left side of the attention window.
        chunk: most tokens per step. A longer prompt goes in by chunks.
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
        _check_page_size(page_size)
        self.window, self.page_size = window, page_size
        self.chunk = chunk
        self._pages = -(-(window + chunk - 1) // page_size) + 1  # as many as `window + chunk` positions can touch
        super().__init__(num_layers, batch, capacity, num_kv_heads, head_dim, device=device, dtype=dtype)
        with torch.inference_mode(False):
            self.block_table = self._table(self.batch)

    def _table(self, batch: int) -> Tensor:
        """Which page of the cache each page of a text has, for every entry: int32 (batch, pages of a text)."""
        options: dict[str, Any] = {"dtype": torch.int32, "device": self.lens.device}
        table = torch.arange(-(-self.capacity // self.page_size), **options) % self._pages
        return torch.arange(batch, **options)[:, None] * self._pages + table

    def _rows(self, batch: int) -> tuple[int, int]:
        return batch * self._pages, self.page_size

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
        raise ValueError("cache: a sliding window has forgotten what it would need to go back")

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        _check_index(index, self.batch)
        pages = (index[:, None] * self._pages + torch.arange(self._pages, device=index.device)).flatten()
        self._replace_buffers(lambda x: _selected(x, pages))
        self._select_lengths(index)
        if self.block_table is not None and index.shape[0] != self.block_table.shape[0]:
            self.block_table = self._table(index.shape[0])


class PagedCache(KVCache):
    """Entries take pages from a common pool as they grow and give them back (Kwon et al. 2023, arXiv:2309.06180).

    `reserve` assigns pages. It reads `lens` only when a page may be full: on a GPU a synchronisation every `page_size`
    steps. Under `torch.compile` and CUDA graphs call it before each step yourself.

    Args:
        num_layers, batch, num_kv_heads, head_dim, device, dtype: as in `KVCache`.
        capacity: tokens of the longest entry; they cost 4 bytes per page.
        num_pages: pages in the pool. None: enough for every entry at full capacity, also once `select` has made more.
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
        _check_page_size(page_size)
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
        self._room = 0  # tokens for which every entry has a place already, at least

    def _rows(self, batch: int) -> tuple[int, int]:
        pages = self._num_pages if self._num_pages is not None else batch * -(-self.capacity // self.page_size)
        return pages, self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no entry owns."""
        return len(self._free)

    def reserve(self, new: int) -> None:
        _check_new(new)
        if new <= self._room:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "cache.reserve: expected to be called before the compiled step, which cannot assign pages"
            )
        lens = self.lens.tolist()
        self.length = max(lens)
        super().reserve(new)
        self._assign([length + new for length in lens], lens)

    def _assign(self, wanted: list[int], lens: list[int]) -> None:
        """Pages for `wanted[b]` tokens of each entry."""
        missing = [-(-n // self.page_size) - len(own) for n, own in zip(wanted, self._owned, strict=True)]
        needed = sum(max(n, 0) for n in missing)
        if needed > len(self._free):
            raise ValueError(f"cache: expected {needed} free pages, got {len(self._free)}")
        for own, n in zip(self._owned, missing, strict=True):
            own.extend(self._free.pop() for _ in range(n))
        self._write_table()
        places = [len(own) * self.page_size - n for own, n in zip(self._owned, lens, strict=True)]
        self._room = min(*places, self.capacity - self.length)

    def _write_table(self) -> None:
        assert self.block_table is not None
        width = self.block_table.shape[1]
        rows = [own + [0] * (width - len(own)) for own in self._owned]
        self.block_table.copy_(torch.tensor(rows, dtype=torch.int32, device="cpu"))

    def count(self, new: int) -> None:
        super().count(new)
        self._room -= new

    def release(self, entry: int) -> None:
        """Empty one entry and give its pages back, so that another sequence can take its place."""
        check.integer("entry", entry, least=0)
        if entry >= self.batch:
            raise ValueError(f"entry: expected 0 to {self.batch - 1}, got {entry}")
        self._free.extend(self._owned[entry])
        self._owned[entry] = []
        self.lens[entry] = 0
        self._room = 0

    def crop(self, length: int) -> None:
        super().crop(length)
        kept = -(-length // self.page_size)
        for own in self._owned:
            self._free.extend(own[kept:])
            del own[kept:]
        self._room = 0

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        _check_index(index, self.batch)
        sources, lens = index.tolist(), self.lens.tolist()
        used = [-(-lens[b] // self.page_size) for b in sources]
        kept = [page for b, n in zip(sources, used, strict=True) for page in self._owned[b][:n]]
        pool = max(self.k[0].shape[0], self._rows(len(sources))[0])
        if len(kept) > pool:
            raise ValueError(f"cache: expected a pool of {len(kept)} pages for this selection, got {pool}")
        pages = torch.tensor(kept, dtype=torch.int64, device=self.lens.device)
        # Every entry gets pages of its own, filled with copies: pages are written to, hence never shared.
        self._free = list(range(pool))[::-1]
        self._owned = [[self._free.pop() for _ in range(n)] for n in used]
        target = torch.tensor([p for own in self._owned for p in own], dtype=torch.int64, device=self.lens.device)

        def moved(x: Tensor) -> Tensor:
            larger = x if pool == x.shape[0] else x.new_empty(pool, *x.shape[1:])
            _bytes(larger)[target] = _bytes(x)[pages]
            return larger

        self._replace_buffers(moved)
        self._select_lengths(index)
        if self.block_table is not None and len(sources) != self.block_table.shape[0]:
            self.block_table = self.block_table.new_zeros(len(sources), self.block_table.shape[1])
        self._write_table()
        self._room = 0


def _selected(x: Tensor, index: Tensor) -> Tensor:
    """x[index], in x itself where the sizes allow it."""
    chosen = _bytes(x).index_select(0, index).view(x.dtype)
    return x.copy_(chosen) if chosen.shape == x.shape else chosen


def _bytes(x: Tensor) -> Tensor:
    """x for what moves elements: PyTorch's indexing does not know float8."""
    return x.view(torch.uint8) if x.dtype in QUANTISED else x


def _check_page_size(page_size: int) -> None:
    check.integer("page_size", page_size)
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")


def _check_new(new: int) -> None:
    if new < 0:
        raise ValueError(f"new: expected 0 or more, got {new}")


def check_cache(cache: KVCache, num_layers: int, x: Tensor) -> None:
    """Refuse a cache that is not for a stack of this many layers and for x (N, L, E)."""
    check.instance("cache", cache, KVCache)
    if len(cache.k) != num_layers:
        raise ValueError(f"cache: expected one of {num_layers} layers, as the model has, got {len(cache.k)}")
    if cache.batch != x.shape[0]:
        raise ValueError(f"cache.batch: expected {x.shape[0]} as the input has, got {cache.batch}")


def _check_index(index: Tensor, batch: int) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"index: expected an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}"
        )
    if index.ndim != 1 or index.shape[0] == 0:
        raise ValueError(f"index.shape: expected (batch,), got {tuple(index.shape)}")
    if index.device.type == "cpu" and not bool(((index >= 0) & (index < batch)).all()):
        raise ValueError(f"index: expected entries from 0 to {batch - 1}, got {index.tolist()}")


def allocate(
    kind: Callable[..., KVCache],
    sizes: tuple[int, int, int, int, int],
    *,
    like: Tensor,
    model_window: int | None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> KVCache:
    """A cache of this kind, which may be a class or `functools.partial` of one.

    Args:
        sizes: num_layers, batch, capacity, num_kv_heads, head_dim.
        like: a parameter: its dtype and device hold until the first keys are there, unless someone chose them.
        model_window: the left side of the model's window, for a `SlidingWindowCache` that has none of its own.
        dtype, options: arguments of `kind`, before those of a partial.
    """
    given: dict[str, Any] = {}
    cls: Any = kind
    while isinstance(cls, functools.partial):
        cls, given = cls.func, cls.keywords | given
    if not callable(cls) or (isinstance(cls, type) and not issubclass(cls, KVCache)):
        got = f"the class {cls.__name__}" if isinstance(cls, type) else type(cls).__name__
        raise TypeError(f"kind: expected KVCache, a subclass of it, or functools.partial of one, got {got}")
    if dtype is not None:
        options["dtype"] = dtype
    given = given | options
    if isinstance(cls, type) and issubclass(cls, SlidingWindowCache) and given.get("window") is None:
        if model_window is None:
            raise ValueError("window: expected one, since the model has none, for a SlidingWindowCache, got None")
        options["window"] = model_window
    chosen = given.get("dtype") is not None
    if not chosen:
        device = like.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        guess = torch.get_autocast_dtype(device) if autocast else like.dtype
        options["dtype"] = guess if guess.is_floating_point else None
    if given.get("device") is None:
        options["device"] = like.device if like.device.type != "meta" else None
    cache = kind(*sizes, **options)
    cache.provisional = not chosen
    return cache


def escaped(x: Tensor) -> Tensor:
    """x, or a copy that works outside `torch.inference_mode` too."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def _kind_of(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device
