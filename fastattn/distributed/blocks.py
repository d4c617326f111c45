"""Block masks of the whole sequence, which every rank has: each rank cuts out its part without a message."""

import ctypes
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import BLOCK, EMPTY, FULL, BlockMask, of_tiles, some_lines
from fastattn.distributed.layout import Piece

_CHUNK = 64  # tiles to assemble at a time; each takes 128 KiB of indices
_KEPT: "weakref.WeakKeyDictionary[BlockMask, dict[Any, Any]]" = weakref.WeakKeyDictionary()
"""Results made from a mask, for all layers and steps that share it."""


def _kept(mask: BlockMask, name: Any, make: Callable[[], Any]) -> Any:
    found = _KEPT.setdefault(mask, {})
    if name not in found:
        found[name] = make()
    return found[name]


class SeenTiles:
    """`fastattn.distributed.layout.Tiles` of a mask, by weak reference; two are equal if their masks are."""

    def __init__(self, mask: BlockMask) -> None:
        self._mask = weakref.ref(mask)
        self._shares: dict[tuple[Piece, Piece], float] = {}
        self.name = (mask.shape, _checksum(mask.tensors.table), _checksum(mask.tensors.pool))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeenTiles) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        shape, table, pool = self.name
        return f"block mask {shape} {table:08x}{pool:08x}"

    def share(self, rows: Piece, keys: Piece) -> float:
        """The fraction of these pairs in tiles that are not empty, averaged over batch and heads."""
        if (rows, keys) not in self._shares:
            mask = self._mask()
            assert mask is not None
            tiles = mask.tensors.table[:, :, _tiles_of(rows), _tiles_of(keys)]
            self._shares[rows, keys] = int(tiles.count_nonzero()) / tiles.numel()
        return self._shares[rows, keys]


def seen_tiles(mask: BlockMask) -> SeenTiles:
    """The tiles of a mask, made once."""
    return _kept(mask, "seen", lambda: SeenTiles(mask))


def of_heads(mask: BlockMask, heads: slice) -> BlockMask:
    """The mask of some heads."""
    if mask.shape[1] == 1:
        return mask
    return _kept(mask, (heads.start, heads.stop), lambda: some_lines(mask, lambda x: x[:, heads]))


def cut(mask: BlockMask, rows: Piece, keys: Piece) -> BlockMask:
    """The mask of a piece of queries and a piece of keys, in tiles that start with the pieces."""
    return _kept(mask, (rows, keys), lambda: _cut(mask, rows, keys))


def _cut(mask: BlockMask, rows: Piece, keys: Piece) -> BlockMask:
    least = most = mask.tensors.table
    for dim, piece in ((2, rows), (3, keys)):
        first, last = _tiles_below(piece, least.device)
        least, most = _over(least, dim, first, last, torch.minimum), _over(most, dim, first, last, torch.maximum)
    full = (least == FULL) & (most == FULL)
    for dim, piece in ((2, rows), (3, keys)):
        if piece.length % BLOCK:  # a cut tile is not full: kernels expect all elements of a full one
            full.select(dim, -1).fill_(False)
    mixed = (most != EMPTY) & ~full
    table = full.to(torch.int32) * FULL
    empty = mask.tensors.pool.new_zeros(1, BLOCK, BLOCK)
    kinds, stored, count = [], [empty, empty + 1], 2
    for places in mixed.nonzero().split(_CHUNK):
        tiles = _tiles_at(mask, rows, keys, places)
        whole = tiles.flatten(1).all(1)
        partial = tiles.flatten(1).any(1) & ~whole
        kind = whole.to(torch.int32) * FULL
        new = int(partial.sum())
        kind[partial] = torch.arange(count, count + new, dtype=torch.int32, device=kind.device)
        kinds.append(kind)
        stored.append(tiles[partial].to(torch.uint8))
        count += new
    if kinds:
        table[mixed] = torch.cat(kinds)
    return of_tiles((*mask.shape[:2], rows.length, keys.length), table, torch.cat(stored))


def _tiles_at(mask: BlockMask, rows: Piece, keys: Piece, places: Tensor) -> Tensor:
    """Tiles of the part, False beyond its end: bool (places, BLOCK, BLOCK).

    places: int64 (places, 4), the batch entry, head, row and column of each tile.
    """
    batch, head, *where = places.unbind(1)
    tile, within, there = [], [], []
    for piece, number in zip((rows, keys), where, strict=True):
        index = number[:, None] * BLOCK + torch.arange(BLOCK, device=places.device)
        there.append(index < piece.length)
        position = piece.start + piece.stride * index.clamp(max=piece.length - 1)
        tile.append(position // BLOCK)
        within.append(position % BLOCK)
    (row, column), (i, j), (rows_in, keys_in) = tile, within, there
    batch, head = batch[:, None, None], head[:, None, None]
    kind = mask.tensors.table[batch, head, row[:, :, None], column[:, None, :]].long()
    inside = rows_in[:, :, None] & keys_in[:, None, :]
    return mask.tensors.pool[kind, i[:, :, None], j[:, None, :]].bool() & inside


def _tiles_of(piece: Piece) -> slice:
    """The range of the whole's tiles that covers a piece."""
    return slice(piece.start // BLOCK, (piece.start + (piece.length - 1) * piece.stride) // BLOCK + 1)


def _tiles_below(piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last of the whole's tiles that each tile of a piece overlaps."""
    begin = torch.arange(0, piece.length, BLOCK, device=device)
    end = (begin + BLOCK - 1).clamp(max=piece.length - 1)
    first, last = ((piece.start + piece.stride * x) // BLOCK for x in (begin, end))
    return first, last


def _over(x: Tensor, dim: int, first: Tensor, last: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join the slices of ``x`` from ``first`` to ``last`` along ``dim``."""
    found = x.index_select(dim, first)
    for step in range(1, int((last - first).max()) + 1):
        found = join(found, x.index_select(dim, torch.minimum(first + step, last)))
    return found


def _checksum(x: Tensor) -> int:
    x = x.cpu().contiguous()
    return zlib.crc32((ctypes.c_char * x.nbytes).from_address(x.data_ptr())) if x.nbytes else 0
