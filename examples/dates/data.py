"""Written dates, their characters as tokens, and which dates the model never sees in training."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from typing import Literal

import torch
from torch import Tensor

# A century, in which two digits name a year (the pivot of POSIX and of strptime's %y): every format is unambiguous.
FIRST, LAST = date(1969, 1, 1), date(2068, 12, 31)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Format = Callable[[date], str]
Written = tuple[str, date]


def _ordinal(number: int) -> str:
    suffix = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _month(day: date) -> str:
    return MONTHS[day.month - 1]


FORMATS: dict[str, Format] = {
    "March 5, 1987": lambda day: f"{_month(day)} {day.day}, {day.year}",
    "5 Mar 1987": lambda day: f"{day.day} {_month(day)[:3]} {day.year}",
    "5-Mar-87": lambda day: f"{day.day}-{_month(day)[:3]}-{day.year % 100:02}",
    "05/03/1987": lambda day: f"{day.day:02}/{day.month:02}/{day.year}",  # the day first, always
    "Thursday, 5 March 1987": lambda day: f"{WEEKDAYS[day.weekday()]}, {day.day} {_month(day)} {day.year}",
    "5th of March 1987": lambda day: f"{_ordinal(day.day)} of {_month(day)} {day.year}",
    "19870305": lambda day: f"{day.year}{day.month:02}{day.day:02}",
}


# ------------------------------------------------------------------------------------------------- vocabulary


class TextError(ValueError):
    """The model cannot read this text."""


class Vocabulary:
    """Characters as integers, after the special tokens."""

    def __init__(self, characters: Iterable[str], specials: int) -> None:
        self.characters = "".join(sorted(characters))
        self.specials = specials
        self._token = {character: specials + index for index, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return self.specials + len(self.characters)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise TextError(f"expected characters of {self.characters!r}, got {', '.join(map(repr, unknown))}")
        return [self._token[character] for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Special tokens are left out."""
        return "".join(self.characters[token - self.specials] for token in tokens if token >= self.specials)


PAD, BOS, EOS = 0, 1, 2  # padding comes after a source; a target is between the other two
_A_YEAR = [date(1980, 1, 1) + timedelta(days) for days in range(366)]
# Lower case: the capitals of a month carry no information.
SOURCE = Vocabulary({c for day in _A_YEAR for write in FORMATS.values() for c in write(day).lower()}, specials=1)
TARGET = Vocabulary("0123456789-", specials=3)
LONGEST_SOURCE = len("wednesday, 30 september 2065")
LONGEST_TARGET = len("2065-09-30") + 1  # and EOS


def encode_source(text: str) -> Tensor:
    """A written date as (S,) tokens."""
    if not 1 <= len(text) <= LONGEST_SOURCE:
        raise TextError(f"expected 1 to {LONGEST_SOURCE} characters, got {len(text)}")
    return torch.tensor(SOURCE.encode(text.lower()))


def encode_target(day: date) -> Tensor:
    """BOS, the ISO date, EOS: (12,)."""
    return torch.tensor([BOS, *TARGET.encode(day.isoformat()), EOS])


def batch_sources(texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Tokens (N, S), padded at the end, and lengths (N,)."""
    sources = [encode_source(text) for text in texts]
    lengths = torch.tensor([len(source) for source in sources])
    padded = torch.full((len(sources), LONGEST_SOURCE), PAD)  # one length for all batches: --compile compiles once
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = source
    return padded.to(device), lengths.to(device)


def batch(written: Sequence[Written], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """`batch_sources`, and targets (N, 12)."""
    targets = torch.stack([encode_target(day) for _, day in written])
    return *batch_sources([text for text, _ in written], device), targets.to(device)


# ------------------------------------------------------------------------------------------------------ dates


Part = Literal["train", "validation", "test"]


def part_of(day: date) -> Part:
    """The part that a date belongs to, in all formats, by a hash: 90 % are for training."""
    twentieth = zlib.crc32(day.isoformat().encode()) % 20
    return "test" if twentieth == 0 else "validation" if twentieth == 1 else "train"


DAYS: dict[Part, list[date]] = {"train": [], "validation": [], "test": []}
for _offset in range((LAST - FIRST).days + 1):
    _day = FIRST + timedelta(_offset)
    DAYS[part_of(_day)].append(_day)


def examples(part: Part, count: int, seed: int | str) -> list[Written]:
    """Dates of a part, none twice, each written in one format; all formats equally often, one more or less."""
    generator = random.Random(f"{part} {seed}")
    formats = list(FORMATS.values())
    return [(formats[i % len(formats)](day), day) for i, day in enumerate(generator.sample(DAYS[part], count))]
