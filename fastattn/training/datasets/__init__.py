"""Data to learn from that comes inside installed packages: nothing is downloaded.

Each module here has a function ``load(...) -> Dataset``. What its examples are depends on the task:

- translation: ``(source, target)``, two strings;
- text classification: ``(text, label)``, two strings;
- language modeling: a document, a string;
- question answering: a `Question`;
- image classification: ``(image, label)``, a float tensor ``(channels, height, width)`` with
  values from 0 to 1, and a string.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

# The data sets, and the tasks that they are for.
TASKS: dict[str, tuple[str, ...]] = {
    "dates": ("translation",),
    "digits": ("image-classification",),
    "english": ("language-modeling", "masked-language-modeling"),
    "languages": ("text-classification",),
}


class Dataset(NamedTuple):
    """Examples to train on, and others that training never sees."""

    train: Sequence[Any]
    held_out: Sequence[Any]


class Question(NamedTuple):
    """A question, and where its answer is.

    Args:
        question, context: texts.
        answers: all that are right; of the first is
        start: its place in the context, in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


def load(name: str, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: one of ``TASKS``.
        options: of its module's `load`.

    Raises:
        ValueError: an unknown name or option.
        ModuleNotFoundError: the package that it comes in is missing; the message says which.
    """
    if name not in TASKS:
        raise ValueError(f"data.dataset: expected one of {', '.join(TASKS)}, got {name!r}")
    try:
        module = import_module(f"fastattn.training.datasets.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastattn"):
            raise
        raise ModuleNotFoundError(
            f"dataset {name} needs {error.name}: pip install 'fastattn[recipes]'", name=error.name
        ) from error
    try:
        inspect.signature(module.load).bind(**options)
    except TypeError as error:
        raise ValueError(f"data.options: {error}") from None
    return module.load(**options)
