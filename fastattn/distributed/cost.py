"""Which strategy a call takes, from a model of its messages and its work: arithmetic on shapes, alike on every rank."""

import dataclasses
import functools
from typing import Literal, NamedTuple

from fastattn.distributed.layout import Balance, Piece, Starts, View, joined, length_of, pairs_of, parts, pieces
from fastattn.distributed.ring import Route, find_routes, steps_of
from fastattn.distributed.ulysses import query_heads
from fastattn.functional.sharded import key_heads

Strategy = Literal["ring", "all_gather", "ulysses"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "all_gather", "ulysses")


@dataclasses.dataclass(frozen=True)
class Link:
    """What the model assumes of the machines; only ratios decide. Give what you measure on yours.

    Args:
        latency: seconds from the start of a message to its first byte.
        bandwidth: bytes per second that a rank receives.
        flops: floating-point operations per second of attention.
    """

    latency: float = 20e-6
    bandwidth: float = 50e9
    flops: float = 300e12


class Sizes(NamedTuple):
    """What the model reads of a call: the whole, as all ranks know it."""

    ranks: int
    balance: Balance
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    element: int
    """bytes of a number"""
    view: View
    bias: int = 0
    """bytes of bias and mask of all heads, rows and keys, where heads are divided and they would have to move"""
    width: int = 1
    """ranks in a row of the mesh, which divide heads"""

    @property
    def kv_row(self) -> int:
        """Bytes of the keys and values of a token."""
        return self.batch * self.kv_heads * (self.head_dim + self.v_dim) * self.element


class Cost(NamedTuple):
    """The forward pass of the rank that has most to do."""

    bytes: int
    """received"""
    hops: int
    """messages one after the other"""
    memory: int
    """bytes of what arrives, held at once"""
    compute: float
    """seconds, with what a rank waits for slower ones"""
    exposed: float
    """seconds of messages that no computation hides"""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which strategy serves a call, and what each would cost; ``str()`` is a table."""

    strategy: str
    """The one that serves the call."""
    costs: dict[str, Cost]
    """Strategy -> what the model says."""
    refused: dict[str, str]
    """Strategy -> why it cannot serve the call."""
    call: str
    """The call as it was understood."""
    link: Link
    """What the figures assume."""
    asked: bool = False
    """Whether the strategy was asked for, and not chosen."""

    def __str__(self) -> str:
        link = self.link
        lines = [
            self.call,
            f"  assuming {link.latency * 1e6:g} us, {link.bandwidth / 1e9:g} GB/s, {link.flops / 1e12:g} TFLOP/s; "
            "forward pass of the busiest rank",
        ]
        for name in STRATEGIES:
            if name in self.refused:
                lines.append(f"  {name:<10} {self.refused[name]}")
                continue
            cost = self.costs[name]
            verdict = ("   <- asked for" if self.asked else "   <- chosen") if name == self.strategy else ""
            lines.append(
                f"  {name:<10} {cost.bytes / 2**20:10.2f} MiB received in {cost.hops} hops, {cost.memory / 2**20:.2f} "
                f"MiB held, {cost.compute * 1e3:.3f} ms of work, {cost.exposed * 1e3:.3f} ms exposed{verdict}"
            )
        return "\n".join(lines)


def _rows_of_mesh(sizes: Sizes, total: int, documents: Starts | None) -> list[list[Piece]]:
    own, width = pieces(sizes.balance, total, sizes.ranks, documents), sizes.width
    return [joined(own[i : i + width])[0] if width > 1 else own[i] for i in range(0, sizes.ranks, width)]


@functools.lru_cache(maxsize=256)
def rows_of(sizes: Sizes) -> list[list[Piece]]:
    """The pieces of queries of each row of the mesh, of each rank where it has one dimension."""
    return _rows_of_mesh(sizes, sizes.q_len, sizes.view.documents and sizes.view.documents[0])


def keys_of(sizes: Sizes) -> list[list[Piece]]:
    """Likewise of keys."""
    return _rows_of_mesh(sizes, sizes.kv_len, sizes.view.documents and sizes.view.documents[1])


@functools.lru_cache(maxsize=256)
def routes_of(sizes: Sizes) -> list[Route]:
    """The routes of a call's keys and values, from row to row of the mesh."""
    return find_routes(rows_of(sizes), keys_of(sizes), sizes.view)


@functools.lru_cache(maxsize=256)
def costs(sizes: Sizes, link: Link) -> dict[str, Cost]:
    """What each strategy costs."""
    return {
        "ring": _cost_of_routes(sizes, link, "ring"),
        "all_gather": _cost_of_routes(sizes, link, "all_gather"),
        "ulysses": _cost_of_ulysses(sizes, link),
    }


def _seconds(sizes: Sizes, link: Link, pairs: int, heads: int) -> float:
    return 2.0 * sizes.batch * heads * pairs * (sizes.head_dim + sizes.v_dim) / link.flops


class _Swap(NamedTuple):
    """Tokens for heads, there and back, in a row of ranks: for the first of them, which has most heads."""

    bytes: int
    """received"""
    memory: int
    heads: int
    kv_heads: int
    """what the rank then has of them"""


def _swap(sizes: Sizes, ranks: int, q_len: int, kv_len: int) -> _Swap:
    own = query_heads(sizes.q_heads, ranks)
    shared = [key_heads(heads, sizes.q_heads // sizes.kv_heads) for heads in own]
    mine, keys = own[0].stop - own[0].start, max(x.stop - x.start for x in shared)
    if ranks == 1:
        return _Swap(0, 0, mine, keys)
    row = sizes.batch * sizes.element
    whole = q_len * mine * sizes.head_dim * row + kv_len * keys * (sizes.head_dim + sizes.v_dim) * row
    whole += sizes.bias * mine * q_len // (sizes.q_heads * max(sizes.q_len, 1))
    back = -(-q_len // ranks) * sizes.q_heads * sizes.v_dim * row
    return _Swap((whole + back) * (ranks - 1) // ranks, whole, mine, keys)


def _cost_of_routes(sizes: Sizes, link: Link, strategy: str) -> Cost:
    routes, rows = routes_of(sizes), rows_of(sizes)
    ranks = len(rows)
    swap = _swap(sizes, sizes.width, max(map(length_of, rows)), max(map(length_of, keys_of(sizes))))
    kv_row = sizes.kv_row * swap.kv_heads // sizes.kv_heads

    def work(rank: int, route: Route) -> int:
        return sum(pairs_of(part) for piece in rows[rank] for part in parts(piece, route.piece, sizes.view))

    own = [0] * ranks
    for route in routes:
        own[route.source] += work(route.source, route)
    busy, received = [own], [[0] * ranks]
    for hops in steps_of(routes, strategy):
        busy.append([0] * ranks)
        received.append([0] * ranks)
        for hop in hops:
            busy[-1][hop.receiver] += work(hop.receiver, hop.route)
            received[-1][hop.receiver] += hop.route.piece.length * kv_row
    each = [_seconds(sizes, link, max(step), swap.heads) for step in busy]
    exposed = sum(
        max(0.0, link.latency + max(step) / link.bandwidth - before)
        for step, before in zip(received[1:], each, strict=False)
    )
    hops = 2 if sizes.width > 1 else 0
    largest = sorted((max(step) for step in received), reverse=True)
    return Cost(
        swap.bytes + max(map(sum, zip(*received, strict=True))), hops + len(received) - 1,
        swap.memory + sum(largest[:2]), sum(each), exposed + hops * link.latency + swap.bytes / link.bandwidth,
    )  # fmt: skip


def _cost_of_ulysses(sizes: Sizes, link: Link) -> Cost:
    swap = _swap(sizes, sizes.ranks, sizes.q_len, sizes.kv_len)
    hops = 2 if sizes.ranks > 1 else 0
    whole = parts(Piece(0, sizes.q_len), Piece(0, sizes.kv_len), sizes.view)
    pairs = sum(map(pairs_of, whole))
    return Cost(
        swap.bytes, hops, swap.memory, _seconds(sizes, link, pairs, swap.heads),
        hops * link.latency + swap.bytes / link.bandwidth,
    )  # fmt: skip
