"""Backward attention against every peer, on the grid of `forward`; the forward pass is not timed."""

from benchmarks.harness.runner import Cell

from .forward import grid

DEVICES = ("cuda",)


def cells() -> list[Cell]:
    return list(grid("backward"))
