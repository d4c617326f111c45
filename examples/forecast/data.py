"""Where the numbers come from, and how they are cut into train, validation and test without looking ahead."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

DATA_FOLDER = Path(__file__).parent / "data"


class DataError(ValueError):
    """The series cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Series:
    """A regularly sampled series.

    `values` (T,) float64, oldest first; `season` is the number of steps after which it roughly repeats.
    """

    name: str
    title: str
    unit: str
    step: str
    values: np.ndarray
    season: int


# ---------------------------------------------------------------------------------------------------- sources


def noisy_sine(length: int, seed: int, sigma: float = 0.5) -> np.ndarray:
    """The tutorial's data: sin(0.1 t) plus Gaussian noise. (length,) float64.

    `RandomState(seed).normal` draws the numbers that `np.random.seed(seed); np.random.normal` draws, and leaves the
    global generator alone.
    """
    return clean_sine(length) + np.random.RandomState(seed).normal(scale=sigma, size=length)


def clean_sine(length: int) -> np.ndarray:
    """The part of `noisy_sine` that can be known in advance."""
    return np.sin(0.1 * np.arange(length))


def load_co2() -> Series:
    """Weekly CO2 at Mauna Loa. Its 59 empty weeks lie before 1986, in the training part."""
    values = read_csv(DATA_FOLDER / "co2.csv", "co2", time_column="date", fill_gaps=True)
    return Series("co2", "CO2 at Mauna Loa", "ppm", "week", values, season=52)


def load_elnino() -> Series:
    """Monthly sea surface temperature, Pacific Ocean off Peru."""
    values = read_csv(DATA_FOLDER / "elnino.csv", "temperature", time_column="date")
    return Series("elnino", "sea surface temperature, Nino 1+2", "°C", "month", values, season=12)


def read_csv(path: str | Path, column: str, time_column: str | None = None, fill_gaps: bool = False) -> np.ndarray:
    """One column of a CSV file with a header line, as (T,) float64.

    Args:
        path: the file, comma separated.
        column: name of the column with the values.
        time_column: name of a column with dates or numbers. If given, rows must be evenly spaced in it.
        fill_gaps: put the last value before a gap into its empty cells. A straight line across the gap would look
            better and would use a value from the future.

    Raises:
        DataError: no such file or column, a cell that is not a number, a gap, uneven spacing.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a CSV file at {path}, found none")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    for name in [column] if time_column is None else [column, time_column]:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}; its columns are {', '.join(map(repr, header))}")

    values = np.array([_parse_cell(row[column], path, column, line) for line, row in enumerate(rows, start=2)])
    if time_column is not None:
        _check_spacing([row[time_column] for row in rows], path, time_column)
    return _without_gaps(values, f"column {column!r} of {path}", fill_gaps)


def _parse_cell(text: str | None, path: Path, column: str, line: int) -> float:
    """A number, or NaN for an empty cell (None: the row ends before this column)."""
    text = (text or "").strip()
    if text.lower() in ("", "na", "nan", "null"):
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        value = float("inf")
    if np.isinf(value):
        raise DataError(f"expected numbers in column {column!r} of {path}, got {text!r} in line {line}")
    return value


def _without_gaps(values: np.ndarray, what: str, fill_gaps: bool) -> np.ndarray:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing) == len(values):
        raise DataError(f"{what} holds no values")
    if len(missing) == 0:
        return values
    if not fill_gaps:
        raise DataError(
            f"{what} has {len(missing)} empty cells, the first in line {missing[0] + 2}; "
            "fill them, or pass --fill-gaps to repeat the last value before each"
        )
    if missing[0] == 0:
        raise DataError(f"{what} starts with an empty cell, and there is no earlier value to repeat")
    # For each position, the index of the last value that is there.
    last_seen = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[last_seen]


def _check_spacing(cells: list[str | None], path: Path, column: str) -> None:
    """A missing row is a gap that no empty cell shows. Months and years may differ by their few days."""
    times = np.array([_parse_time(cell, path, column, line) for line, cell in enumerate(cells, start=2)])
    steps = np.diff(times)
    usual = np.median(steps) if len(steps) else 0.0
    for index, step in enumerate(steps):
        if step <= 0 or not 0.5 * usual < step < 1.5 * usual:
            raise DataError(
                f"expected evenly spaced, increasing values in column {column!r} of {path}, "
                f"got {cells[index]!r} and then {cells[index + 1]!r} in line {index + 3}"
            )


def _parse_time(cell: str | None, path: Path, column: str, line: int) -> float:
    """Days for dates (2001-12-29, 2001-12-29 18:00, 20011229), else the number itself."""
    text = (cell or "").strip()
    layout = {7: "%Y-%m", 8: "%Y%m%d"}.get(len(text))  # by length: strptime would read the number 123456 as a date
    try:
        time = datetime.strptime(text, layout) if layout else datetime.fromisoformat(text)
        if time.tzinfo is None:
            time = time.replace(tzinfo=timezone.utc)  # not local time, whose days can have 23 or 25 hours
        return time.timestamp() / 86400
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise DataError(
            f"expected dates (as 2001-12-29) or numbers in column {column!r} of {path}, got {text!r} in line {line}"
        ) from None


# ------------------------------------------------------------------------------------- split, scale, windows


@dataclass(frozen=True)
class Split:
    """Training values are [0, train_end), validation [train_end, test_start), test [test_start, length)."""

    train_end: int
    test_start: int
    length: int

    @classmethod
    def by_fraction(cls, length: int, train: float = 0.64, validation: float = 0.16) -> Split:
        """In the order of time; a random split would put the neighbours of every test value into training."""
        return cls(int(length * train), int(length * (train + validation)), length)


@dataclass(frozen=True)
class Scaler:
    """`(x - shift) / scale`. Made from training values only: test values must not touch the model's input."""

    shift: float
    scale: float

    @classmethod
    def standard(cls, train: np.ndarray) -> Scaler:
        """To mean 0 and standard deviation 1: the size that initialisation and learning rates expect."""
        return cls(float(train.mean()), float(train.std()))

    @classmethod
    def min_max(cls, train: np.ndarray) -> Scaler:
        """To [0, 1], the tutorial's choice. Two noise extremes set it, and the signal shrinks to a sd of 0.18."""
        return cls(float(train.min()), float(train.max() - train.min()))

    def transform(self, values: np.ndarray) -> np.ndarray:
        return (values - self.shift) / self.scale

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return values * self.scale + self.shift


def make_origins(start: int, stop: int, context: int, horizon: int) -> np.ndarray:
    """Every t with a full context before it and `values[t : t + horizon]` inside [start, stop)."""
    return np.arange(max(start, context), stop - horizon + 1)


def contexts(values: np.ndarray, origins: np.ndarray, context: int) -> np.ndarray:
    """What is known at each origin: (N, context), `values[t - context : t]`."""
    return np.lib.stride_tricks.sliding_window_view(values, context)[origins - context]


def targets(values: np.ndarray, origins: np.ndarray, horizon: int) -> np.ndarray:
    """What is to be forecast at each origin: (N, horizon), `values[t : t + horizon]`."""
    return np.lib.stride_tricks.sliding_window_view(values, horizon)[origins]


def estimate_season(values: np.ndarray) -> int:
    """The number of steps after which the series repeats, from its autocorrelation; 1 if it shows no season.

    A season of 12 also repeats after 24 and 36, so this is the first peak that is nearly as high as the highest one.
    """
    time = np.arange(len(values))
    rest = values - np.polyval(np.polyfit(time, values, 1), time)  # a trend resembles itself at every lag
    spectrum = np.fft.rfft(rest, 2 * len(rest))  # twice the length: no wrap-around
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(rest) // 3 + 1]
    negative = np.flatnonzero(correlation < 0)
    # Uncorrelated noise reaches some 3 / sqrt(T) by chance.
    if len(negative) == 0 or correlation[negative[0] :].max() < 3 / np.sqrt(len(values)) * correlation[0]:
        return 1
    high = np.flatnonzero(correlation >= 0.8 * correlation[negative[0] :].max())
    high = high[high > negative[0]]
    first_run = high[: np.flatnonzero(np.diff(high, append=high[-1] + 2) > 1)[0] + 1]
    return int(first_run[np.argmax(correlation[first_run])])
