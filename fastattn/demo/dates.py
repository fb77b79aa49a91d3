"""The dates of `fastattn.training.datasets.dates` as tokens: the locale's, then the characters'."""

import datetime
import random
from collections.abc import Iterable, Sequence

import torch
from babel import Locale
from torch import Tensor

from fastattn.training.datasets import dates
from fastattn.training.datasets.dates import LOCALES, Example, formats

PAD, BOS, EOS = 0, 1, 2
TARGET_CHARACTERS = "0123456789-"
TARGET_LENGTH = len("2024-03-05")


class Dates(dates.Dates):
    """The days from 1969 to 2068, some held out in every language, and sources as tokens.

    Args:
        seed, held_out, locales: as in `fastattn.training.datasets.dates.Dates`.
    """

    def __init__(
        self, seed: int = 0, held_out: float = 0.1, locales: Sequence[str] = LOCALES
    ) -> None:
        super().__init__(seed, held_out, locales)
        symbols = [f"<{name}>" for name in self.locales] + sorted(self._characters())
        self._sources = {symbol: number for number, symbol in enumerate(symbols, EOS + 1)}
        self._symbols = ["", "", "", *symbols]
        self.input_vocab_size = len(self._symbols)
        self.target_vocab_size = EOS + 1 + len(TARGET_CHARACTERS)

    def _characters(self) -> set[str]:
        """Every character of every format: its text, the names of months and days, the digits."""
        days = [datetime.date(2000, month, 1) for month in range(1, 13)]
        days += [datetime.date(1987, 4, day) for day in range(1, 8)]
        days += [datetime.date(2034, 5, 26)]
        return {
            character
            for name in self.locales
            for format_ in formats(name)
            for day in days
            for character in format_(day)
        }

    def encode_sources(self, examples: Iterable[Example]) -> Tensor:
        """Tokens ``(batch, seqlen)``: the locale, the characters, padding."""
        rows = [
            [self._sources[f"<{example.locale}>"], *map(self._sources.__getitem__, example.text)]
            for example in examples
        ]
        width = max(map(len, rows), default=0)
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    def encode_targets(self, examples: Iterable[Example]) -> Tensor:
        """Tokens ``(batch, 12)``: begin, ten characters, end."""
        rows = [
            [BOS, *(EOS + 1 + TARGET_CHARACTERS.index(character) for character in iso), EOS]
            for _, _, iso in examples
        ]
        return torch.tensor(rows)

    def decode_source(self, tokens: Iterable[int]) -> tuple[str, str]:
        """Locale and text of one source's tokens."""
        locale, *characters = [self._symbols[token] for token in tokens if token != PAD]
        return locale.strip("<>"), "".join(characters)

    def decode_target(self, tokens: Iterable[int]) -> str:
        """The characters of one target's tokens, up to its end."""
        text = ""
        for token in tokens:
            if token == EOS:
                break
            text += TARGET_CHARACTERS[token - EOS - 1] if token > EOS else "?"
        return text

    def batches(self, examples: list[Example], size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Sources and targets of `size` examples each, of like lengths, so as to pad little."""
        draw = random.Random(seed)
        chosen = []
        for start in range(0, len(examples), 16 * size):
            chunk = sorted(examples[start : start + 16 * size], key=lambda e: len(e.text))
            groups = [chunk[first : first + size] for first in range(0, len(chunk), size)]
            draw.shuffle(groups)
            chosen += groups
        return [(self.encode_sources(group), self.encode_targets(group)) for group in chosen]


def language(locale_name: str) -> str:
    """The English name of a locale's language, such as "Japanese" or "American English"."""
    name = Locale.parse(locale_name).get_display_name("en") or locale_name
    return name.replace(" (United States)", " (US)").replace(" (United Kingdom)", " (UK)")
