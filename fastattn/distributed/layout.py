"""Which tokens each rank holds, and what a piece of queries sees of a piece of keys: arithmetic alone.

Sources: zigzag shards for causal order: Zhu, ring-flash-attention, 2024, and Llama 3, 2024 (arXiv:2407.21783, 3.3.2);
striped shards: Brandon et al., 2023 (arXiv:2311.09431).
"""

import itertools
from typing import Literal, NamedTuple

Balance = Literal["contiguous", "zigzag", "striped"]
BALANCES = ("contiguous", "zigzag", "striped")


def check_balance(balance: str) -> None:
    """Raise ValueError unless it is one of `BALANCES`."""
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {', '.join(map(repr, BALANCES))}, got {balance!r}")


class Piece(NamedTuple):
    """Positions ``start, start + stride, ...``, as many as ``length``."""

    start: int
    length: int
    stride: int = 1

    @property
    def positions(self) -> slice:
        """Where they lie in the whole sequence."""
        return slice(self.start, self.start + self.length * self.stride, self.stride)


class Pair(NamedTuple):
    """What a piece of queries sees of a piece of keys, as `fastattn.spec.Options` says it."""

    q_offset: int
    left: int | None
    right: int | None


def pieces(balance: Balance, total: int, ranks: int) -> list[list[Piece]]:
    """The pieces of each rank, in the order in which it holds them; lengths that do not divide differ by one.

    ``"contiguous"``: one run of tokens each. ``"zigzag"``: of twice as many runs each has one from the front and one
    from the back, so that under causal order all have the same work. ``"striped"``: every n-th token.
    """
    if balance == "striped":
        return [[Piece(rank, len(range(rank, total, ranks)), ranks)] for rank in range(ranks)]
    runs = _runs(total, ranks if balance == "contiguous" else 2 * ranks)
    if balance == "contiguous":
        return [[run] for run in runs]
    return [[runs[rank], runs[-1 - rank]] for rank in range(ranks)]


def _runs(total: int, count: int) -> list[Piece]:
    size, longer = divmod(total, count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [Piece(start, end - start) for start, end in itertools.pairwise(starts)]


def joined(of_ranks: list[list[Piece]]) -> tuple[list[Piece], list[list[Piece]]]:
    """What some ranks hold together: (pieces in order, runs that adjoin made one; where each rank's lie among them)."""
    pieces_of_all = sorted((piece, rank, i) for rank, own in enumerate(of_ranks) for i, piece in enumerate(own))
    found: list[Piece] = []
    places: list[list[Piece]] = [[Piece(0, 0)] * len(own) for own in of_ranks]
    start = 0
    for piece, rank, i in pieces_of_all:
        places[rank][i] = Piece(start, piece.length)
        start += piece.length
        if found and piece.stride == found[-1].stride == 1 and found[-1].start + found[-1].length == piece.start:
            found[-1] = Piece(found[-1].start, found[-1].length + piece.length)
        else:
            found.append(piece)
    return found, places


def length_of(own: list[Piece]) -> int:
    """How many tokens a rank holds."""
    return sum(piece.length for piece in own)


def relation(rows: Piece, keys: Piece, q_offset: int, left: int | None, right: int | None) -> Pair | None:
    """What the rows see of the keys under the window of the whole sequence; None where they see nothing.

    Row i of the whole stands at ``i + q_offset`` and sees the keys from ``left`` before to ``right`` behind it.
    """
    if rows.length == 0 or keys.length == 0:
        return None
    offset, stride = rows.start + q_offset - keys.start, keys.stride
    if stride > 1:  # in steps of the stride: j <= i + floor((offset + right) / stride), and likewise on the left
        right = None if right is None else (offset + right) // stride
        left = None if left is None else (left - offset) // stride
        offset = 0
        if right is not None:
            offset, left, right = right, None if left is None else left + right, 0
        elif left is not None:
            offset, left = -left, 0
        if left is not None and left < 0:
            return None
    if right is not None and rows.length - 1 + offset + right < 0:
        return None
    if left is not None and offset - left > keys.length - 1:
        return None
    if right is not None and offset + right >= keys.length - 1:
        right = None
    if left is not None and rows.length - 1 + offset - left <= 0:
        left = None
    return Pair(offset, left, right)
