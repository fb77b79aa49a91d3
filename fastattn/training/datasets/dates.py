"""Dates as people write them in many languages, from Babel's CLDR locale data, and their ISO form.

A source is the locale's name and the date, such as ``de 5. März 2024``; the target is
``2024-03-05``.
Nothing that is ambiguous is left:

- The locale's name tells 03/04/2005 in American English from 03/04/2005 in French. A locale's
  numeric formats must all put day, month and year in one order; others are dropped.
- Two digits of a year stand for 1969 to 2068, the rule of POSIX; all dates are from these years.
- A format is dropped if two months look the same in it.
"""

import datetime
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from babel import Locale
from babel.dates import DateTimeFormat, parse_pattern

from fastattn.training.datasets import Dataset

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
    """The days from 1969 to 2068, some held out in every language.

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

    def sample(self, days: Sequence[datetime.date], count: int, seed: int | str) -> list[Example]:
        """Examples of some of `days`, all different; locale, format and day are drawn evenly."""
        draw = random.Random(seed)
        examples: dict[Example, None] = {}
        while len(examples) < count:
            name = draw.choice(self.locales)
            format_, day = draw.choice(formats(name)), draw.choice(days)
            examples[Example(name, format_(day), day.isoformat())] = None
        return list(examples)


def load(count: int = 40000, held_out: int = 2000, seed: int = 0) -> Dataset:
    """For translation: dates in the locales' ways, and their ISO form.

    Args:
        count, held_out: examples; those held out are of days that the others never show.
        seed: of the days held out, and of the examples.
    """
    dates = Dates(seed)

    def pairs(days: Sequence[datetime.date], number: int, name: str) -> list[tuple[str, str]]:
        found = dates.sample(days, number, f"{name} {seed}")
        return [(f"{example.locale} {example.text}", example.iso) for example in found]

    return Dataset(pairs(dates.train, count, "train"), pairs(dates.held_out, held_out, "held out"))
