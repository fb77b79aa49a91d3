"""Dates as people write them in many languages, from Babel's CLDR locale data, and their ISO form.

A source is a token for the locale and then the date's characters; the target is ``2024-03-05``.
Nothing that is ambiguous is left:

- The locale's token tells 03/04/2005 in American English from 03/04/2005 in French. A locale's
  numeric formats must all put day, month and year in one order; others are dropped.
- Two digits of a year stand for 1969 to 2068, the rule of POSIX; all dates are from these years.
- A format is dropped if two months look the same in it.
"""

import datetime
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from babel import Locale
from babel.dates import DateTimeFormat, parse_pattern
from torch import Tensor

_LOCALES = (
    "en_US en_GB de fr es pt it nl sv da nb fi is et lv pl cs sk hu ro hr sl el ru uk bg tr id vi "
    "sw eu ca ja zh ko th hi mr bn ta ar fa he ka hy my ne"
)
LOCALES = tuple(_LOCALES.split())
STYLES = ("short", "medium", "long", "full")
SKELETONS = ("yMd", "yMEd", "yMMMd", "yMMMEd", "yMMMMd", "yMMMMEd", "yMMMMEEEEd", "yMEEEEd")
FIRST, LAST = datetime.date(1969, 1, 1), datetime.date(2068, 12, 31)
# The digit zero of CLDR's decimal numbering systems that are the native ones of these locales.
ZEROS = {
    "arab": 0x0660,
    "arabext": 0x06F0,
    "beng": 0x09E6,
    "deva": 0x0966,
    "mymr": 0x1040,
    "tamldec": 0x0BE6,
    "thai": 0x0E50,
}

PAD, BOS, EOS = 0, 1, 2
TARGET_CHARACTERS = "0123456789-"
TARGET_LENGTH = len("2024-03-05")


class Example(NamedTuple):
    """A date in one language, and the answer."""

    locale: str
    text: str
    iso: str


class DateFormat:
    """One way to write a date: fixed text and fields, each field a table of its values.

    Args:
        locale: whose names it uses.
        pattern: of CLDR, such as ``d MMMM y``.
        zero: code point of the digit zero.
    """

    def __init__(self, locale: Locale, pattern: str, zero: int = ord("0")) -> None:
        self.locale, self.pattern, self.zero = locale, pattern, zero
        self._pieces = re.split(
            r"%\((\w+)\)s", str(parse_pattern(pattern).format).replace("%%", "%")
        )
        self.fields: list[str] = self._pieces[1::2]
        self._digits = {ord("0") + digit: zero + digit for digit in range(10)}

    def __call__(self, date: datetime.date) -> str:
        """The date as text."""
        pieces = self._pieces.copy()
        for index in range(1, len(pieces), 2):
            pieces[index] = _field(self.locale, pieces[index], *_value(pieces[index], date))
        text = "".join(pieces)
        return text if self.zero == ord("0") else text.translate(self._digits)

    @property
    def order(self) -> str:
        """The order of day, month and year if all are numbers, such as "dMy"; "" otherwise."""
        letters = [field[0].replace("L", "M") for field in self.fields if field[0] in "dMLy"]
        wordy = any(field[0] in "ML" and len(field) > 2 for field in self.fields)
        return "" if wordy else "".join(letters)

    @property
    def complete(self) -> bool:
        """Whether it tells day, month and year, and no two months look the same."""
        months = [datetime.date(2000, month, 1) for month in range(1, 13)]
        parts = {field[0].replace("L", "M") for field in self.fields}
        return {"d", "M", "y"} <= parts and len({self(date) for date in months}) == 12


def _value(field: str, date: datetime.date) -> tuple[int, int, int]:
    """A date of the same value in this field; one for each of its values."""
    if field[0] == "y":
        return date.year, 1, 1
    if field[0] in "ML":
        return 2000, date.month, 1
    if field[0] == "d":
        return 2000, 1, date.day
    # 2001 began on a Monday.
    return 2001, 1, 1 + date.weekday()


@cache
def _field(locale: Locale, field: str, year: int, month: int, day: int) -> str:
    return DateTimeFormat(datetime.date(year, month, day), locale)[field]


@cache
def formats(locale_name: str) -> tuple[DateFormat, ...]:
    """The ways in which a locale writes dates, in its usual and in its native digits."""
    locale = Locale.parse(locale_name)
    patterns = [locale.date_formats[style].pattern for style in STYLES]
    patterns += [
        locale.datetime_skeletons[skeleton].pattern
        for skeleton in SKELETONS
        if skeleton in locale.datetime_skeletons
    ]
    systems = (locale.default_numbering_system, locale.other_numbering_systems.get("native"))
    zeros = dict.fromkeys(ZEROS.get(system or "latn", ord("0")) for system in systems)
    found = [
        DateFormat(locale, pattern, zero) for pattern in dict.fromkeys(patterns) for zero in zeros
    ]
    order = next(format_.order for format_ in found if format_.order)
    return tuple(format_ for format_ in found if format_.complete and format_.order in ("", order))


class Dates:
    """The days from 1969 to 2068, some held out in every language, and sources as tokens.

    Args:
        seed: of the choice of the days held out.
        held_out: share of the days held out.
        locales: names of Babel's locales.
    """

    def __init__(
        self, seed: int = 0, held_out: float = 0.1, locales: Sequence[str] = LOCALES
    ) -> None:
        self.locales = tuple(locales)
        days = [
            datetime.date.fromordinal(day) for day in range(FIRST.toordinal(), LAST.toordinal() + 1)
        ]
        random.Random(seed).shuffle(days)
        count = round(held_out * len(days))
        self.held_out, self.train = days[:count], days[count:]
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

    def sample(self, days: Sequence[datetime.date], count: int, seed: int | str) -> list[Example]:
        """Examples of some of `days`, all different; locale, format and day are drawn evenly."""
        draw = random.Random(seed)
        examples: dict[Example, None] = {}
        while len(examples) < count:
            name = draw.choice(self.locales)
            format_, day = draw.choice(formats(name)), draw.choice(days)
            examples[Example(name, format_(day), day.isoformat())] = None
        return list(examples)

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
