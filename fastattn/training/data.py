"""Examples from files, and their order: which ones make up which batch of which step."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.training import datasets
from fastattn.training.config import DataConfig
from fastattn.training.datasets import Dataset, Question

# What an example of a task is made of, as the keys of a .jsonl file.
KEYS = {
    "translation": ("source", "target"),
    "text-classification": ("text", "label"),
    "language-modeling": ("text",),
    "masked-language-modeling": ("text",),
    "question-answering": ("question", "context", "answer"),
}


def load(config: DataConfig, task: str) -> Dataset:
    """The examples of a run, as `fastattn.training.datasets` describes them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a data set is for another task; a file can't be read as examples of the task,
            or there are none.
    """
    if config.dataset is not None:
        tasks = datasets.TASKS.get(config.dataset, (task,))  # `load` tells of unknown ones
        if task not in tasks:
            raise ValueError(
                f"data.dataset: {config.dataset} is for the tasks {', '.join(tasks)}, got {task}"
            )
        return datasets.load(config.dataset, **config.options)
    parts = []
    for name in (config.train, config.held_out):
        path = Path(str(name))
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if task == "image-classification":
            examples = _images(path)
        elif task == "question-answering":
            examples = _questions(path)
        else:
            examples = _texts(path, KEYS[task])
        if not examples:
            raise ValueError(f"{path}: expected examples, got none")
        parts.append(examples)
    return Dataset(*parts)


def _texts(path: Path, keys: tuple[str, ...]) -> list[Any]:
    rows: list[tuple[str, ...]]
    if path.suffix == ".jsonl":
        rows = []
        for place, record in _records(path):
            if missing := [key for key in keys if key not in record]:
                raise ValueError(
                    f"{place}: expected an object with {', '.join(keys)}, got no {missing[0]}"
                )
            rows.append(tuple(str(record[key]) for key in keys))
    elif path.suffix in (".csv", ".tsv"):
        with path.open(newline="") as file:
            rows = [tuple(row) for row in csv.reader(file, delimiter=",\t"[path.suffix == ".tsv"])]
        for number, row in enumerate(rows, 1):
            if len(row) != len(keys):
                raise ValueError(
                    f"{path}:{number}: expected columns {', '.join(keys)}, got {len(row)} columns"
                )
    elif path.suffix == ".txt" and len(keys) == 1:
        rows = [(path.read_text(),)]
    else:
        raise ValueError(f"{path}: expected .jsonl, .csv, .tsv, or of plain text .txt")
    return [row[0] for row in rows] if len(keys) == 1 else rows


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its place, for messages."""
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected an object: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {line[:80]!r}")
        yield f"{path}:{number}", record


def _questions(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return [_question(place, record) for place, record in _records(path)]
    keys = KEYS["question-answering"]
    return [
        _question(f"{path}:{number}", dict(zip(keys, row)))
        for number, row in enumerate(_texts(path, keys), 1)
    ]


def _question(place: str, record: dict[str, Any]) -> Question:
    for key in ("question", "context"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{place}: {key}: expected text, got {record.get(key)!r}")
    context = record["context"]
    name = "answers" if "answers" in record else "answer"
    right = record["answers"] if "answers" in record else [record.get("answer")]
    if not isinstance(right, list) or not right:
        raise ValueError(f"{place}: answers: expected a list of texts, got {right!r}")
    for answer in right:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{place}: {name}: expected text of the context, got {answer!r}")
    start = record.get("answer_start", context.find(right[0]))
    if start == -1:
        raise ValueError(f"{place}: {name}: expected text of the context, which lacks {right[0]!r}")
    if type(start) is not int or start < 0:
        raise ValueError(f"{place}: answer_start: expected a whole number, got {start!r}")
    if not context.startswith(right[0], start):
        there = context[start : start + len(right[0])]
        raise ValueError(
            f"{place}: answer_start: expected where {right[0]!r} begins, got {start}, "
            f"with {there!r}"
        )
    return Question(record["question"], context, tuple(right), start)


def _images(path: Path) -> list[Any]:
    import numpy as np

    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected .npz with arrays images and labels")
    with np.load(path, allow_pickle=False) as arrays:
        if missing := {"images", "labels"} - set(arrays.files):
            raise ValueError(f"{path}: expected arrays images and labels, {missing} is missing")
        images, labels = torch.from_numpy(arrays["images"]), arrays["labels"]
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or images.shape[2] != images.shape[3] or len(images) != len(labels):
        raise ValueError(
            f"{path}: expected images (n, size, size) or (n, channels, size, size) and n labels, "
            f"got {tuple(images.shape)} and {labels.shape}"
        )
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return [(image, str(label)) for image, label in zip(images, labels)]


class Order:
    """Which examples make up each batch: all of them once an epoch, in an order of its own.

    It is a function of the seed and the batch's number alone, so that a run may go on anywhere.

    Args:
        epoch: the examples of an epoch, by its number.
        length: of an example, by which those of a batch are alike, so as to pad little.
        batch: examples of a batch.
        seed: of the order.
    """

    def __init__(
        self,
        epoch: Callable[[int], Sequence[Any]],
        length: Callable[[Any], int],
        batch: int,
        seed: int,
    ) -> None:
        self._epoch = epoch
        self._length = length
        self._batch = batch
        self._seed = seed
        self._first = 0  # number of the first batch of the current epoch
        self._number = -1
        self._batches: list[list[Any]] = []

    def __getitem__(self, number: int) -> list[Any]:
        """The examples of batch `number`, counted over all epochs."""
        if number < self._first:
            self._first, self._number, self._batches = 0, -1, []
        while number >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._number += 1
            self._batches = self._make(self._number)
        return self._batches[number - self._first]

    def _make(self, epoch: int) -> list[list[Any]]:
        draw = random.Random(f"{self._seed} {epoch}")
        examples, size = list(self._epoch(epoch)), self._batch
        draw.shuffle(examples)
        batches = []
        for start in range(0, len(examples), 16 * size):
            chunk = sorted(examples[start : start + 16 * size], key=self._length)
            batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        draw.shuffle(batches)
        return batches
