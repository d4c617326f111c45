"""Take packed sequences apart: they lie one after the other in memory."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fastattn.spec.operands import Operands, Options


class PackedSequence(NamedTuple):
    """One sequence: where its rows and keys lie, and the groups of a call with this sequence alone."""

    number: int
    rows: slice
    keys: slice
    operands: Operands
    options: Options


def packed_sequences(operands: Operands, options: Options) -> Iterator[PackedSequence]:
    """Yield each sequence with its part of the call. This reads the lengths, so it waits for a GPU."""
    assert operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None
    rows = itertools.pairwise(operands.cu_seqlens_q.tolist())
    keys = list(itertools.pairwise(operands.cu_seqlens_k.tolist()))
    if operands.seqused_k is not None:
        used = zip(keys, operands.seqused_k.tolist(), strict=True)
        keys = [(start, start + min(max(count, 0), end - start)) for (start, end), count in used]
    slopes, offsets, kv_start = operands.alibi_slopes, operands.q_offset_tensor, operands.kv_start
    for number, ((row, row_end), (key, key_end)) in enumerate(zip(rows, keys, strict=True)):
        own = slice(number, number + 1)
        q_offset = (key_end - key) - (row_end - row) if options.q_offset is None else options.q_offset
        yield PackedSequence(
            number,
            slice(row, row_end),
            slice(key, key_end),
            Operands(
                alibi_slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[own],
                sinks=operands.sinks,
                q_offset_tensor=None if offsets is None else offsets[own],
                seed=operands.seed,
                kv_start=None if kv_start is None else kv_start[own],
            ),
            options._replace(q_offset=q_offset),
        )
