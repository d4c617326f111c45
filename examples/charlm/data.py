"""A text as numbers: its characters, its two parts, batches for training and windows for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.common import InputError

ALICE = Path(__file__).parent / "data" / "alice.txt"
TRAIN_FRACTION = 0.9  # nanoGPT's


class DataError(InputError):
    """The text cannot be used."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters that a model knows, sorted; a token is an index into them."""

    characters: str

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """int64 (len(text),).

        Raises:
            DataError: a character is not in the vocabulary.
        """
        index = {character: token for token, character in enumerate(self.characters)}
        unknown = sorted(set(text) - set(index))
        if unknown:
            raise DataError(
                f"expected only characters of the training text, got {', '.join(map(repr, unknown))}; "
                f"the model knows {self.characters!r}"
            )
        return torch.tensor([index[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (L,)."""
        return "".join(self.characters[token] for token in tokens.tolist())


@dataclass(frozen=True)
class Text:
    """A text in two parts, the first for training, the rest for validation: int64 (characters,) each."""

    vocabulary: Vocabulary
    train: Tensor
    validation: Tensor

    @classmethod
    def read(cls, path: Path) -> Text:
        """Raises DataError if the file is not UTF-8 text."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        vocabulary = Vocabulary.of(text)
        tokens = vocabulary.encode(text)
        end = int(TRAIN_FRACTION * len(tokens))
        return cls(vocabulary, tokens[:end], tokens[end:])


def random_batch(tokens: Tensor, block: int, batch: int, generator: torch.Generator) -> Tensor:
    """Runs of block + 1 characters from random places: (batch, block + 1), inputs [:, :-1] and targets [:, 1:]."""
    starts = torch.randint(len(tokens) - block, (batch,), generator=generator)
    return tokens[starts[:, None] + torch.arange(block + 1)]


def windows(tokens: Tensor, block: int) -> Tensor:
    """All consecutive runs of block + 1 characters: (n, block + 1).

    The last character of a run is the first of the next, so that each is a target once. A remainder is left out.
    """
    return tokens.unfold(0, block + 1, block)
