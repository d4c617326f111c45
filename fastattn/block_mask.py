"""Block-sparse masks in tiles: empty tiles cost nothing, and full tiles read no mask."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Side of a tile. Every launch configuration has tiles that divide it."""

EMPTY, FULL = 0, 1  # the first two tiles of every pool


class BlockTensors(NamedTuple):
    """The tensors that kernels read. A line is one row or one column of tiles of one head and batch entry."""

    query_offsets: Tensor
    """int32 (B or 1, H or 1, row tiles, 3): where in the entries its partial tiles begin, its full ones, the end"""
    query_entries: Tensor
    """int32 (entries, 2): position along the keys in tiles, ascending within each kind, and which tile of the pool"""
    key_offsets: Tensor
    """the same for columns of tiles"""
    key_entries: Tensor
    table: Tensor
    """int32 (B or 1, H or 1, row tiles, column tiles): which tile of the pool; 0 is empty, 1 is full"""
    pool: Tensor
    """uint8 (tiles, BLOCK, BLOCK)"""


class BlockMask:
    """A boolean mask (B or 1, H or 1, Lq, Lk) in tiles; True takes part. It stores only tiles that are neither full nor
    empty.

    Make one with `from_mask`, `from_documents`, `from_predicate` or `from_flex`, once for all layers and steps that
    share it, and give it to `fastattn.attention` as ``block_mask``. Forward and backward visit no empty tile.
    """

    def __init__(self, shape: tuple[int, int, int, int], tensors: BlockTensors) -> None:
        self.shape = shape
        self.tensors = tensors

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, and check the indices, which kernels follow blindly."""
        self.__dict__.update(state)
        tensors = self.tensors
        bounds = (
            (tensors.query_offsets, len(tensors.query_entries)),
            (tensors.key_offsets, len(tensors.key_entries)),
            (tensors.query_entries[:, 0], tensors.table.shape[3] - 1),
            (tensors.key_entries[:, 0], tensors.table.shape[2] - 1),
            *((tiles, len(tensors.pool) - 1) for tiles in (tensors.query_entries[:, 1], tensors.key_entries[:, 1])),
            (tensors.table, len(tensors.pool) - 1),
        )
        if any(index.numel() and (index.min() < 0 or index.max() > last) for index, last in bounds):
            raise ValueError(
                "BlockMask: expected indices of its own tiles in the stored mask, got others: a damaged file"
            )

    @classmethod
    def from_mask(cls, mask: Tensor) -> "BlockMask":
        """From a dense mask, bool, (Lq, Lk), (H or 1, Lq, Lk) or (B or 1, H or 1, Lq, Lk).

        Raises:
            TypeError, ValueError: not such a mask.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool Tensor, got {got}")
        if not 2 <= mask.ndim <= 4:
            raise ValueError(f"mask: expected (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), got {tuple(mask.shape)}")
        mask = mask[(None,) * (4 - mask.ndim)]
        batch, heads, q_len, kv_len = mask.shape
        shape = (batch, heads, q_len, kv_len)
        return cls._build(lambda first, last: mask[:, :, first:last], shape, mask.device)

    @classmethod
    def from_documents(
        cls, documents: Tensor, key_documents: Tensor | None = None, *, causal: bool = False
    ) -> "BlockMask":
        """Attention within documents: a query sees the keys of the same document.

        Args:
            documents: integer (Lq,) or (B, Lq): which document each query belongs to, in any order.
            key_documents: likewise for the keys; None means the same as the queries.
            causal: also only keys up to the query's own index.

        Raises:
            TypeError, ValueError: not such tensors.
        """
        if not isinstance(causal, bool):
            raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
        keys = documents if key_documents is None else key_documents
        for name, ids in (("documents", documents), ("key_documents", keys)):
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
                got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(f"{name}: expected an integer Tensor, got {got}")
            if not 1 <= ids.ndim <= 2:
                raise ValueError(f"{name}: expected (L,) or (B, L), got {tuple(ids.shape)}")
        if documents.ndim != keys.ndim or documents.shape[:-1] != keys.shape[:-1] or documents.device != keys.device:
            raise ValueError(
                f"key_documents: expected the batch and device of documents, {tuple(documents.shape)} on "
                f"{documents.device}, got {tuple(keys.shape)} on {keys.device}"
            )
        rows, cols = (x[None] if x.ndim == 1 else x for x in (documents, keys))
        index = torch.arange(max(rows.shape[1], cols.shape[1]), device=rows.device)

        def strip(first: int, last: int) -> Tensor:
            same = rows[:, first:last, None] == cols[:, None, :]
            if causal:
                same &= index[first:last, None] >= index[: cols.shape[1]]
            return same[:, None]

        return cls._build(strip, (rows.shape[0], 1, rows.shape[1], cols.shape[1]), rows.device)

    @classmethod
    def from_predicate(
        cls, predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], shape: tuple[int, int, int, int],
        device: torch.device | str = "cpu",
    ) -> "BlockMask":  # fmt: skip
        """From a function of indices: ``predicate(b, h, i, j)`` says whether query i sees key j.

        It is called with integer tensors that broadcast to (B, H, rows, Lk), a strip of 128 rows at a time, and returns
        a bool tensor that broadcasts to the same; it may index tensors of its own with them.

        Args:
            predicate: the function.
            shape: (B, H, Lq, Lk); 1 for B or H where the mask is the same for all.
            device: of the mask, and of the indices.

        Raises:
            TypeError, ValueError: a result of the wrong dtype or shape, or not such a shape.
        """
        if not callable(predicate):
            raise TypeError(f"predicate: expected a function of (b, h, i, j), got {type(predicate).__name__}")
        sizes = [n for n in shape if isinstance(n, int) and n >= 0] if isinstance(shape, (tuple, list)) else []
        if len(sizes) != 4 or len(shape) != 4 or any(isinstance(n, bool) for n in sizes):
            raise ValueError(f"shape: expected (B, H, Lq, Lk), got {shape}")
        batch, heads, q_len, kv_len = shape

        def index(first: int, last: int, dim: int) -> Tensor:
            return torch.arange(first, last, device=device).view([-1 if d == dim else 1 for d in range(4)])

        def strip(first: int, last: int) -> Tensor:
            try:
                keep = predicate(index(0, batch, 0), index(0, heads, 1), index(first, last, 2), index(0, kv_len, 3))
            except RuntimeError as error:
                if "Boolean value of Tensor" not in str(error):
                    raise
                text = "predicate: expected &, | and ~ between tensors, got `and`, `or`, `not` or `if`"
                raise TypeError(text) from error
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
                got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
                raise TypeError(f"predicate: expected it to return a bool Tensor, got {got}")
            full = (batch, heads, last - first, kv_len)
            try:
                return keep.expand(full)
            except RuntimeError:
                raise ValueError(
                    f"predicate: expected a result that broadcasts to {full}, got {tuple(keep.shape)}"
                ) from None

        return cls._build(strip, (batch, heads, q_len, kv_len), torch.device(device))

    @classmethod
    def from_flex(cls, block_mask: Any) -> "BlockMask":
        """From FlexAttention's, a `torch.nn.attention.flex_attention.BlockMask`.

        Its full blocks become full and blocks in neither list empty; only partial blocks call ``mask_mod``. Where one
        batch entry or head serves all, ``mask_mod`` gets index 0.

        Args:
            block_mask: of any block size, lengths need not be multiples of it; with at most two batch dimensions.

        Raises:
            TypeError, ValueError: not such a mask.
            RuntimeError: it was sliced, and PyTorch has taken its ``mask_mod`` away.
        """
        names = ("kv_num_blocks", "kv_indices", "seq_lengths", "BLOCK_SIZE", "mask_mod")
        if any(not hasattr(block_mask, name) for name in names):
            raise TypeError(
                f"block_mask: expected a torch.nn.attention.flex_attention.BlockMask, got {type(block_mask).__name__}"
            )
        if not 2 <= block_mask.kv_indices.ndim <= 4:
            raise ValueError(
                f"block_mask: expected kv_indices (B, H, rows, columns), got shape {tuple(block_mask.kv_indices.shape)}"
            )
        (q_len, kv_len), sizes = block_mask.seq_lengths, tuple(block_mask.BLOCK_SIZE)
        rows, columns = -(-q_len // sizes[0]), -(-kv_len // sizes[1])
        partial = _flex_list(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
        full = torch.zeros_like(partial)
        if block_mask.full_kv_num_blocks is not None:
            full = _flex_list(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
            full, partial = torch.broadcast_tensors(full, partial)
        batch, heads, given, _ = partial.shape
        if given < rows:
            raise ValueError(
                f"block_mask: expected {rows} rows of blocks for seq_lengths {(q_len, kv_len)}, got {given}"
            )
        # A cell lies within one block of theirs and one tile of ours.
        height, width = (math.gcd(size, BLOCK) for size in sizes)
        device = partial.device

        def strip(first: int, last: int) -> Tensor:
            top = torch.arange(first, last, height, device=device)
            left = torch.arange(0, kv_len, width, device=device)
            block = (slice(None), slice(None), top[:, None] // sizes[0], left // sizes[1])
            seen = full[block][:, :, :, None, :, None].repeat(1, 1, 1, height, 1, width)
            b, h, y, x = (partial & ~full)[block].nonzero(as_tuple=True)
            if len(b):  # a table that the function captures is only as long as there are positions
                i = (top[y, None] + torch.arange(height, device=device)).clamp(max=q_len - 1)
                j = (left[x, None] + torch.arange(width, device=device)).clamp(max=kv_len - 1)
                seen[b, h, y, :, x] = _ask_flex(block_mask.mask_mod, b, h, i, j)
            return seen.flatten(4, 5).flatten(2, 3)[:, :, : last - first, :kv_len]

        return cls._build(strip, (batch, heads, q_len, kv_len), device)

    @classmethod
    def _build(
        cls, strip: Callable[[int, int], Tensor], shape: tuple[int, int, int, int], device: torch.device
    ) -> "BlockMask":
        """``strip(first, last)`` gives the mask of some query rows, so memory holds one strip and never Lq x Lk."""
        batch, heads, q_len, kv_len = shape
        columns = -(-kv_len // BLOCK)
        kinds, tiles = [], [torch.zeros(1, BLOCK, BLOCK, dtype=torch.uint8, device=device)]
        tiles.append(tiles[0] + 1)
        count = 2
        for first in range(0, q_len, BLOCK):
            rows = strip(first, min(first + BLOCK, q_len))
            rows = pad(rows, (0, columns * BLOCK - kv_len, 0, BLOCK - rows.shape[2]))
            cut = rows.view(batch, heads, BLOCK, columns, BLOCK).transpose(2, 3)  # (B, H, columns, BLOCK, BLOCK)
            full = cut.all(-1).all(-1)
            partial = cut.any(-1).any(-1) & ~full
            stored = cut[partial]
            kind = full.to(torch.int32) * FULL
            kind[partial] = torch.arange(count, count + len(stored), dtype=torch.int32, device=device)
            count += len(stored)
            kinds.append(kind)
            tiles.append(stored.to(torch.uint8))
        table = (
            torch.stack(kinds, 2) if kinds else torch.zeros(batch, heads, 0, columns, dtype=torch.int32, device=device)
        )
        return of_tiles(shape, table, torch.cat(tiles))

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device."""
        return BlockMask(self.shape, BlockTensors(*(t.to(device) for t in self.tensors)))

    @property
    def device(self) -> torch.device:
        """The device of its tensors, on which q, k and v must be."""
        return self.tensors.table.device

    @property
    def sparsity(self) -> float:
        """Fraction of tiles that are empty: what attention does not compute."""
        table = self.tensors.table
        return (table == EMPTY).double().mean().item() if table.numel() else 0.0

    def to_dense(self) -> Tensor:
        """The bool mask (B or 1, H or 1, Lq, Lk) in full."""
        return dense_rows(self.tensors, (0, self.shape[2]), (0, self.shape[3]))

    def __repr__(self) -> str:
        partial = len(self.tensors.pool) - 2
        known = "" if self.device.type == "meta" else f" sparsity={self.sparsity:.1%},"
        return f"BlockMask(shape={self.shape},{known} partial tiles={partial}, device={self.device})"


def of_tiles(shape: tuple[int, int, int, int], table: Tensor, pool: Tensor) -> BlockMask:
    """The mask of these tiles; ``table`` and ``pool`` as `BlockTensors` has them."""
    by_query, by_key = _lines(table), _lines(table.transpose(2, 3))
    return BlockMask(shape, BlockTensors(*by_query, *by_key, table.contiguous(), pool))


def some_lines(mask: BlockMask, cut: Callable[[Tensor], Tensor]) -> BlockMask:
    """The mask of some batch entries and heads; ``cut`` selects them in a tensor (B or 1, H or 1, ...). The pool stays
    whole."""
    tensors = mask.tensors
    query, key, table = (cut(x).contiguous() for x in (tensors.query_offsets, tensors.key_offsets, tensors.table))
    shape = (table.shape[0], table.shape[1], *mask.shape[2:])
    return BlockMask(shape, BlockTensors(query, tensors.query_entries, key, tensors.key_entries, table, tensors.pool))


def _lines(table: Tensor) -> tuple[Tensor, Tensor]:
    """(offsets, entries) of a table (B, H, lines, tiles), as `BlockTensors` has them."""
    flat = table.flatten(0, 2)
    tiles = flat.shape[1]
    partial, full = flat > FULL, flat == FULL
    partials, fulls = partial.sum(1), full.sum(1)
    start = (partials + fulls).cumsum(0) - partials - fulls
    offsets = torch.stack([start, start + partials, start + partials + fulls], 1)
    line, place = torch.cat([partial, full], 1).nonzero(as_tuple=True)
    position = place % max(tiles, 1)
    entries = torch.stack([position, flat[line, position].long()], 1)
    return offsets.to(torch.int32).view(*table.shape[:3], 3), entries.to(torch.int32)


def _flex_list(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """bool (B, H, rows, columns): the blocks that one of FlexAttention's two lists has."""
    counts, indices = (x[(None,) * (4 - indices.ndim)] for x in (counts, indices))
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    place = torch.where(listed, indices, columns).long()  # one more column, which takes the entries beyond the count
    found = torch.zeros(*place.shape[:3], columns + 1, dtype=torch.bool, device=place.device)
    return found.scatter_(3, place, True)[..., :columns]


def _ask_flex(mask_mod: Callable[..., Tensor], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """bool (cells, height, width): ``mask_mod``, called as FlexAttention does, with one position at a time, under vmap.

    ``b`` and ``h`` are (cells,), ``i`` (cells, height), ``j`` (cells, width).
    """
    from torch.nn.attention.flex_attention import create_mask

    def cell(n: Tensor, _: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return mask_mod(b[n], h[n], i[n, y], j[n, x])

    return create_mask(cell, len(b), 1, i.shape[1], j.shape[1], b.device)[:, 0]


def dense_rows(tensors: BlockTensors | list[Tensor], rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """bool (B or 1, H or 1, rows, keys): the mask of query rows ``rows[0] .. rows[1]``, keys ``keys[0] .. keys[1]``."""
    *_, table, pool = tensors
    (row, row_end), (key, key_end) = ((a // BLOCK, -(-b // BLOCK)) for a, b in (rows, keys))
    tiles = pool[table[:, :, row:row_end, key:key_end].long()]  # (B, H, row tiles, column tiles, BLOCK, BLOCK)
    dense = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return (
        dense[:, :, rows[0] - row * BLOCK : rows[1] - row * BLOCK, keys[0] - key * BLOCK : keys[1] - key * BLOCK] != 0
    )


def check_block_mask(block_mask: Any, full: tuple[int, int, int, int], device: torch.device) -> BlockMask:
    """Raise unless ``block_mask`` fits scores (B, Hq, Lq, Lk)."""
    if not isinstance(block_mask, BlockMask):
        kind, hint = type(block_mask), ""
        if isinstance(block_mask, Tensor):
            hint = "; a dense mask goes to mask=, or through BlockMask.from_mask"
        elif kind.__module__ == "torch.nn.attention.flex_attention":
            hint = ", FlexAttention's; fastattn.BlockMask.from_flex(block_mask) makes ours of it"
        raise TypeError(f"block_mask: expected a fastattn.BlockMask or None, got {kind.__name__}{hint}")
    fits = all(own in allowed for own, allowed in zip(block_mask.shape[:2], ((1, full[0]), (1, full[1])), strict=True))
    if not fits or block_mask.shape[2:] != tuple(full[2:]):
        raise ValueError(
            f"block_mask.shape: expected (B or 1, Hq or 1, Lq, Lk) with (B, Hq, Lq, Lk) == {tuple(full)}, "
            f"got {tuple(block_mask.shape)}"
        )
    if block_mask.device != device:
        raise ValueError(f"block_mask.device: expected {device}, got {block_mask.device}")
    return block_mask


# Only tensors and sizes, so that `torch.load(weights_only=True)`, the default, reads them.
torch.serialization.add_safe_globals([BlockMask, BlockTensors])
