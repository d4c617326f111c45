"""Backward attention against every peer, on the grid of bench_forward; the forward pass is not timed."""

import sys

from . import runner
from .bench_forward import grid
from .runner import Cell

DEVICES = ("cuda",)


def cells() -> list[Cell]:
    return list(grid("backward"))


if __name__ == "__main__":
    sys.exit(runner.main(suites=("backward",)))
