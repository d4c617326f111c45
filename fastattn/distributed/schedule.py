"""Simulate a call's messages and work step by step: the times that `fastattn.distributed.cost` compares.

`benchmarks/suites/scaling.py` simulates more ranks than the machine has and compares the model with real runs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Link:
    """The machine data of the model; only ratios matter. Give what you measure on your machines.

    Args:
        latency: seconds from the start of a message to its first byte.
        bandwidth: bytes per second that a rank receives, and sends.
        flops: floating-point operations per second of attention.
        call: seconds of each call of the kernel beside its operations.
        copy: seconds per sent or received byte in which a rank cannot compute. It is 0 if the network reads the
            device's memory, but not with gloo on a CPU.
        message: seconds per sent or received message in which a rank cannot compute.
        machine: how many consecutive ranks share a machine. A row of a mesh of two dimensions should lie within one.
        near_latency, near_bandwidth: of messages within a machine; None means the same as between machines.
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
    """One step of every rank."""

    arrive: Sequence[Move]
    """must arrive before the work; in flight since the previous step's work began"""
    work: Sequence[float]
    """seconds, of each rank"""
    leave: Sequence[Move] = ()
    """starts after the work; ranks wait for it after the next step's work"""


class _Posted(NamedTuple):
    """Messages in flight."""

    ends: dict[int, float]
    """rank -> when its last message has arrived"""
    own: dict[int, float]
    """rank -> seconds of its own time"""


def play(
    steps: Sequence[Step], ranks: int, link: Link, number: Callable[[int], int] = lambda rank: rank
) -> list[float]:
    """The time at which each rank is done, in seconds.

    A message starts when both ranks have reached it and no earlier message occupies the sender's output or the
    receiver's input. Messages within a machine and between machines do not share these. ``number`` maps a rank to its
    number among those of ``link``.
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
    """The bytes that each rank receives in each group of messages."""
    found = []
    for step in steps:
        for moves in (step.arrive, step.leave):
            if moves:
                found.append([0] * ranks)
                for move in moves:
                    found[-1][move.receiver] += move.bytes
    return found
