"""Names of countries, languages, scripts and currencies in many languages, from Babel's CLDR."""

import random
from collections import defaultdict

from babel import Locale

from fastattn.training.datasets import Dataset

# All written in Latin letters, so that the alphabet alone tells little.
_LANGUAGES = "cs cy da de en es et eu fi fr hu is it lt lv nl pl pt ro sq sw tr vi"
LANGUAGES = tuple(_LANGUAGES.split())
KINDS = ("territories", "languages", "scripts", "currencies")


def load(names: int = 3, count: int = 1000, held_out: float = 0.15, seed: int = 0) -> Dataset:
    """For text classification: some names after another, and their language's code.

    A name that two languages share is left out: it has no right answer.

    Args:
        names: how many to an example.
        count: examples of a language to train on; those held out are a tenth as many.
        held_out: share of the things whose names are held out, in every language.
        seed: of the choice of these, and of the examples.
    """
    named: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    owners: dict[str, set[str]] = defaultdict(set)
    for language in LANGUAGES:
        locale = Locale.parse(language)
        for kind in KINDS:
            for code, name in getattr(locale, kind).items():
                named[kind, code][language] = name
                owners[name].add(language)
    things = sorted(named)
    draw = random.Random(seed)
    draw.shuffle(things)
    split = round(held_out * len(things))
    parts = []
    seen: set[str] = set()
    for chosen, number in ((things[split:], count), (things[:split], count // 10)):
        part = []
        for language in LANGUAGES:
            found = (named[thing].get(language, "") for thing in chosen)
            own = [name for name in found if len(owners[name]) == 1 and name not in seen]
            seen.update(own)
            part += [(", ".join(draw.sample(own, names)), language) for _ in range(number)]
        parts.append(part)
    return Dataset(*parts)
