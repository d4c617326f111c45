"""Few combinations in which every value of an argument meets every value of every other."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Tuples of one value of each axis: each two values of two axes are together in one of them."""
    values = [list(axis) for axis in axes]
    left = [*itertools.product(*(range(len(axis)) for axis in values))]
    missing = {pair for numbers in left for pair in _pairs(numbers)}
    chosen = []
    while missing:
        best = max(left, key=lambda numbers: len(missing & _pairs(numbers)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(axis[n] for axis, n in zip(values, numbers, strict=True)) for numbers in sorted(chosen)]


def _pairs(numbers: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return {*itertools.combinations(enumerate(numbers), 2)}
