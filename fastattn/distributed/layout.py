"""Which tokens each rank holds, and what a piece of queries sees of a piece of keys: arithmetic alone.

Sources: zigzag shards for causal order: Zhu, ring-flash-attention, 2024, and Llama 3, 2024 (arXiv:2407.21783, 3.3.2);
striped shards: Brandon et al., 2023 (arXiv:2311.09431).
"""

import bisect
import itertools
import math
from typing import Literal, NamedTuple, Protocol

from fastattn.flops import allowed_pairs

Balance = Literal["contiguous", "zigzag", "striped", "documents"]
BALANCES = ("contiguous", "zigzag", "striped", "documents")
Starts = tuple[int, ...]
"""Where each packed document begins, and the end of the last."""

_RUNS = 8  # of each rank, with "documents": more even out the work, fewer make fewer messages


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


class Tiles(Protocol):
    """What the tiles of a block mask let through; hashable by their content."""

    def share(self, rows: Piece, keys: Piece) -> float:
        """The part of these pairs that lies in tiles that are not empty."""
        ...


class View(NamedTuple):
    """What the rows of the whole see of its keys; with documents, of the keys of their own, where positions begin."""

    q_offset: int | None
    """None, with documents only: the last query of each stands at its last key"""
    left: int | None
    right: int | None
    documents: tuple[Starts, Starts] | None = None
    """of queries and of keys"""
    tiles: Tiles | None = None
    """of a block mask; without documents only"""


class Part(NamedTuple):
    """One call, within a piece of queries and a piece of keys."""

    rows: slice
    keys: slice
    """within the pieces"""
    q_offsets: tuple[int, ...]
    """of each document, or one"""
    left: int | None
    right: int | None
    first_row: int
    first_key: int
    """where they begin, in their document if there are such"""
    document: int = 0
    """the first"""
    starts: tuple[Starts, Starts] | None = None
    """of several documents, counted from the first row and key"""
    share: float = 1.0
    """of these pairs, which a block mask lets through"""


def pieces(balance: Balance, total: int, ranks: int, documents: Starts | None = None) -> list[list[Piece]]:
    """The pieces of each rank, in the order in which it holds them; lengths that do not divide differ by one.

    ``"contiguous"``: one run of tokens each. ``"zigzag"``: of twice as many runs each has one from the front and one
    from the back, so that under causal order all have the same work. ``"striped"``: every n-th token. ``"documents"``:
    as many of small runs each, so that all have about the same work under causal order within documents.
    """
    if balance == "documents":
        return _even_runs(total, ranks, (0, total) if documents is None else documents)
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


def _even_runs(total: int, ranks: int, documents: Starts) -> list[list[Piece]]:
    """Runs in the order of their work, the most first, each to the rank that has least to do and room for a run."""

    def work_before(token: int) -> int:
        return work[at := bisect.bisect_right(documents, token) - 1] + _triangle(token - documents[at])

    lengths = (end - start for start, end in itertools.pairwise(documents))
    work = list(itertools.accumulate(map(_triangle, lengths), initial=0))
    own: list[list[Piece]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    runs = [(work_before(run.start + run.length) - work_before(run.start), run) for run in _runs(total, _RUNS * ranks)]
    for pairs, run in sorted(runs, key=lambda x: (-x[0], x[1])):
        rank = min((r for r in range(ranks) if len(own[r]) < _RUNS), key=lambda r: (load[r], r))
        own[rank].append(run)
        load[rank] += pairs
    return [joined([[run for run in x if run.length]])[0] or [Piece(0, 0)] for x in own]


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


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


def placed(own: list[Piece]) -> list[tuple[slice, Piece]]:
    """Each piece and where it lies among the tokens that a rank holds."""
    found, start = [], 0
    for piece in own:
        found.append((slice(start, start + piece.length), piece))
        start += piece.length
    return found


def relation(rows: Piece, keys: Piece, q_offset: int, left: int | None, right: int | None) -> Pair | None:
    """What the rows see of the keys under the window of the whole sequence; None where they see nothing.

    Row i of the whole stands at ``i + q_offset`` and sees the keys from ``left`` before to ``right`` after it.
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


def parts(rows: Piece, keys: Piece, view: View) -> list[Part]:
    """The calls by which the rows see what they see of the keys; none where they see nothing.

    Documents that begin within both pieces go into one call, packed; one that is cut into one of its own.
    """
    if view.documents is None:
        pair = relation(rows, keys, view.q_offset or 0, view.left, view.right)
        share = 1.0 if pair is None or view.tiles is None else view.tiles.share(rows, keys)
        if pair is None or share == 0.0:
            return []
        whole, at = (slice(0, rows.length), slice(0, keys.length)), (rows.start, keys.start)
        return [Part(*whole, (pair.q_offset,), pair.left, pair.right, *at, share=share)]
    found: list[Part] = []
    packed: list[tuple[int, Piece, Piece, int]] = []  # document, its rows and keys, q_offset

    def pack() -> None:
        while packed and (relation(*packed[-1][1:], view.left, view.right)) is None:
            packed.pop()  # a document that sees nothing counts only between others
        if len(packed) == 1:
            single(*packed[0])
        elif packed:
            found.append(_packed(packed, rows, keys, view))
        packed.clear()

    def single(document: int, own: Piece, own_keys: Piece, offset: int) -> None:
        pair = relation(own, own_keys, offset, view.left, view.right)
        if pair is not None:
            sizes = (_part_of(rows, own, starts[document]), _part_of(keys, own_keys, key_starts[document]))
            at = (own.start, own_keys.start, document)
            found.append(Part(*sizes, (pair.q_offset,), pair.left, pair.right, *at))

    starts, key_starts = view.documents
    first = max(bisect.bisect_right(x, piece.start) - 1 for x, piece in ((starts, rows), (key_starts, keys)))
    for document in range(max(first, 0), len(starts) - 1):
        (start, end), (key_start, key_end) = (x[document : document + 2] for x in (starts, key_starts))
        if start >= rows.positions.stop or key_start >= keys.positions.stop:
            break
        own, own_keys = _within(rows, start, end), _within(keys, key_start, key_end)
        offset = (key_end - key_start) - (end - start) if view.q_offset is None else view.q_offset
        if rows.stride == keys.stride == 1 and own.start == own_keys.start == 0:
            if packed or relation(own, own_keys, offset, view.left, view.right) is not None:
                packed.append((document, own, own_keys, offset))
        else:
            pack()
            single(document, own, own_keys, offset)
    pack()
    return found


def _within(piece: Piece, start: int, end: int) -> Piece:
    """What a piece has of a document, counted from the document's start."""
    first, behind = (min(max(-(-(x - piece.start) // piece.stride), 0), piece.length) for x in (start, end))
    return Piece(piece.start + first * piece.stride - start if behind > first else 0, behind - first, piece.stride)


def _part_of(piece: Piece, own: Piece, start: int) -> slice:
    first = (own.start + start - piece.start) // piece.stride
    return slice(first, first + own.length)


def _packed(documents: list[tuple[int, Piece, Piece, int]], rows: Piece, keys: Piece, view: View) -> Part:
    """Consecutive documents that begin within both pieces."""
    assert view.documents is not None
    number = documents[0][0]
    of_rows = tuple(itertools.accumulate((own.length for _, own, _, _ in documents), initial=0))
    of_keys = tuple(itertools.accumulate((own.length for _, _, own, _ in documents), initial=0))
    begin, key_begin = (x[number] - piece.start for x, piece in zip(view.documents, (rows, keys), strict=True))
    return Part(
        slice(begin, begin + of_rows[-1]), slice(key_begin, key_begin + of_keys[-1]), tuple(x[3] for x in documents),
        view.left, view.right, 0, 0, number, (of_rows, of_keys),
    )  # fmt: skip


def pairs_of(part: Part) -> int:
    """How many (query, key) it allows; all of a tile that a block mask has not empty."""
    if part.starts is None:
        sizes = (part.rows.stop - part.rows.start, part.keys.stop - part.keys.start)
        pairs = allowed_pairs(*sizes, part.left, part.right, part.q_offsets[0])
        return pairs if part.share == 1.0 else math.ceil(pairs * part.share)
    lengths = ([b - a for a, b in itertools.pairwise(x)] for x in part.starts)
    each = zip(*lengths, part.q_offsets, strict=True)
    return sum(allowed_pairs(n, m, part.left, part.right, offset) for n, m, offset in each)
