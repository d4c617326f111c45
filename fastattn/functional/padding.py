"""A padded batch without its padding: the rows that are kept, one sequence after the other, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.direct import Way, way


class Kept(NamedTuple):
    """The rows of a batch outside its padding."""

    places: Tensor
    """int64 (total,): where they stand in the batch, (N, S, E) or (S, N, E), flattened to rows"""
    cu_seqlens: Tensor
    """int32 (N + 1,): where each sequence starts among them"""

    def take(self, x: Tensor) -> Tensor:
        """(N, S, E) or (S, N, E) -> (total, E)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def put_back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(total, E) -> ``shape``, with 0 for padding."""
        return rows.new_zeros(shape).flatten(0, 1).index_copy_(0, self.places, rows).view(shape)


def kept(x: Tensor, padding: Tensor, batch_first: bool) -> Kept | None:
    """The rows of x (N, S, E), or (S, N, E), outside ``padding`` (N, S); None where computing the padding too is
    better.

    That is the case without padding, on a device where counting rows would make the host wait, and where the call is
    recorded or transformed.
    """
    if not (x.is_cpu and padding.is_cpu and backends.cpu.library.problem() is None):
        return None
    if way((x, padding)) is not Way.AT_ONCE:
        return None
    keep = ~padding
    index = keep.flatten().nonzero().squeeze(1)
    if index.shape[0] == keep.numel():
        return None
    if not batch_first:
        N, S = keep.shape
        index = index % S * N + index // S
    lengths = keep.sum(1)
    return Kept(index, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32))
