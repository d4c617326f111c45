"""Copy keys from a cache into packed sequences."""

import torch
from torch import Tensor


def cumulative(lengths: Tensor) -> Tensor:
    """The cu_seqlens of `fastattn.attention_varlen`, int32 (sequences + 1,), from lengths (sequences,)."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, row in it) of each of ``total`` packed rows, int64 each.

    Rows after the last sequence get a valid sequence and row 0.
    """
    row = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds[1:].contiguous(), row, right=True).clamp(max=max(len(bounds) - 2, 0))
    return sequence, torch.where(row < bounds[-1], row - bounds[sequence], 0)


def gather(
    k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, *, pages: Tensor | None = None,
    entries: Tensor | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Copy the keys and values of sequences out of a cache: packed k and v, and their ``cu_seqlens``.

    The copy does not wait for the device: if the host does not know the lengths, the result has room for ``longest``
    rows of every sequence. `fastattn.attention_varlen` never reads the unused rows.

    Args:
        k: (rows, capacity, Hk, D).
        v: like k, with head dim Dv.
        starts: int (sequences,), where each sequence begins in its row or pages.
        lengths: int (sequences,).
        pages: int (sequences, max_pages), the pages of each sequence; the capacity is the size of a page.
        entries: int (sequences,), the row of each sequence if there are no pages.
        longest: at least the longest length; None if unknown.
    """
    cu_seqlens = cumulative(lengths)
    if longest is None:
        longest = k.shape[1] * (1 if pages is None else pages.shape[1])
    total = int(cu_seqlens[-1]) if cu_seqlens.device.type == "cpu" else longest * len(lengths)
    sequence, place = places(cu_seqlens, total)
    place = place + starts.long()[sequence]
    if pages is not None:
        index = (pages[sequence, place // k.shape[1]].long(), place % k.shape[1])
    else:
        assert entries is not None
        index = (entries.long()[sequence], place)
    return k[index], v[index], cu_seqlens
