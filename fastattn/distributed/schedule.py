"""A call's messages and work, step by step, and how long they take: what `fastattn.distributed.cost` compares.

`benchmarks/suites/scaling.py` plays the same steps for more ranks than there are, and holds them against real ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Link:
    """What the model assumes of the machines; only ratios decide. Give what you measure on yours.

    Args:
        latency: seconds from the start of a message to its first byte.
        bandwidth: bytes per second that a rank receives, and sends.
        flops: floating-point operations per second of attention.
        call: seconds of each call of the kernel beside its operations.
        copy: seconds of a rank's own time for each byte that it sends or receives, in which it cannot compute: none
            where a network reads the device's memory, as gloo's on a CPU does not.
        message: seconds of a rank's own time for each message that it sends or receives.
        machine: how many ranks, numbered one after the other, share a machine; those of a row of a mesh of two
            dimensions should.
        near_latency, near_bandwidth: of messages within a machine; None is as between machines.
    """

    latency: float = 20e-6
    bandwidth: float = 50e9
    flops: float = 300e12
    call: float = 0.0
    copy: float = 0.0
    message: float = 0.0
    machine: int = 1
    near_latency: float | None = None
    near_bandwidth: float | None = None

    def way(self, one: int, other: int) -> tuple[bool, float, float]:
        """(whether two ranks share a machine, latency, bandwidth of their messages)."""
        near = one // self.machine == other // self.machine
        latency = self.near_latency if near and self.near_latency is not None else self.latency
        return near, latency, self.near_bandwidth if near and self.near_bandwidth is not None else self.bandwidth


class Move(NamedTuple):
    """A message."""

    sender: int
    receiver: int
    bytes: int


class Step(NamedTuple):
    """What every rank does in turn."""

    arrive: Sequence[Move]
    """must have come before the work; under way since the work of the step before began"""
    work: Sequence[float]
    """seconds, of each rank"""
    leave: Sequence[Move] = ()
    """goes after the work, and is waited for after the work of the next step"""


class _Posted(NamedTuple):
    """Messages under way."""

    ends: dict[int, float]
    """rank -> when its last one has come"""
    own: dict[int, float]
    """rank -> seconds of its own time"""


def play(
    steps: Sequence[Step], ranks: int, link: Link, number: Callable[[int], int] = lambda rank: rank
) -> list[float]:
    """When each rank is done, in seconds.

    A message starts when both ranks have come to it and neither's way in or out is taken by one before it; messages
    within machines and between them have ways of their own. ``number``: that of a rank among those of ``link``.
    """
    clock = [0.0] * ranks
    taken: dict[tuple[bool, bool, int], float] = {}

    def post(moves: Sequence[Move]) -> _Posted:
        ends, own = _Posted({}, {})
        for sender, receiver, size in moves:
            near, latency, bandwidth = link.way(number(sender), number(receiver))
            out, into = (near, True, sender), (near, False, receiver)
            start = max(clock[sender], clock[receiver], taken.get(out, 0.0), taken.get(into, 0.0))
            taken[out] = taken[into] = start + size / bandwidth
            end = start + latency + size / bandwidth
            for rank in (sender, receiver):
                ends[rank] = max(ends.get(rank, 0.0), end)
                own[rank] = own.get(rank, 0.0) + link.message + size * link.copy
        return _Posted(ends, own)

    def wait(posted: _Posted) -> None:
        for rank, end in posted.ends.items():
            clock[rank] = max(clock[rank], end) + posted.own[rank]

    coming, leaving = post(steps[0].arrive), post(())
    for index, step in enumerate(steps):
        wait(coming)
        coming = post(steps[index + 1].arrive if index + 1 < len(steps) else ())
        clock = [time + work for time, work in zip(clock, step.work, strict=True)]
        wait(leaving)
        leaving = post(step.leave)
    wait(leaving)
    return clock


def received(steps: Sequence[Step], ranks: int) -> list[list[int]]:
    """Bytes that each rank receives, of each group of messages."""
    found = []
    for step in steps:
        for moves in (step.arrive, step.leave):
            if moves:
                found.append([0] * ranks)
                for move in moves:
                    found[-1][move.receiver] += move.bytes
    return found
