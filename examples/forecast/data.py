"""The sources of the numbers, and their division into train, validation and test without looking ahead."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.common import InputError

DATA_FOLDER = Path(__file__).parent / "data"


class DataError(InputError):
    """The series cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Series:
    """A regularly sampled series.

    `values` (T,) float64, oldest first; `season` is the number of steps after which it roughly repeats; `times` (T,)
    are the dates of the values (datetime64), or their numbers, or None.
    """

    name: str
    title: str
    unit: str
    step: str
    values: np.ndarray
    season: int
    times: np.ndarray | None = None

    def time_axis(self, steps: np.ndarray) -> np.ndarray:
        """Dates or numbers of the given steps, which may lie after the end of the series."""
        if self.times is None:
            return steps
        last = len(self.times) - 1
        known = self.times[np.minimum(steps, last)]
        return np.where(steps <= last, known, _after(self.times, np.maximum(steps - last, 0)))


def time_texts(times: np.ndarray) -> list[str]:
    """Times as text: dates without a time of day if all are at midnight."""
    if not np.issubdtype(times.dtype, np.datetime64):
        return [f"{time:g}" for time in times]
    days = (times == times.astype("datetime64[D]")).all()
    return [str(text) for text in np.datetime_as_string(times, unit="D" if days else "s")]


def _after(times: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The times that many steps after the last one; months and years have no fixed number of days."""
    if not np.issubdtype(times.dtype, np.datetime64):
        return times[-1] + steps * np.median(np.diff(times))
    days = np.median(np.diff(times).astype("timedelta64[s]").astype(float)) / 86400
    months = 12 if 360 < days < 370 else 3 if 88 < days < 93 else 1 if 27 < days < 32 else 0
    if not months:
        return times[-1] + steps * np.median(np.diff(times)).astype(times.dtype.str.replace("M8", "m8"))
    first_of_month = times[-1].astype("datetime64[M]")
    return (first_of_month + steps * months) + (times[-1] - first_of_month)


# ---------------------------------------------------------------------------------------------------- sources


def noisy_sine(length: int, seed: int, sigma: float = 0.5) -> np.ndarray:
    """The tutorial's data: sin(0.1 t) plus Gaussian noise. (length,) float64.

    `RandomState(seed).normal` draws the numbers that `np.random.seed(seed); np.random.normal` draws, and leaves the
    global generator alone.
    """
    return clean_sine(length) + np.random.RandomState(seed).normal(scale=sigma, size=length)


def clean_sine(length: int) -> np.ndarray:
    """The predictable part of `noisy_sine`."""
    return np.sin(0.1 * np.arange(length))


def load_co2() -> Series:
    """Weekly CO2 at Mauna Loa. Its 59 empty weeks are before 1986, in the training part."""
    table = read_csv(DATA_FOLDER / "co2.csv", "co2", time_column="date", fill_gaps=True)
    return Series("co2", "CO2 at Mauna Loa", "ppm", "week", table.values, season=52, times=table.times)


def load_elnino() -> Series:
    """Monthly sea surface temperature, Pacific Ocean off Peru."""
    table = read_csv(DATA_FOLDER / "elnino.csv", "temperature", time_column="date")
    title = "sea surface temperature, Nino 1+2"
    return Series("elnino", title, "°C", "month", table.values, season=12, times=table.times)


class Table(NamedTuple):
    """What was read: `values` (T,) float64; `times` (T,), dates as datetime64 or numbers, if there is such a column."""

    values: np.ndarray
    times: np.ndarray | None
    time_column: str | None
    """given, or found: the first column of which every cell is a date"""
    uneven: str = ""
    """if the column was found and not given: where its rows are not evenly spaced"""


def read_csv(path: str | Path, column: str, time_column: str | None = None, fill_gaps: bool = False) -> Table:
    """One column of a CSV file with a header line.

    Args:
        path: the file; separated by comma, semicolon (then numbers may have a decimal comma), tab or bar.
        column: name of the column with the values.
        time_column: name of a column with dates or numbers. If given, rows must be evenly spaced in it. If not, the
            first column that holds nothing but dates is used, and rows must be in its order.
        fill_gaps: put the last value before a gap into its empty cells. A straight line across the gap would look
            better and would use a value from the future.

    Raises:
        DataError: no such file or column, a cell that is not a number, a gap, rows out of order, uneven spacing.
    """
    path = Path(path)
    header, rows, comma = _read_rows(path, column)
    for name in [column] if time_column is None else [column, time_column]:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}; its columns are {', '.join(map(repr, header))}")

    index = header.index(column)
    cells = [row[index] if index < len(row) else "" for row in rows]
    values = np.array([_parse_cell(cell, path, column, line, comma) for line, cell in enumerate(cells, start=2)])
    found = time_column or _find_dates(header, rows, column)
    times, uneven = None, ""
    if found is not None:
        place = header.index(found)
        cells = [row[place] if place < len(row) else "" for row in rows]
        times = _parse_times(cells, path, found)
        _check_order(times, cells, path, found)
        uneven = _uneven(times, cells, path, found)
        if uneven and time_column is not None:
            raise DataError(uneven)
    return Table(_without_gaps(values, f"column {column!r} of {path}", fill_gaps), times, found, uneven)


def _read_rows(path: Path, column: str) -> tuple[list[str], list[list[str]], bool]:
    """Header, rows that are not blank, and whether numbers may have a decimal comma."""
    if path.is_dir():
        raise DataError(f"expected a CSV file, {path} is a directory")
    if not path.is_file():
        raise DataError(f"expected a CSV file at {path}, found none")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
        if not text.strip():
            raise DataError(f"{path} is empty; expected a header line and rows of values")
        first = text.lstrip().splitlines()[0]

        def names(delimiter: str) -> list[str]:
            return [name.strip() for name in next(csv.reader([first], delimiter=delimiter))]

        # The delimiter with which the column exists, else the one that gives most columns.
        delimiter = max(",;\t|", key=lambda mark: (column in names(mark), len(names(mark))))
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    return [name.strip() for name in rows[0]], rows[1:], delimiter == ";"


def _parse_cell(text: str, path: Path, column: str, line: int, comma: bool) -> float:
    """A number, or NaN for an empty cell."""
    text = text.strip()
    if text.lower() in ("", "na", "nan", "null"):
        return float("nan")
    try:
        value = float(text.replace(",", ".") if comma and "." not in text else text)
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
    # For each position, the index of the last value that exists.
    last_seen = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[last_seen]


def _find_dates(header: list[str], rows: list[list[str]], column: str) -> str | None:
    """The first column, other than that of the values, of which every cell is a date."""
    for place, name in enumerate(header):
        if name != column and rows and all(place < len(row) and _parse_date(row[place]) is not None for row in rows):
            return name
    return None


def _check_order(times: np.ndarray, cells: list[str], path: Path, column: str) -> None:
    """Windows are cut from rows in the order of time: shuffled rows would be forecast from their own future."""
    steps = np.diff(times).astype(float)
    if len(steps) == 0 or (steps > 0).all():
        return
    if (steps < 0).all():
        raise DataError(f"{path} has its newest row first; expected the oldest row first: sort it by {column!r}")
    if (steps >= 0).all():
        row = int(np.flatnonzero(steps == 0)[0])
        raise DataError(
            f"{cells[row + 1]!r} stands more than once in column {column!r} of {path}, the second time in line "
            f"{row + 3}; expected one row per time, and one series per file"
        )
    row = int(np.flatnonzero(steps < 0)[0])
    raise DataError(
        f"the rows of {path} are not in the order of {column!r}: {cells[row]!r} and then {cells[row + 1]!r} in line "
        f"{row + 3}; sort them, oldest first"
    )


def _uneven(times: np.ndarray, cells: list[str], path: Path, column: str) -> str:
    """The place where the spacing breaks, or "": a missing row is a gap without an empty cell.

    Months and years may differ by their few days.
    """
    steps = np.diff(times).astype(float)
    usual = np.median(steps) if len(steps) else 0.0
    wrong = np.flatnonzero(~((0.5 * usual < steps) & (steps < 1.5 * usual)))
    if len(wrong) == 0:
        return ""
    row = int(wrong[0])
    return (
        f"expected evenly spaced values in column {column!r} of {path}, got {cells[row]!r} and then "
        f"{cells[row + 1]!r} in line {row + 3}"
    )


def _parse_times(cells: list[str], path: Path, column: str) -> np.ndarray:
    """datetime64 in seconds if the cells are dates, else the numbers."""
    dates = [_parse_date(cell) for cell in cells]
    if all(date is not None for date in dates):
        return np.array(dates, dtype="datetime64[s]")
    numbers = []
    for line, cell in enumerate(cells, start=2):
        try:
            numbers.append(float(cell))
        except ValueError:
            raise DataError(
                f"expected dates (as 2001-12-29) or numbers in column {column!r} of {path}, got {cell.strip()!r} "
                f"in line {line}"
            ) from None
    return np.array(numbers)


def _parse_date(cell: str) -> datetime | None:
    """2001-12-29, 2001-12-29 18:00, 2001-12 or 20011229, in UTC; None for anything else."""
    text = cell.strip()
    layout = {7: "%Y-%m", 8: "%Y%m%d"}.get(len(text))  # by length: strptime would read the number 123456 as a date
    try:
        time = datetime.strptime(text, layout) if layout else datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is None else time.astimezone(timezone.utc).replace(tzinfo=None)


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
    """The known values at each origin: (N, context), `values[t - context : t]`."""
    return np.lib.stride_tricks.sliding_window_view(values, context)[origins - context]


def targets(values: np.ndarray, origins: np.ndarray, horizon: int) -> np.ndarray:
    """The values to forecast at each origin: (N, horizon), `values[t : t + horizon]`."""
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
