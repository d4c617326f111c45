"""Checks of settings: each raises an error that names the setting, what was expected and what came."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from fastattn.spec.checks import check_integers, check_window, readable

P = ParamSpec("P")
R = TypeVar("R")


def integer(name: str, value: object, least: int = 1) -> None:
    """Check an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def number(name: str, value: object, interval: str = "(0, inf)") -> None:
    """Check a number in an interval, such as "(0, 1]"; a round bracket excludes its end."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    low, high = map(float, interval[1:-1].split(","))
    above = value > low or (value == low and interval[0] == "[")
    below = value < high or (value == high and interval[-1] == "]")
    if not (above and below) or math.isnan(value):
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")


def flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def instance(name: str, value: object, *kinds: type) -> None:
    """Check that a value is of one of these classes."""
    if not isinstance(value, kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, got {got}")


def window(name: str, value: object) -> None:
    """Check a window as `fastattn.attention` takes it, or None; not a list, which could change later."""
    instance(name, value, tuple, type(None))
    assert isinstance(value, tuple) or value is None
    check_window(value, causal=False)


def tokens(name: str, value: object) -> None:
    """Check a tensor of token numbers."""
    instance(name, value, Tensor)
    assert isinstance(value, Tensor)
    if value.is_floating_point() or value.is_complex() or value.dtype.itemsize < 4:
        raise TypeError(f"{name}.dtype: expected int32 or int64, got {value.dtype}")


def lengths(name: str, value: object, x: Tensor, most: int, least: int = 0) -> None:
    """Check how many elements each row of x (N, ...) has: int32 or int64 (N,) on x's device, with values in range where
    the host can read them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(value).__name__}")
    check_integers(name, value, x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name}.shape: expected {tuple(x.shape[:1])}, got {tuple(value.shape)}")
    if readable(value) and not all(least <= number <= most for number in value.tolist()):
        raise ValueError(f"{name}: expected {least} to {most}, got {value.tolist()}")


def keywords(**cures: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: where a caller passes another package's name for an argument, the error gives the name it has
    here."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = frozenset(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in names:
                    cure = f"; here it is {cures[name]}" if name in cures else ""
                    raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{cure}")
            return function(*args, **kwargs)

        return checked

    return decorate
