"""Which strategy a call takes, from a model of its messages and its work: arithmetic on shapes, alike on every rank."""

import dataclasses
import functools
from typing import Literal, NamedTuple

from fastattn.distributed.layout import Balance, length_of, pieces, relation
from fastattn.distributed.ring import Route, find_routes, steps_of
from fastattn.distributed.ulysses import query_heads
from fastattn.flops import allowed_pairs
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
    q_offset: int
    left: int | None
    right: int | None
    bias: int = 0
    """bytes of bias and mask of all heads, rows and keys, where "ulysses" would have to move them"""

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


@functools.lru_cache(maxsize=256)
def routes_of(sizes: Sizes) -> list[Route]:
    """The routes of a call's keys and values."""
    rows, keys = (pieces(sizes.balance, total, sizes.ranks) for total in (sizes.q_len, sizes.kv_len))
    return find_routes(rows, keys, sizes.q_offset, sizes.left, sizes.right)


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


def _cost_of_routes(sizes: Sizes, link: Link, strategy: str) -> Cost:
    routes = routes_of(sizes)
    rows = pieces(sizes.balance, sizes.q_len, sizes.ranks)

    def work(rank: int, route: Route) -> int:
        total = 0
        for piece in rows[rank]:
            pair = relation(piece, route.piece, sizes.q_offset, sizes.left, sizes.right)
            if pair is not None:
                total += allowed_pairs(piece.length, route.piece.length, pair.left, pair.right, pair.q_offset)
        return total

    own = [0] * sizes.ranks
    for route in routes:
        own[route.source] += work(route.source, route)
    busy, received = [own], [[0] * sizes.ranks]
    for hops in steps_of(routes, strategy):
        busy.append([0] * sizes.ranks)
        received.append([0] * sizes.ranks)
        for hop in hops:
            busy[-1][hop.receiver] += work(hop.receiver, hop.route)
            received[-1][hop.receiver] += hop.route.piece.length * sizes.kv_row
    each = [_seconds(sizes, link, max(step), sizes.q_heads) for step in busy]
    exposed = sum(
        max(0.0, link.latency + max(step) / link.bandwidth - before)
        for step, before in zip(received[1:], each, strict=False)
    )
    largest = sorted((max(step) for step in received), reverse=True)
    return Cost(
        max(map(sum, zip(*received, strict=True))), len(received) - 1, sum(largest[:2]), sum(each), exposed
    )  # fmt: skip


def _cost_of_ulysses(sizes: Sizes, link: Link) -> Cost:
    own = query_heads(sizes.q_heads, sizes.ranks)
    shared = [key_heads(heads, sizes.q_heads // sizes.kv_heads) for heads in own]
    mine, keys = own[0].stop - own[0].start, max(x.stop - x.start for x in shared)
    row = sizes.batch * sizes.element
    whole = sizes.q_len * mine * sizes.head_dim * row + sizes.kv_len * keys * (sizes.head_dim + sizes.v_dim) * row
    whole += sizes.bias * mine // sizes.q_heads
    back = length_of(pieces(sizes.balance, sizes.q_len, sizes.ranks)[0]) * sizes.q_heads * sizes.v_dim * row
    moved = (whole + back) * (sizes.ranks - 1) // sizes.ranks
    hops = 2 if sizes.ranks > 1 else 0
    pairs = allowed_pairs(sizes.q_len, sizes.kv_len, sizes.left, sizes.right, sizes.q_offset)
    return Cost(
        moved, hops, whole, _seconds(sizes, link, pairs, mine), hops * link.latency + moved / link.bandwidth
    )  # fmt: skip
