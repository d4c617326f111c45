"""The tokens of each rank, and the pairs that a piece of queries sees in a piece of keys: arithmetic only.

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

_RUNS = 8  # runs per rank with "documents": more balance the work better, fewer need fewer messages


def check_balance(balance: str) -> None:
    """Raise ValueError unless balance is one of `BALANCES`."""
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {', '.join(map(repr, BALANCES))}, got {balance!r}")


class Piece(NamedTuple):
    """The ``length`` positions ``start, start + stride, ...``."""

    start: int
    length: int
    stride: int = 1

    @property
    def positions(self) -> slice:
        """The positions in the whole sequence."""
        return slice(self.start, self.start + self.length * self.stride, self.stride)


class Pair(NamedTuple):
    """The window between a piece of queries and a piece of keys, in the terms of `fastattn.spec.Options`."""

    q_offset: int
    left: int | None
    right: int | None
    far: int = 0
    """tokens from row to key that are not among the steps which the call counts"""

    def sees(self, rows: int, keys: int, kv_start: int = 0) -> bool:
        """Whether one of so many rows sees one of so many keys, from ``kv_start`` on."""
        offset, left, right, _far = self
        if rows == 0 or kv_start >= keys or (left is not None and right is not None and left + right < 0):
            return False
        after = right is not None and rows - 1 + offset + right < kv_start
        return not after and (left is None or offset - left < keys)


class Tiles(Protocol):
    """The tiles of a block mask that allow pairs; hashable by content."""

    def share(self, rows: Piece, keys: Piece) -> float:
        """The fraction of these pairs in tiles that are not empty."""
        ...


class Documents(NamedTuple):
    """Where packed documents lie in the whole."""

    queries: Starts
    keys: Starts
    used: tuple[int, ...] | None = None
    """how many of its keys each document uses, its first ones; None is all"""


class View(NamedTuple):
    """The keys that the rows of the whole see; with documents, those of their own document, where positions start."""

    q_offset: int | tuple[int, ...] | None
    """or of each entry: of the batch, or document. None, with documents only: the last query of each stands at its last
    key"""
    left: int | None
    right: int | None
    documents: Documents | None = None
    tiles: Tiles | None = None
    """of a block mask; without documents only"""
    kv_starts: tuple[int, ...] | None = None
    """of each entry: the first key that takes part"""
    distances: bool = False
    """whether it counts how far a key is from its row, as ALiBi does"""

    def offset_of(self, entry: int, default: int = 0) -> int:
        """The position of an entry's first query."""
        offset = self.q_offset[entry] if isinstance(self.q_offset, tuple) else self.q_offset
        return default if offset is None else offset

    def start_of(self, entry: int) -> int:
        """The first key of an entry that takes part."""
        return 0 if self.kv_starts is None else self.kv_starts[entry]

    @property
    def entries(self) -> int:
        """How many batch entries it tells apart, at least 1; without documents only."""
        offsets = self.q_offset if isinstance(self.q_offset, tuple) else ()
        return max(1, len(offsets), len(self.kv_starts or ()))


class Part(NamedTuple):
    """One call, within a piece of queries and a piece of keys."""

    rows: slice
    keys: slice
    """within the pieces"""
    q_offsets: tuple[int, ...]
    """of each entry"""
    left: int | None
    right: int | None
    first_row: int
    first_key: int
    """where they begin, within their document if there are documents"""
    document: int = 0
    """the first document"""
    starts: tuple[Starts, Starts] | None = None
    """for several documents, counted from the first row and key"""
    used: tuple[int, ...] | None = None
    """of them: how many of its keys each uses; None is all"""
    kv_starts: tuple[int, ...] | None = None
    """of each entry: from which of these keys on they take part; None is all"""
    share: float = 1.0
    """the fraction of these pairs that a block mask allows"""
    step: int = 1
    """tokens from each key to the next"""
    far: tuple[int, ...] = (0,)
    """`Pair.far` of each entry"""


def pieces(balance: Balance, total: int, ranks: int, documents: Starts | None = None) -> list[list[Piece]]:
    """The pieces of each rank, in the order in which it holds them. Lengths differ by one if they do not divide evenly.

    ``"contiguous"``: one run of tokens each. ``"zigzag"``: one run from the front and one from the back, of twice as
    many runs as ranks, so that all ranks have the same work under causal order. ``"striped"``: every n-th token.
    ``"documents"``: the same number of small runs each, chosen so that all ranks have about the same work under causal
    order within documents.
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
    """Assign runs in order of decreasing work, each to the rank with the least work that has room for a run."""

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
    """The tokens of several ranks together: (pieces in order, with adjacent runs merged; where each rank's lie in
    them)."""
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
    """The number of tokens that a rank holds."""
    return sum(piece.length for piece in own)


def placed(own: list[Piece]) -> list[tuple[slice, Piece]]:
    """Each piece and its place among a rank's tokens."""
    found, start = [], 0
    for piece in own:
        found.append((slice(start, start + piece.length), piece))
        start += piece.length
    return found


def relation(rows: Piece, keys: Piece, q_offset: int, left: int | None, right: int | None) -> Pair | None:
    """The window between rows and keys that follows from the window of the whole sequence; None if they see nothing.

    Row i of the whole has position ``i + q_offset``. It sees keys from ``left`` before its position to ``right`` after
    it.
    """
    (pair,) = _pairs(rows, keys, q_offset, View(q_offset, left, right))
    return _opened(pair, rows.length, keys.length) if pair.sees(rows.length, keys.length) else None


def _opened(pair: Pair, rows: int, keys: int) -> Pair:
    """A side that forbids nothing is open."""
    offset, left, right, _ = pair
    if right is not None and offset + right >= keys - 1:
        right = None
    if left is not None and rows - 1 + offset - left <= 0:
        left = None
    return pair._replace(left=left, right=right)


def _pairs(rows: Piece, keys: Piece, q_offset: int, view: View) -> list[Pair]:
    """The calls for the pairs of these rows and keys; none if the rows see none of the keys.

    If keys are ``step`` apart, their distances are ``|step * d + rest|`` for the ``d`` that a call counts. That is
    ``step * |d|``, plus ``rest`` for each key up to the row and minus ``rest`` for each key after it: a constant for a
    call that sees one side. So there are two calls if distances count and both sides may be seen.
    """
    offset, step = rows.start + q_offset - keys.start, keys.stride
    left, right = view.left, view.right
    if step == 1:
        return [Pair(offset, left, right)]
    steps, rest = divmod(offset, step)
    left = None if left is None else (left - rest) // step  # -right <= d <= left
    right = None if right is None else (right + rest) // step
    if not view.distances:
        if right is not None:
            return [Pair(steps + right, None if left is None else left + right, 0)]
        return [Pair(steps if left is None else steps - left, None if left is None else 0, None)]
    if rest == 0 and (left is None or left >= 0) and (right is None or right >= 0):
        return [Pair(steps, left, right)]
    found = []
    nearest = 0 if right is None else max(0, -right)
    if left is None or left >= nearest:
        found.append(Pair(steps - nearest, None if left is None else left - nearest, 0, rest + step * nearest))
    nearest = 1 if left is None else max(1, -left)
    if right is None or right >= nearest:
        found.append(Pair(steps + nearest, 0, None if right is None else right - nearest, step * nearest - rest))
    return found


def _calls(rows: Piece, keys: Piece, view: View, offsets: list[int], kv_starts: list[int]) -> list[Part]:
    """The calls by which the rows see what they see of the keys, for entries with these offsets and first keys.

    One call has one window. Where keys lie ``step`` apart, entries may see one more of them or one less than others: to
    a call of another window than its own an entry stands where it sees nothing.
    """
    n, m = rows.length, keys.length
    starts = [min(max(-((keys.start - start) // keys.stride), 0), m) for start in kv_starts]
    of_windows: dict[tuple[int | None, int | None], list[Pair | None]] = {}
    for entry, offset in enumerate(offsets):
        for pair in _pairs(rows, keys, offset, view):
            of_windows.setdefault((pair.left, pair.right), [None] * len(offsets))[entry] = pair
    found = []
    for (left, right), given in of_windows.items():
        if not any(pair is not None and pair.sees(n, m, start) for pair, start in zip(given, starts, strict=True)):
            continue
        hidden = Pair(-n - right if right is not None else m + (left or 0), left, right)
        pairs = [hidden if pair is None else pair for pair in given]
        opened = [_opened(pair, n, m) for pair in pairs]
        for side in ("left", "right"):
            if all(getattr(pair, side) is None for pair in opened):
                pairs = [pair._replace(**{side: None}) for pair in pairs]
        found.append(
            Part(
                slice(0, n), slice(0, m), tuple(pair.q_offset for pair in pairs), pairs[0].left, pairs[0].right,
                rows.start, keys.start, kv_starts=tuple(starts) if any(starts) else None, step=keys.stride,
                far=tuple(pair.far for pair in pairs),
            )
        )  # fmt: skip
    return found


def parts(rows: Piece, keys: Piece, view: View) -> list[Part]:
    """The calls that together compute all pairs of the rows and the keys; none if the rows see nothing.

    Documents that begin within both pieces share one packed call. A document that is cut has a call of its own.
    """
    if view.documents is None:
        entries = range(view.entries)
        found = _calls(rows, keys, view, [view.offset_of(i) for i in entries], [view.start_of(i) for i in entries])
        share = 1.0 if not found or view.tiles is None else view.tiles.share(rows, keys)
        return [part._replace(share=share) for part in found if share > 0.0]
    return _parts_of_documents(rows, keys, view, view.documents)


class _Document(NamedTuple):
    """What a piece of queries and a piece of keys have of a document, and of its keys that take part."""

    number: int
    rows: Piece
    keys: Piece
    q_offset: int
    kv_start: int
    room: int
    """keys, also those that are not used"""


def _parts_of_documents(rows: Piece, keys: Piece, view: View, documents: Documents) -> list[Part]:
    found: list[Part] = []
    packed: list[_Document] = []

    def calls(own: _Document) -> list[Part]:
        return _calls(own.rows, own.keys, view, [own.q_offset], [own.kv_start])

    def pack() -> None:
        while packed and not calls(packed[-1]):
            packed.pop()  # a document that sees nothing stays only between others
        if len(packed) == 1:
            single(packed[0])
        elif packed:
            found.append(_packed(packed, rows, keys, view, documents))
        packed.clear()

    def single(own: _Document) -> None:
        at = _part_of(rows, own.rows, starts[own.number]), _part_of(keys, own.keys, key_starts[own.number])
        found.extend(part._replace(rows=at[0], keys=at[1], document=own.number) for part in calls(own))

    starts, key_starts, used = documents
    first = max(bisect.bisect_right(x, piece.start) - 1 for x, piece in ((starts, rows), (key_starts, keys)))
    for number in range(max(first, 0), len(starts) - 1):
        (start, end), (key_start, key_end) = (x[number : number + 2] for x in (starts, key_starts))
        if start >= rows.positions.stop or key_start >= keys.positions.stop:
            break
        used_end = key_end if used is None else key_start + used[number]
        offset = view.offset_of(number, default=(used_end - key_start) - (end - start))
        of_keys, room = _within(keys, key_start, used_end), _within(keys, key_start, key_end).length
        own = _Document(number, _within(rows, start, end), of_keys, offset, view.start_of(number), room)
        if rows.stride == keys.stride == 1 and start >= rows.start and key_start >= keys.start:
            if packed or calls(own):
                packed.append(own)
        else:
            pack()
            single(own)
    pack()
    return found


def _within(piece: Piece, start: int, end: int) -> Piece:
    """The part of a document in a piece, counted from the document's start."""
    first, last = (min(max(-(-(x - piece.start) // piece.stride), 0), piece.length) for x in (start, end))
    return Piece(piece.start + first * piece.stride - start if last > first else 0, last - first, piece.stride)


def _part_of(piece: Piece, own: Piece, start: int) -> slice:
    first = (own.start + start - piece.start) // piece.stride
    return slice(first, first + own.length)


def _packed(own: list[_Document], rows: Piece, keys: Piece, view: View, documents: Documents) -> Part:
    """Consecutive documents that begin within both pieces."""
    number = own[0].number
    of_rows = tuple(itertools.accumulate((x.rows.length for x in own), initial=0))
    of_keys = tuple(itertools.accumulate((x.room for x in own), initial=0))
    begin, key_begin = documents.queries[number] - rows.start, documents.keys[number] - keys.start
    kv_starts = tuple(min(x.kv_start, x.keys.length) for x in own)
    return Part(
        slice(begin, begin + of_rows[-1]), slice(key_begin, key_begin + of_keys[-1]), tuple(x.q_offset for x in own),
        view.left, view.right, 0, 0, number, (of_rows, of_keys),
        used=tuple(x.keys.length for x in own) if any(x.keys.length < x.room for x in own) else None,
        kv_starts=kv_starts if any(kv_starts) else None,
    )  # fmt: skip


def pairs_of(part: Part) -> int:
    """How many (query, key) it allows, in the mean over batch entries; all of a tile that is not empty."""
    sizes = [(part.rows.stop - part.rows.start, part.keys.stop - part.keys.start)] * len(part.q_offsets)
    if part.starts is not None:
        lengths, rooms = ([b - a for a, b in itertools.pairwise(x)] for x in part.starts)
        sizes = [*zip(lengths, part.used or rooms, strict=True)]
    starts = part.kv_starts or [0] * len(sizes)
    each = (
        allowed_pairs(n, m - start, part.left, part.right, offset - start)
        for (n, m), offset, start in zip(sizes, part.q_offsets, starts, strict=True)
    )
    return math.ceil(sum(each) * part.share / (len(sizes) if part.starts is None else 1))
