"""Answers that are spans: files, windows, what counts as right, and the use of a trained model."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastattn import models
from fastattn.training import config, data, datasets, spans, tokens
from fastattn.training.config import TokenizerConfig

DOC = Path(__file__).parent.parent.parent / "docs" / "recipes.md"
GOOD = dict(question="Who ran?", context="The dog ran. The dog sat.", answer="dog")


def _load(tmp_path, *records, suffix=".jsonl"):
    path = tmp_path / f"questions{suffix}"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("\n".join(lines) + "\n")
    section = config.DataConfig(train=str(path), held_out=str(path))
    return data.load(section, "question-answering").train


def test_files_of_questions(tmp_path):
    several = {**GOOD, "answers": ["dog", "The dog"], "answer_start": 17}
    found = _load(tmp_path, GOOD, several)
    assert found[0] == datasets.Question("Who ran?", GOOD["context"], ("dog",), 4)
    assert (found[1].answers, found[1].start) == (("dog", "The dog"), 17)
    (row,) = _load(tmp_path, "Who ran?,The dog ran.,dog", suffix=".csv")
    assert row == datasets.Question("Who ran?", "The dog ran.", ("dog",), 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "cat"}, "answer: expected text of the context, which lacks 'cat'"),
        ({"answer": ""}, "answer: expected text of the context, got ''"),
        ({"answers": "dog"}, "answers: expected a list of texts, got 'dog'"),
        ({"answers": []}, "answers: expected a list of texts"),
        ({"answer_start": 5}, "answer_start: expected where 'dog' begins, got 5, with 'og '"),
        ({"answer_start": "4"}, "answer_start: expected a whole number, got '4'"),
        ({"question": None}, "question: expected text, got None"),
        ({"context": " "}, "context: expected text"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"questions\.jsonl:2: " + re.escape(message)):
        _load(tmp_path, GOOD, {**GOOD, **changes})


def test_lines_that_are_no_objects_are_named(tmp_path):
    for line in ("[1]", "{"):
        with pytest.raises(ValueError, match=r"questions\.jsonl:2: expected an object"):
            _load(tmp_path, GOOD, line)


def test_windows_cover_the_context_and_overlap_by_half():
    context = list(range(10, 33))
    found = spans.rows([5, 6], context, 15)
    assert all(row.ids[: row.context] == [tokens.BOS, 5, 6, tokens.EOS] for row in found)
    assert all(len(row.ids) == 15 for row in found)
    for row in found:
        assert row.ids[row.context : -1] == context[row.first : row.first + 10]
    assert [row.first for row in found] == [0, 5, 10, 13]
    assert len(spans.rows([5, 6], context[:10], 15)) == 1
    with pytest.raises(ValueError, match="question: expected at most 10 tokens .*, got 11"):
        spans.rows(range(11), context, 15)


@pytest.mark.parametrize("kind", config.TOKENIZERS)
def test_a_span_of_tokens_has_the_answer(kind):
    text = "the cat sat on the über mat"
    encoding = tokens.learn(TokenizerConfig(kind=kind, vocab_size=300), [text]).encode(text)
    for word in text.split():
        start = text.index(word)
        first, last = spans.span(encoding, start, start + len(word))
        assert text[encoding.offsets[first][0] : encoding.offsets[last][1]].strip() == word
    assert spans.span(encoding, 100, 101) is None


def test_targets_are_in_the_windows_that_have_the_whole_answer(trainer):
    run = trainer("question-answering", data=dict(seqlen=20))
    rows = run.task.examples("train", 0)
    assert len(rows) > len(run.task.dataset.train)
    told = set()
    for row, (first, last), example in rows:
        if first:
            word = "".join(map(run.task.tokenizer.id_to_token, row.ids[first : last + 1]))
            assert word == example.answers[0]
            told.add(example)
        else:
            assert last == 0
    assert told == set(run.task.dataset.train)
    batch = run.task.batch(rows[:4], None)
    types = torch.zeros_like(batch["tokens"])
    for index, (row, _, _) in enumerate(rows[:4]):
        types[index, row.context :] = 1
    assert batch["types"].equal(types)


def test_what_fits_in_no_window_is_named(trainer):
    with pytest.raises(ValueError, match=r"question: expected at most .*see data\.seqlen"):
        trainer("question-answering", data=dict(seqlen=6)).run()
    with pytest.raises(ValueError, match="training.label_smoothing: expected 0"):
        trainer("question-answering", training=dict(label_smoothing=0.1))


def test_the_loss_is_the_mean_of_both_cross_entropies(trainer):
    run = trainer("question-answering", model=dict(dropout=0.0))
    batch = run.task.batch(run.task.examples("train", 0)[:7], None)
    output = run.task.loss(run.model, batch, 0.0, True)
    found = run.model(batch["tokens"], types=batch["types"])
    expected = 0
    for side, targets in zip(found, batch["targets"].T):
        hidden = side.masked_fill(batch["tokens"] == tokens.PAD, float("-inf"))
        expected += torch.nn.functional.cross_entropy(hidden, targets) / 2
    torch.testing.assert_close(output.loss / run.task.targets(batch), expected)


@pytest.mark.parametrize(
    "answer, right, exact, f1",
    [
        ("The Eiffel Tower!", ["eiffel tower"], True, 1.0),
        ("tower", ["Eiffel Tower"], False, 2 / 3),
        ("a red house", ["the house of red brick", "house"], False, 2 / 3),
        ("cat", ["dog"], False, 0.0),
        ("the the", ["a"], True, 1.0),
    ],
)
def test_exact_and_f1(answer, right, exact, f1):
    assert spans.exact(answer, right) == exact
    assert spans.f1(answer, right) == pytest.approx(f1)


def test_it_learns_and_is_used_as_the_document_says(trainer, monkeypatch, capsys):
    run = trainer(
        "question-answering",
        training=dict(steps=150, learning_rate=1e-2, batch=16, eval_every=150),
        model=dict(dropout=0.0, d_model=32, d_ff=64),
    )
    metrics = run.run()
    assert metrics["train_exact"] > 0.5 and metrics["train_f1"] >= metrics["train_exact"]
    folder = run.folder / "model"
    model = models.load(folder)
    tokenizer = tokens.read(folder / "tokenizer.json")
    pairs = [(example.question, example.context) for example in run.task.dataset.train]
    found = spans.answers(model, tokenizer, pairs)
    for one, (question, context) in zip(found, pairs):
        assert context.startswith(one.text, one.start) and 0 < one.probability <= 1
        (alone,) = spans.answers(model, tokenizer, [(question, context)])
        assert alone[:2] == one[:2]
    right = [
        spans.exact(one.text, each.answers) for one, each in zip(found, run.task.dataset.train)
    ]
    assert sum(right) / len(right) == metrics["train_exact"]
    with pytest.raises(ValueError, match="question 0 has none"):
        spans.answers(model, tokenizer, [("who", "")])
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    monkeypatch.chdir(run.folder.parent)
    run.folder.rename("fastattn-question-answering")
    exec(compile(code, DOC.name, "exec"), {})
    assert capsys.readouterr().out.strip()


class _Finds(torch.nn.Module):
    """A model that takes some tokens for an answer, each as surely as it is told."""

    def __init__(self, **sure):
        super().__init__()
        self.sure = sure
        self.config = models.EncoderConfig(vocab_size=99, types=0, max_positions=14)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids, types=None):
        score = torch.zeros(ids.shape)
        for token, value in self.sure.items():
            score[ids == int(token[1:])] = value
        return models.Span(score, score)


def test_long_contexts_are_answered_from_the_surest_window():
    letters = "".join(map(chr, range(ord("a"), ord("z") + 1)))
    tokenizer = tokens.learn(TokenizerConfig(kind="characters"), [letters])
    for seqlen in (14, 40):
        for letter in letters:
            sure = {"_5": 3.0, f"_{tokenizer.token_to_id(letter)}": 9.0}  # _5: "a"
            (found,) = spans.answers(_Finds(**sure), tokenizer, [("ab", letters)], seqlen)
            assert found[:2] == (letter, letters.index(letter))


def test_a_run_on_windows_tells_how_right_the_answers_are(trainer):
    run = trainer("question-answering", data=dict(seqlen=20), training=dict(steps=4))
    metrics = run.run()
    asked = run.task.dataset.held_out
    pairs = [(each.question, each.context) for each in asked]
    found = spans.answers(run.model, run.task.tokenizer, pairs, 20)
    right = [spans.f1(one.text, each.answers) for one, each in zip(found, asked)]
    assert metrics["held_out_f1"] == pytest.approx(sum(right) / len(right))
