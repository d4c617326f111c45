"""Choose a call's strategy by a model of its messages and work: arithmetic on shapes, the same on every rank."""

import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import Literal, NamedTuple

from fastattn.distributed.layout import Balance, Piece, Starts, View, joined, length_of, pairs_of, parts, pieces
from fastattn.distributed.routes import Hop, Route, find_routes, returns_of, steps_of
from fastattn.distributed.schedule import Link, Move, Step, play, received
from fastattn.distributed.ulysses import query_heads
from fastattn.flops import BACKWARD_FACTOR
from fastattn.functional.sharded import key_heads

Strategy = Literal["ring", "all_gather", "ulysses"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "all_gather", "ulysses")


class Sizes(NamedTuple):
    """The sizes of a call that the model reads; all ranks know them."""

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
    """bytes per number"""
    view: View
    bias: int = 0
    """bytes of bias and mask of all heads, rows and keys, if a division of heads makes them move"""
    width: int = 1
    """ranks in a row of the mesh; they divide heads"""

    @property
    def kv_row(self) -> int:
        """Bytes of a token's keys and values."""
        return self.batch * self.kv_heads * (self.head_dim + self.v_dim) * self.element


class Cost(NamedTuple):
    """The cost of one pass; each figure is that of the rank with the most."""

    bytes: int
    """received"""
    hops: int
    """messages in sequence"""
    memory: int
    """bytes of received data held at once"""
    compute: float
    """seconds of work"""
    exposed: float
    """further seconds until the last rank is done: waiting for messages or slower ranks"""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class Choice:
    """The strategy that serves a call, and the cost of each; ``str()`` gives a table."""

    strategy: str
    """The strategy that serves the call."""
    costs: dict[str, Cost]
    """Strategy -> its cost."""
    refused: dict[str, str]
    """Strategy -> the reason why it cannot serve the call."""
    call: str
    """The call, in words."""
    link: Link
    """The machine data behind the figures."""
    asked: bool = False
    """Whether the caller asked for the strategy."""

    def __str__(self) -> str:
        link = self.link
        near = f" ({link.near_bandwidth / 1e9:g} GB/s within machines of {link.machine})" if link.near_bandwidth else ""
        rates = f"{link.latency * 1e6:g} us, {link.bandwidth / 1e9:g} GB/s{near}, {link.flops / 1e12:g} TFLOP/s"
        lines = [self.call, f"  assuming {rates}; forward pass of the busiest rank"]
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
        return "\n".join([*lines, *self.reasons])

    @property
    def reasons(self) -> list[str]:
        """Why this strategy: the time that each other one would take, and its parts."""
        if self.asked:
            return []
        chosen = self.costs[self.strategy]
        found = []
        for name in STRATEGIES:
            if name == self.strategy or name in self.refused:
                continue
            other = self.costs[name]
            more = {"work": other.compute - chosen.compute, "waiting": other.exposed - chosen.exposed}
            shown = {of: x for of, x in more.items() if abs(x) >= 5e-7}  # seconds; the text has microseconds
            differences = ", ".join(f"{abs(x) * 1e3:.3f} {'more' if x > 0 else 'less'} {of}" for of, x in shown.items())
            if not differences:
                differences = "the same, but more memory" if other.memory > chosen.memory else "the same"
            found.append(f"{name} {other.seconds * 1e3:.3f} ms ({differences})")
        return [f"  {self.strategy} takes {chosen.seconds * 1e3:.3f} ms; {'; '.join(found)}"] if found else []


def _rows_of_mesh(sizes: Sizes, total: int, documents: Starts | None) -> list[list[Piece]]:
    own, width = pieces(sizes.balance, total, sizes.ranks, documents), sizes.width
    return [joined(own[i : i + width])[0] if width > 1 else own[i] for i in range(0, sizes.ranks, width)]


@functools.lru_cache(maxsize=256)
def rows_of(sizes: Sizes) -> list[list[Piece]]:
    """The pieces of queries of each row of the mesh; of each rank if the mesh has one dimension."""
    return _rows_of_mesh(sizes, sizes.q_len, sizes.view.documents and sizes.view.documents[0])


def keys_of(sizes: Sizes) -> list[list[Piece]]:
    """The same for keys."""
    return _rows_of_mesh(sizes, sizes.kv_len, sizes.view.documents and sizes.view.documents[1])


@functools.lru_cache(maxsize=256)
def routes_of(sizes: Sizes) -> list[Route]:
    """The routes of a call's keys and values, from row to row of the mesh."""
    return find_routes(rows_of(sizes), keys_of(sizes), sizes.view)


@functools.lru_cache(maxsize=256)
def costs(sizes: Sizes, link: Link) -> dict[str, Cost]:
    """The cost of each strategy's forward pass."""
    return {name: cost(sizes, link, name) for name in STRATEGIES}


def cost(sizes: Sizes, link: Link, strategy: Strategy, backward: bool = False) -> Cost:
    """The cost of a strategy, from a simulation of its steps. ``backward``: of the backward pass."""
    if strategy == "ulysses":
        swap = _swap(sizes, sizes.ranks, sizes.q_len, sizes.kv_len)
        whole = parts(Piece(0, sizes.q_len), Piece(0, sizes.kv_len), sizes.view)
        work = _seconds(sizes, link, list(map(pairs_of, whole)), swap.heads, backward)
        steps = _swap_steps(swap, sizes.ranks, work, backward)
        return _cost_of(steps, sizes.ranks, link, swap.memory)
    ranks, width = len(rows_of(sizes)), sizes.width
    swap = _swap(sizes, width, *(max(map(length_of, own)) for own in (rows_of(sizes), keys_of(sizes))))
    steps = _route_steps(sizes, link, strategy, swap, backward)
    held = heapq.nlargest(2, (max(x) for x in received([step._replace(leave=()) for step in steps], ranks)))
    found = _cost_of(steps, ranks, link, swap.memory + sum(held), lambda rank: rank * width)
    row = _cost_of(_swap_steps(swap, width, 0.0, backward), width, link, 0)
    return found._replace(
        bytes=found.bytes + row.bytes, hops=found.hops + row.hops, exposed=found.exposed + row.exposed
    )


def _cost_of(
    steps: list[Step], ranks: int, link: Link, memory: int, number: Callable[[int], int] = lambda rank: rank
) -> Cost:  # fmt: skip
    messages = received(steps, ranks)
    compute = max(map(sum, zip(*(step.work for step in steps), strict=True)))
    bytes_in = max(map(sum, zip(*messages, strict=True)), default=0)
    return Cost(bytes_in, len(messages), memory, compute, max(play(steps, ranks, link, number)) - compute)


def _seconds(sizes: Sizes, link: Link, calls: list[int], heads: int, backward: bool) -> float:
    """The seconds that calls with these numbers of pairs take."""
    pairs = sum(calls) * (BACKWARD_FACTOR if backward else 1.0)
    operations = 2.0 * sizes.batch * heads * pairs * (sizes.head_dim + sizes.v_dim)
    return operations / link.flops + len(calls) * link.call


class _Swap(NamedTuple):
    """The exchange of tokens for heads and back in a row of ranks, for the first rank, which has the most heads."""

    there: int
    """bytes received"""
    back: int
    memory: int
    heads: int
    kv_heads: int
    """what the rank then holds"""


def _swap(sizes: Sizes, ranks: int, q_len: int, kv_len: int) -> _Swap:
    own = query_heads(sizes.q_heads, ranks)
    shared = [key_heads(heads, sizes.q_heads // sizes.kv_heads) for heads in own]
    mine, keys = own[0].stop - own[0].start, max(x.stop - x.start for x in shared)
    if ranks == 1:
        return _Swap(0, 0, 0, mine, keys)
    row = sizes.batch * sizes.element
    whole = q_len * mine * sizes.head_dim * row + kv_len * keys * (sizes.head_dim + sizes.v_dim) * row
    whole += sizes.bias * mine * q_len // (sizes.q_heads * max(sizes.q_len, 1))
    back = -(-q_len // ranks) * sizes.q_heads * sizes.v_dim * row
    return _Swap(whole * (ranks - 1) // ranks, back * (ranks - 1) // ranks, whole, mine, keys)


def _swap_steps(swap: _Swap, ranks: int, work: float, backward: bool) -> list[Step]:
    """The steps, with every rank like the first. In the backward pass, gradients go the other way."""

    def moves(size: int) -> list[Move]:
        each = [-(-size * (i + 1) // (ranks - 1)) - -(-size * i // (ranks - 1)) for i in range(ranks - 1)]
        return [Move(r, (r + 1 + i) % ranks, each[i]) for i in range(ranks - 1) for r in range(ranks)]

    there, back = moves(swap.there), moves(swap.back)
    return [Step(back if backward else there, [work] * ranks, there if backward else back)]


@functools.lru_cache(maxsize=256)
def _pairs_of_routes(sizes: Sizes) -> list[dict[int, list[int]]]:
    """For each route and each rank on it: the pairs of each call."""
    rows = rows_of(sizes)
    return [
        {
            rank: [pairs_of(part) for piece in rows[rank] for part in parts(piece, route.piece, sizes.view)]
            for rank in (route.source, *route.stops)
        }
        for route in routes_of(sizes)
    ]


def _route_steps(sizes: Sizes, link: Link, strategy: Strategy, swap: _Swap, backward: bool) -> list[Step]:
    """The steps that `fastattn.distributed.ring` takes."""
    routes, pairs = routes_of(sizes), _pairs_of_routes(sizes)
    kv_row = sizes.kv_row * swap.kv_heads // sizes.kv_heads
    gradient_row = kv_row * max(sizes.element, 4) // sizes.element

    def work(computed: list[tuple[int, int]]) -> list[float]:
        calls: list[list[int]] = [[] for _ in range(len(rows_of(sizes)))]
        for rank, number in computed:
            calls[rank] += pairs[number][rank]
        return [_seconds(sizes, link, own, swap.heads, backward) for own in calls]

    def moves(hops: list[Hop], row: int) -> list[Move]:
        return [Move(hop.sender, hop.receiver, hop.route.piece.length * row) for hop in hops]

    steps = [Step((), work([(route.source, route.number) for route in routes]))]
    ranks = len(rows_of(sizes))
    for hops, back in zip(*(f(routes, strategy, ranks) for f in (steps_of, returns_of)), strict=True):
        home = moves(back, gradient_row) if backward else []
        arrived = work([(hop.receiver, hop.route.number) for hop in hops])
        steps.append(Step(moves(hops, kv_row), arrived, home))
    return steps
