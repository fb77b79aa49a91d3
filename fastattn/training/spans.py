"""Answers that are a span of a text: rows of tokens, the best span, and how right it is."""

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from fastattn.training.tokens import BOS, EOS, PAD


class Row(NamedTuple):
    """A question and a window of its context: ``[BOS] question [EOS] context [EOS]``."""

    ids: list[int]
    context: int  # where the context's tokens begin in it
    first: int  # which of the context's tokens that is


class Answer(NamedTuple):
    """What was found: text of the context, where it begins, and how probable it is."""

    text: str
    start: int
    probability: float


def rows(question: Sequence[int], context: Sequence[int], seqlen: int) -> list[Row]:
    """Rows of at most ``seqlen`` tokens; windows of a longer context overlap by half.

    Raises:
        ValueError: the question leaves no room for the context.
    """
    head = [BOS, *question, EOS]
    room = seqlen - len(head) - 1
    if room < 2:
        raise ValueError(
            f"question: expected at most {seqlen - 5} tokens beside its context in rows of "
            f"{seqlen}, got {len(question)}"
        )
    last = max(len(context) - room, 0)
    firsts = [*range(0, last, room // 2), last]
    return [Row([*head, *context[at : at + room], EOS], len(head), at) for at in firsts]


def span(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of characters ``start`` to ``end``; None: no token has them."""
    found = [
        token
        for token, (begin, stop) in enumerate(encoding.offsets)
        if begin < end and stop > start and stop > begin
    ]
    return (found[0], found[-1]) if found else None


def inputs(batch: Sequence[Row], model_types: int) -> dict[str, Tensor]:
    """Tensors of the rows, and with ``model_types`` 1 as the type of the context's tokens."""
    width = max(len(row.ids) for row in batch)
    found = {"tokens": torch.tensor([row.ids + [PAD] * (width - len(row.ids)) for row in batch])}
    if model_types > 1:
        first = torch.tensor([[row.context] for row in batch])
        found["types"] = (torch.arange(width) >= first).long()
    return found


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the first and the last token, ``(2, batch, seqlen)``; -inf where a row is padded."""
    found = model(batch["tokens"], types=batch.get("types"))
    return torch.stack(list(found)).masked_fill(batch["tokens"] == PAD, float("-inf"))


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, str]],
    seqlen: int | None = None,
    batch: int = 64,
) -> list[Answer]:
    """The most probable span of each context, of all its windows.

    Args:
        model: `fastattn.models.SpanClassifier`, trained on the task question-answering.
        tokenizer: the one that it was trained with.
        questions: pairs of a question and its context.
        seqlen: tokens of a row; default the most that the model takes.
        batch: rows at a time.

    Raises:
        ValueError: a question leaves no room for its context, or there is no context.
    """
    seqlen = model.config.max_positions if seqlen is None else seqlen
    device = next(model.parameters()).device
    asked = tokenizer.encode_batch([question for question, _ in questions])
    contexts = tokenizer.encode_batch([context for _, context in questions])
    if empty := [number for number, context in enumerate(contexts) if not context.ids]:
        raise ValueError(f"questions: expected text as context, question {empty[0]} has none")
    every = [
        (number, row)
        for number, (question, context) in enumerate(zip(asked, contexts))
        for row in rows(question.ids, context.ids, seqlen)
    ]
    every.sort(key=lambda pair: len(pair[1].ids))
    best: list[Any] = [None] * len(questions)
    for at in range(0, len(every), batch):
        part = every[at : at + batch]
        given = inputs([row for _, row in part], model.config.types)
        given = {name: tensor.to(device) for name, tensor in given.items()}
        start, end = logits(model, given).float().log_softmax(-1)
        for (number, row), from_, to in zip(part, start, end):
            own = slice(row.context, len(row.ids) - 1)
            scores = from_[own, None] + to[own]
            below = torch.ones_like(scores, dtype=torch.bool).tril(-1)
            score, place = scores.masked_fill(below, float("-inf")).flatten().max(0)
            first, last = divmod(int(place), len(scores))
            found = float(score), row.first + first, row.first + last
            best[number] = found if best[number] is None else max(best[number], found)
    made = []
    for (score, first, last), encoding, (_, text) in zip(best, contexts, questions):
        begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
        words = text[begin:stop]
        begin += len(words) - len(words.lstrip())
        made.append(Answer(words.strip(), begin, min(torch.tensor(score).exp().item(), 1.0)))
    return made


def exact(answer: str, right: Sequence[str]) -> bool:
    """Whether it is one of the right ones, as SQuAD counts (Rajpurkar et al. 2016, section 6.1)."""
    return any(_words(answer) == _words(each) for each in right)


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of the precision and recall of its words, to the nearest right answer."""
    return max(_f1(_words(answer), _words(each)) for each in right)


def _f1(got: list[str], expected: list[str]) -> float:
    if not got or not expected:
        return float(got == expected)
    common = sum((Counter(got) & Counter(expected)).values())
    return 2 * common / (len(got) + len(expected))


def _words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return [word for word in bare.split() if word not in ("a", "an", "the")]
