"""Names of countries, languages, scripts and currencies in many languages, from Babel's CLDR."""

import random
from collections import defaultdict

from babel import Locale

from fastattn.training.datasets import Dataset

# All written in Latin letters, so that the alphabet alone tells little.
_LANGUAGES = "cs cy da de en es et eu fi fr hu is it lt lv nl pl pt ro sq sw tr vi"
LANGUAGES = tuple(_LANGUAGES.split())
KINDS = ("territories", "languages", "scripts", "currencies")


def load(held_out: float = 0.15, seed: int = 0) -> Dataset:
    """For text classification: names, and their language's code.

    A name that two languages share is left out: it has no right answer.

    Args:
        held_out: share of the things whose names are held out, in every language.
        seed: of the choice of these.
    """
    names: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    owners: dict[str, set[str]] = defaultdict(set)
    for language in LANGUAGES:
        locale = Locale.parse(language)
        for kind in KINDS:
            for code, name in getattr(locale, kind).items():
                names[kind, code][language] = name
                owners[name].add(language)
    things = sorted(names)
    random.Random(seed).shuffle(things)
    count = round(held_out * len(things))
    parts = []
    seen: set[str] = set()
    for chosen in (things[count:], things[:count]):
        part = {
            name: language
            for thing in chosen
            for language, name in names[thing].items()
            if len(owners[name]) == 1 and name not in seen
        }
        seen.update(part)
        parts.append(list(part.items()))
    return Dataset(*parts)
