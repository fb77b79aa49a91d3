"""What each task makes of its examples: a model, batches, a loss, and what counts as right."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastattn import models
from fastattn.ops import cross_entropy, linear_cross_entropy
from fastattn.training import spans, tokens
from fastattn.training.config import RunConfig
from fastattn.training.datasets import Dataset, Question
from fastattn.training.tokens import BOS, EOS, MASK, PAD, SPECIAL

IGNORED = -100
MASKED = 0.15  # share of the tokens to predict, of which 80 % are hidden and 10 % changed

Batch = dict[str, Tensor]


class Output(NamedTuple):
    """What a model makes of a batch."""

    loss: Tensor  # summed over the targets
    right: Tensor | None  # how many of them it has as the most probable; None: not counted


class Task(ABC):
    """One task on one data set.

    Args:
        config: of the run.
        dataset: its examples.
        folder: of a model to begin with, whose tokenizer and labels are kept.
    """

    model_name: ClassVar[str]
    unit = "examples"

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path | None = None) -> None:
        self.config = config
        self.dataset = dataset

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The model's fields that the data decides."""

    @abstractmethod
    def examples(self, name: str, epoch: int) -> Sequence[Any]:
        """The "train" or "held_out" examples of an epoch, encoded."""

    @abstractmethod
    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        """Tensors of these; a seed, which training gives, draws what is drawn."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        """The loss of a batch, and if asked for, how many targets are right."""

    def length(self, example: Any) -> int:
        """By which the examples of a batch are alike."""
        return 0

    def targets(self, batch: Batch) -> int:
        """How many a batch has."""
        return int((batch["targets"] != IGNORED).sum())

    def build(self, first: nn.Module | None = None) -> nn.Module:
        """A new model, of the sizes of `first`, which it will begin with."""
        fields, chosen = self.fields(), self.config.model
        given: Any = None if first is None else first.config
        if isinstance(given, models.MODELS[self.model_name].Config):
            if "preset" in chosen:
                raise ValueError(
                    "model.preset: expected none beside training.init, whose sizes the model has, "
                    f"got {chosen['preset']!r}"
                )
            labels = {name: fields[name] for name in ("num_labels",) if name in fields}
            fields |= {**given.to_dict(), **labels}
        try:
            return models.build(self.model_name, **{**fields, **chosen})
        except TypeError as error:
            raise ValueError(f"model: {error}") from error

    def final(self, model: Any, examples: Sequence[Any]) -> dict[str, float]:
        """Further metrics of a trained model on encoded examples."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027
        """What beside the model is needed to use it."""


class _TextTask(Task):
    """A task with a tokenizer."""

    unit = "tokens"

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path | None = None) -> None:
        super().__init__(config, dataset, folder)
        if config.tokenizer.file is not None:
            self.tokenizer = tokens.read(config.tokenizer.file)
        elif folder is not None and (folder / "tokenizer.json").is_file():
            self.tokenizer = tokens.read(folder / "tokenizer.json")
        else:
            self.tokenizer = tokens.learn(config.tokenizer, self._texts(dataset.train))
        self._encoded: dict[str, Sequence[Any]] = {}

    def _texts(self, examples: Iterable[Any]) -> Iterable[str]:
        for example in examples:
            yield from (example,) if isinstance(example, str) else example

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> Sequence[Any]:
        """These as tokens."""

    def examples(self, name: str, epoch: int) -> Sequence[Any]:
        if name not in self._encoded:
            self._encoded[name] = self.encode(getattr(self.dataset, name))
        return self._encoded[name]

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.tokenizer.get_vocab_size()


class Translation(_TextTask):
    """Pairs of texts, on `fastattn.models.Transformer`."""

    model_name = "Transformer"

    def fields(self) -> dict[str, Any]:
        pairs = [*self.examples("train", 0), *self.examples("held_out", 0)]
        longest = [max(map(len, side)) for side in zip(*pairs)]
        return dict(
            input_vocab_size=self.vocab_size,
            target_vocab_size=self.vocab_size,
            pad_id=PAD,
            tie_embeddings="all",
            max_positions=2 * max(longest),
        )

    def encode(self, examples: Sequence[Any]) -> Sequence[Any]:
        sources = self.tokenizer.encode_batch([source for source, _ in examples])
        targets = self.tokenizer.encode_batch([target for _, target in examples])
        return [
            ([*source.ids, EOS], [BOS, *target.ids, EOS])
            for source, target in zip(sources, targets)
        ]

    def length(self, example: Any) -> int:
        return len(example[0])

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        target = _padded([target for _, target in examples], PAD)
        return {
            "source": _padded([source for source, _ in examples], PAD),
            "target": target[:, :-1],
            "targets": target[:, 1:].masked_fill(target[:, 1:] == PAD, IGNORED),
        }

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        logits = model(batch["source"], batch["target"]).flatten(0, 1)
        return _output(logits, batch["targets"].flatten(), smoothing, count)

    def final(self, model: Any, examples: Sequence[Any]) -> dict[str, float]:
        right = 0
        by_length = sorted(examples, key=self.length)
        device = next(model.parameters()).device
        for start in range(0, len(by_length), 256):
            chunk = by_length[start : start + 256]
            longest = max(len(target) for _, target in chunk)
            answers = model.generate(
                _padded([source for source, _ in chunk], PAD).to(device),
                bos_id=BOS,
                eos_id=EOS,
                max_new_tokens=min(longest + 8, model.config.max_positions),
            ).tolist()
            for answer, (_, target) in zip(answers, chunk):
                end = answer.index(EOS) + 1 if EOS in answer else len(answer)
                right += answer[:end] == target[1:]
        return {"exact": right / len(by_length)}


class _WindowTask(_TextTask):
    """Running text, cut into windows of ``seqlen`` tokens that begin elsewhere in each epoch."""

    def encode(self, examples: Sequence[Any]) -> Sequence[Any]:
        stream: list[int] = []
        for document in self.tokenizer.encode_batch(list(examples)):
            stream += [BOS, *document.ids, EOS]
        return stream

    def examples(self, name: str, epoch: int) -> Sequence[Any]:
        stream, size = super().examples(name, epoch), self.config.data.seqlen
        start = 0
        if name == "train":
            start = random.Random(f"{self.config.seed} window {epoch}").randrange(size)
        # A window holds one token more: each but the last has the next as its target.
        windows = [stream[at : at + size + 1] for at in range(start, len(stream) - 1, size)]
        if not windows:
            raise ValueError(f"data.{name}: expected more than {start + 1} tokens of text")
        return windows

    def length(self, example: Any) -> int:
        return len(example)


class LanguageModeling(_WindowTask):
    """Predict each next token, on `fastattn.models.Decoder`."""

    model_name = "Decoder"

    def fields(self) -> dict[str, Any]:
        return dict(vocab_size=self.vocab_size, max_positions=self.config.data.seqlen)

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        window = _padded(examples, IGNORED)
        return {"tokens": window[:, :-1].clamp(min=PAD), "targets": window[:, 1:]}

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        states = model.hidden(batch["tokens"])
        return _linear_output(states, model.output, batch["targets"], smoothing, count)


class MaskedLanguageModeling(_WindowTask):
    """Predict hidden tokens (Devlin et al. 2019, section 3.1): an encoder's pre-training."""

    model_name = "MaskedLanguageModel"

    def fields(self) -> dict[str, Any]:
        seqlen = self.config.data.seqlen + 1
        return dict(vocab_size=self.vocab_size, max_positions=seqlen, types=0, pad_id=PAD)

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        window = _padded(examples, PAD)
        generator = torch.Generator().manual_seed(_number(seed))
        chance = torch.rand(window.shape, generator=generator)
        chosen = (chance < MASKED) & (window >= len(SPECIAL))
        targets = window.masked_fill(~chosen, IGNORED)
        random_tokens = torch.randint(
            len(SPECIAL), self.vocab_size, window.shape, generator=generator
        )
        hidden = chosen & (chance < 0.8 * MASKED)
        changed = chosen & (chance >= 0.9 * MASKED)
        window = torch.where(changed, random_tokens, window.masked_fill(hidden, MASK))
        return {"tokens": window, "targets": targets}

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        chosen = batch["targets"] != IGNORED
        states = model.hidden(batch["tokens"])[chosen]
        return _linear_output(states, model.output, batch["targets"][chosen], smoothing, count)


class _Labelled(Task):
    """A task whose targets are labels."""

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path | None = None) -> None:
        super().__init__(config, dataset, folder)
        if folder is not None and (folder / "labels.json").is_file():
            self.labels = json.loads((folder / "labels.json").read_text())
        else:
            self.labels = sorted({label for _, label in dataset.train})
        self._number = {label: number for number, label in enumerate(self.labels)}

    def label(self, label: str) -> int:
        """Its number."""
        if label not in self._number:
            raise ValueError(f"label: expected one of the training's, got {label!r}")
        return self._number[label]

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "labels.json").write_text(json.dumps(self.labels) + "\n")


class TextClassification(_Labelled, _TextTask):
    """A label for each text, on `fastattn.models.SequenceClassifier`."""

    model_name = "SequenceClassifier"
    unit = "examples"
    longest: int | None = None  # tokens that the model takes; the others of a text are cut off

    def build(self, first: nn.Module | None = None) -> nn.Module:
        model: Any = super().build(first)
        self.longest = model.config.max_positions
        return model

    def _texts(self, examples: Iterable[Any]) -> Iterable[str]:
        return (text for text, _ in examples)

    def fields(self) -> dict[str, Any]:
        longest = max(len(ids) for ids, _ in self.examples("train", 0))
        return dict(
            vocab_size=self.vocab_size,
            max_positions=max(2 * longest, self.config.data.seqlen + 1),
            types=0,
            pad_id=PAD,
            num_labels=len(self.labels),
        )

    def encode(self, examples: Sequence[Any]) -> Sequence[Any]:
        texts = self.tokenizer.encode_batch([text for text, _ in examples])
        return [([BOS, *text.ids], self.label(label)) for text, (_, label) in zip(texts, examples)]

    def length(self, example: Any) -> int:
        return len(example[0])

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        return {
            "tokens": _padded([ids[: self.longest] for ids, _ in examples], PAD),
            "targets": torch.tensor([label for _, label in examples]),
        }

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        return _output(model(batch["tokens"]), batch["targets"], smoothing, count)


class ImageClassification(_Labelled):
    """A label for each image, on `fastattn.models.VisionTransformer`."""

    model_name = "VisionTransformer"

    def fields(self) -> dict[str, Any]:
        channels, size, _ = self.dataset.train[0][0].shape
        return dict(num_labels=len(self.labels), image_size=size, channels=channels)

    def examples(self, name: str, epoch: int) -> Sequence[Any]:
        return [(image, self.label(label)) for image, label in getattr(self.dataset, name)]

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        images = torch.stack([image for image, _ in examples])
        if seed is not None and self.config.data.shift:
            images = _shifted(images, self.config.data.shift, random.Random(seed))
        return {"images": images, "targets": torch.tensor([label for _, label in examples])}

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        return _output(model(batch["images"]), batch["targets"], smoothing, count)


class QuestionAnswering(_TextTask):
    """A span of each context, on `fastattn.models.SpanClassifier`.

    The targets are its first and its last token; both are the first token of the row in a window
    of the context without the answer (Devlin et al. 2019, section 4.3).
    """

    model_name = "SpanClassifier"
    unit = "examples"
    types = 0  # of the model
    seqlen = 0

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path | None = None) -> None:
        super().__init__(config, dataset, folder)
        if config.training.label_smoothing:
            raise ValueError(
                "training.label_smoothing: expected 0 for question-answering, got "
                f"{config.training.label_smoothing}"
            )

    def build(self, first: nn.Module | None = None) -> nn.Module:
        model: Any = super().build(first)
        self.types = model.config.types
        self.seqlen = min(self.config.data.seqlen, model.config.max_positions)
        return model

    def _texts(self, examples: Iterable[Any]) -> Iterable[str]:
        return (text for example in examples for text in (example.question, example.context))

    def fields(self) -> dict[str, Any]:
        seqlen = self.config.data.seqlen
        return dict(vocab_size=self.vocab_size, max_positions=seqlen, types=2, pad_id=PAD)

    def encode(self, examples: Sequence[Any]) -> Sequence[Any]:
        questions = self.tokenizer.encode_batch([example.question for example in examples])
        contexts = self.tokenizer.encode_batch([example.context for example in examples])
        return [
            (row, target, example)
            for question, context, example in zip(questions, contexts, examples)
            for row, target in self._windows(question, context, example)
        ]

    def _windows(self, question: Any, context: Any, example: Question) -> list[Any]:
        found = spans.span(context, example.start, example.start + len(example.answers[0]))
        try:
            rows = spans.rows(question.ids, context.ids, self.seqlen)
        except ValueError as error:
            raise ValueError(f"{error}: {example.question[:80]!r}; see data.seqlen") from None
        windows = []
        for row in rows:
            shift, end = row.context - row.first, len(row.ids) - 1
            within = found and row.context <= found[0] + shift and found[1] + shift < end
            windows.append(
                (row, (found[0] + shift, found[1] + shift) if found and within else (0, 0))
            )
        if not any(target[0] for _, target in windows):
            raise ValueError(
                f"data.seqlen: no window of {self.seqlen} tokens has the whole answer "
                f"{example.answers[0][:80]!r} of {example.question[:80]!r}"
            )
        return windows

    def length(self, example: Any) -> int:
        return len(example[0].ids)

    def batch(self, examples: Sequence[Any], seed: str | None) -> Batch:
        targets = torch.tensor([target for _, target, _ in examples])
        return {**spans.inputs([row for row, _, _ in examples], self.types), "targets": targets}

    def loss(self, model: Any, batch: Batch, smoothing: float, count: bool) -> Output:
        logits = spans.logits(model, batch).flatten(0, 1)
        return _output(logits, batch["targets"].T.flatten(), smoothing, count)

    def final(self, model: Any, examples: Sequence[Any]) -> dict[str, float]:
        asked = list({id(example): example for _, _, example in examples}.values())
        pairs = [(example.question, example.context) for example in asked]
        found = spans.answers(model, self.tokenizer, pairs, self.seqlen, self.config.training.batch)
        scores = [
            (spans.exact(answer.text, example.answers), spans.f1(answer.text, example.answers))
            for answer, example in zip(found, asked)
        ]
        exact, f1 = (sum(column) / len(scores) for column in zip(*scores))
        return {"exact": exact, "f1": f1}


TASKS: dict[str, type[Task]] = {
    "translation": Translation,
    "language-modeling": LanguageModeling,
    "masked-language-modeling": MaskedLanguageModeling,
    "text-classification": TextClassification,
    "image-classification": ImageClassification,
    "question-answering": QuestionAnswering,
}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _number(seed: str | None) -> int:
    return random.Random(seed or "held out").getrandbits(63)


def _shifted(images: Tensor, most: int, draw: random.Random) -> Tensor:
    """Each image moved by its own number of pixels; what comes in is 0."""
    wide = nn.functional.pad(images, (most,) * 4)
    size = images.shape[-1]
    moved = []
    for image in wide:
        y, x = draw.randint(0, 2 * most), draw.randint(0, 2 * most)
        moved.append(image[:, y : y + size, x : x + size])
    return torch.stack(moved)


def _output(logits: Tensor, targets: Tensor, smoothing: float, count: bool) -> Output:
    loss = cross_entropy(
        logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
    )
    return Output(loss, (logits.argmax(-1) == targets).sum() if count else None)


def _linear_output(
    states: Tensor, output: nn.Linear, targets: Tensor, smoothing: float, count: bool
) -> Output:
    """As `_output`, of the logits that `output` makes, which training never has in memory."""
    states, targets = states.reshape(-1, states.shape[-1]), targets.flatten()
    if count:
        return _output(output(states), targets, smoothing, count)
    loss = linear_cross_entropy(
        states,
        output.weight,
        targets,
        bias=output.bias,
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )
    return Output(loss, None)
