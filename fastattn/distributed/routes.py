"""The routes of pieces of keys and values from rank to rank, step by step: arithmetic only, the same on every rank."""

import itertools
from typing import NamedTuple

from fastattn.distributed.layout import Piece, View, parts, placed


class Route(NamedTuple):
    """A piece of keys and values, and the other ranks that need it, in the order of the ring."""

    number: int
    piece: Piece
    source: int
    stops: tuple[int, ...]


class Hop(NamedTuple):
    """A route's message in one step."""

    route: Route
    sender: int
    receiver: int


def placed_of(routes: list[Route], rank: int) -> list[tuple[slice, Piece]]:
    """The places of the pieces of a rank's routes in its keys."""
    return placed([route.piece for route in routes if route.source == rank])


def find_routes(rows: list[list[Piece]], keys: list[list[Piece]], view: View) -> list[Route]:
    """The route of every piece that is not empty, without the ranks whose rows see nothing of it."""
    ranks, found = len(rows), []
    for source, own in enumerate(keys):
        for piece in own:
            if piece.length:
                others = [(source + step) % ranks for step in range(1, ranks)]
                stops = [r for r in others if any(parts(x, piece, view) for x in rows[r])]
                found.append(Route(len(found), piece, source, tuple(stops)))
    return found


def steps_of(routes: list[Route], strategy: str, ranks: int) -> list[list[Hop]]:
    """The messages of keys and values, step by step; the same list on every rank.

    In a ring, a piece reaches a rank in the step that equals their distance, even if it skips ranks between. Under
    causal order all ranks then receive the same work in each step.
    """
    steps: list[list[Hop]] = [[] for _ in range(ranks - 1)]
    for route in routes:
        for before, stop in itertools.pairwise((route.source, *route.stops)):
            sender = before if strategy == "ring" else route.source
            steps[_step(route, stop, ranks)].append(Hop(route, sender, stop))
    if strategy == "all_gather":  # one step; with this order no rank receives from all others at the same time
        steps = [[*itertools.chain(*steps)]]
    while steps and not steps[-1]:
        steps.pop()
    return steps


def _step(route: Route, rank: int, ranks: int) -> int:
    """The step of the ring in which a rank receives a piece."""
    return (rank - route.source - 1) % ranks


def returns_of(routes: list[Route], strategy: str, ranks: int) -> list[list[Hop]]:
    """The messages of gradients after each step: to the next rank of the route, and from the last one back to the
    piece's rank."""
    there = steps_of(routes, strategy, ranks)
    if strategy == "all_gather":
        return [[Hop(hop.route, hop.receiver, hop.sender) for hop in hops] for hops in there]
    steps: list[list[Hop]] = [[] for _ in there]
    for route in routes:
        for stop, following in itertools.pairwise(route.stops):
            steps[_step(route, following, ranks) - 1].append(Hop(route, stop, following))
        if route.stops:
            steps[_step(route, route.stops[-1], ranks)].append(Hop(route, route.stops[-1], route.source))
    return steps
