"""Small runs of every task."""

import json

import pytest

from fastattn.training import config
from fastattn.training.trainer import Trainer

pytest.importorskip("tokenizers")

SMALL = dict(d_model=16, num_layers=1, num_heads=2, d_ff=24, dropout=0.1)
_WORDS = "the cat sat on a mat and saw the dog run to the red house by the sea"
WORDS = _WORDS.split()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Of every test here."""


def _lines(count, form):
    return "\n".join(form(index) for index in range(count)) + "\n"


def _words(index, count=6):
    return " ".join(WORDS[(index * 5 + 3 * k + k * k) % len(WORDS)] for k in range(count))


def _question(index):
    words = _words(index).split()
    record = dict(question=words[3], context=" ".join(words), answer=words[4])
    return json.dumps({**record, "answer_start": len(" ".join(words[:4])) + 1})


@pytest.fixture
def files(tmp_path):
    """Writes files of examples of a task; the data section that names them."""

    def write(task, suffix=None):
        import numpy as np

        form = {
            "translation": lambda i: f"{_words(i)}\t{_words(i).upper()}",
            "text-classification": lambda i: f"{_words(i)}\t{('even', 'odd')[i % 2]}",
            "question-answering": _question,
        }.get(task, _words)
        if task == "question-answering":
            suffix = ".jsonl"
        suffix = suffix or (".tsv" if "\t" in form(0) else ".txt")
        found = {}
        for name, count in (("train", 40), ("held_out", 12)):
            path = tmp_path / f"{name}{suffix}"
            if task == "image-classification":
                path = tmp_path / f"{name}.npz"
                images = np.random.default_rng(0).random((count, 8, 8))
                np.savez(path, images=images, labels=np.arange(count) % 3)
            else:
                path.write_text(_lines(count, form))
            found[name] = str(path)
        return {**found, "seqlen": 48 if task == "question-answering" else 12}

    return write


@pytest.fixture
def values(files):
    """The values of a small run of a task, changed by section."""

    def make(task="translation", model=(), **sections):
        model = {**SMALL, **dict(model)}
        if task == "image-classification":
            model["patch_size"] = 4
        training = dict(
            steps=8, batch=4, warmup=2, eval_every=4, save_every=3, log_every=1, device="cpu"
        )
        made = dict(
            task=task,
            data=files(task),
            tokenizer=dict(kind="characters"),
            model=model,
            training=training,
        )
        for name, changes in sections.items():
            made[name] = {**made[name], **changes} if isinstance(changes, dict) else changes
        return made

    return make


@pytest.fixture
def trainer(values, tmp_path):
    """A trainer of such a run."""

    def make(task="translation", folder="run", resume=False, **sections):
        return Trainer(config.from_dict(values(task, **sections)), tmp_path / folder, resume=resume)

    return make
