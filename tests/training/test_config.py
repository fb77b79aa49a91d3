"""Configurations and files of examples: what is read, and what is refused by name."""

import json
import re

import pytest

from fastattn.training import config, data, datasets, run, tokens
from fastattn.training.config import TokenizerConfig

TOML = """
task = "language-modeling"
[data]
dataset = "english"
[training]
steps = 5
betas = [0.9, 0.95]
"""
YAML = """
task: language-modeling
data: {dataset: english}
training:
  steps: 5
  betas: [0.9, 0.95]
"""


def test_toml_yaml_and_json_say_the_same(tmp_path):
    found = []
    for suffix, text in ((".toml", TOML), (".yaml", YAML)):
        path = tmp_path / f"config{suffix}"
        path.write_text(text)
        found.append(config.read(str(path)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found[0].to_dict()))
    found.append(config.read(str(path)))
    assert found[0] == found[1] and found[0] == found[2]
    changed = config.read(str(path), ["training.steps=7", "model.d_model=8", "data.seqlen=9"])
    assert (changed.training.steps, changed.model, changed.data.seqlen) == (7, {"d_model": 8}, 9)


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_can_be_read(name):
    assert config.read(name).task in config.TASKS


@pytest.mark.parametrize(
    "changes, message",
    [
        (["training.step=7"], "training.step: unknown; expected of steps, batch"),
        (["modle.d_model=7"], "modle: unknown"),
        (["task=parsing"], "task: expected one of translation, .* got 'parsing'"),
        (["training.steps=0"], "training.steps: expected a whole number of at least 1, got 0"),
        (["training.batch=1.5"], "training.batch: expected a whole number"),
        (["training.learning_rate=-1"], "training.learning_rate: expected at least 0"),
        (["training.schedule=linear"], "training.schedule: expected one of cosine"),
        (["data.train=a.txt"], "data.dataset: expected either a data set or data.train"),
        (["training"], "set: expected key=value, got 'training'"),
        (["task.x=1"], "set: task is no section"),
        (["training=1"], "training: expected a section, got 1"),
        (["model=3"], "model: expected a section, got 3"),
        (["data.options=[]"], r"data.options: expected a section, got \[\]"),
        (["training.betas=3"], "training.betas: expected two numbers from 0 to below 1, got 3"),
        (["training.betas=[0.9, 1]"], "training.betas: expected two numbers"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    with pytest.raises(ValueError, match=message):
        config.read(str(path), changes)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.toml", "task = ", r"a\.toml: "),
        ("a.yaml", "a: [", r"a\.yaml: "),
        ("a.json", "[1]", "expected sections, got list"),
        ("a.ini", "", "expected .toml, .yaml or .json"),
        ("a.toml", "task = 'translation'", "training.steps: expected, got none"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        config.read(str(tmp_path / name))


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert run("nothing", [], tmp_path, False) == 1
    assert "expected a file or one of the recipes image-classification" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.d_modell=64", "model: d_modell: not of VisionConfig"),
        ("model.d_model=x", "model: d_model: expected int, got str"),
        ("model.d_model=0", "d_model: expected at least 1, got 0"),
        ('data.options={"foo": 1}', "data.options: got an unexpected keyword argument 'foo'"),
        ("data.dataset=letters", "data.dataset: expected one of dates, .* got 'letters'"),
        ("task=question-answering", "data.dataset: digits is for the tasks image-classification,"),
    ],
)
def test_the_command_names_a_wrong_value(tmp_path, capsys, change, message):
    pytest.importorskip("sklearn")
    assert run("image-classification", [change], tmp_path, False) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "suffix, text",
    [
        (".jsonl", '{"source": "a b", "target": "c"}\n{"source": "d", "target": "e"}\n'),
        (".csv", 'a b,c\n"d",e\n'),
        (".tsv", "a b\tc\nd\te\n"),
    ],
)
def test_files_of_pairs(tmp_path, suffix, text):
    path = tmp_path / f"examples{suffix}"
    path.write_text(text)
    section = config.DataConfig(train=str(path), held_out=str(path))
    assert list(data.load(section, "translation").train) == [("a b", "c"), ("d", "e")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"source": "a"}', r"a\.jsonl:1: expected an object with source, target"),
        ("a.csv", "a,b\nc", r"a\.csv:2: expected columns source, target, got 1"),
        ("a.txt", "a", r"a\.txt: expected .jsonl, .csv, .tsv"),
        ("a.csv", "", "expected examples, got none"),
    ],
)
def test_wrong_files_of_pairs_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(config.DataConfig(train=str(path), held_out=str(path)), "translation")
    with pytest.raises(FileNotFoundError, match="gone"):
        data.load(config.DataConfig(train="gone.csv", held_out=str(path)), "translation")


def test_an_order_is_all_examples_an_epoch_and_needs_no_past():
    def make():
        return data.Order(lambda epoch: range(53), lambda example: example % 7, 5, seed=1)

    order, batches = make(), []
    per_epoch = 11
    for number in range(3 * per_epoch):
        batches.append(order[number])
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = [example for batch in part for example in batch]
        assert sorted(seen) == list(range(53))
    assert batches[:per_epoch] != batches[per_epoch : 2 * per_epoch]
    assert make()[25] == batches[25] and order[3] == batches[3]


@pytest.mark.parametrize("kind", config.TOKENIZERS)
def test_tokenizers(tmp_path, kind):
    texts = ["the cat sat on the mat", "a dog\nran – to the sea", "über allen gipfeln"]
    tokenizer = tokens.learn(TokenizerConfig(kind=kind, vocab_size=300), texts)
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokens.UNKNOWN not in ids and min(ids) >= len(tokens.SPECIAL)
        assert tokenizer.decode(ids).split() == text.split()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = tokens.read(tmp_path / "tokenizer.json")
    assert again.encode(texts[0]).ids == tokenizer.encode(texts[0]).ids
    for each in (tokenizer, again):  # a text may speak of them
        assert not {tokens.PAD, tokens.MASK} & {*each.encode("the [MASK] of [PAD]").ids}
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokens.read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", datasets.TASKS)
def test_datasets_hold_out_what_training_never_sees(name):
    if name != "english":
        pytest.importorskip("sklearn" if name == "digits" else "babel")
    options = dict(count=300, held_out=100) if name == "dates" else {}
    dataset = datasets.load(name, **options)
    assert len(dataset.train) > len(dataset.held_out) > 10
    if name == "dates":
        seen = {target for _, target in dataset.train}
        assert not seen & {target for _, target in dataset.held_out}
    elif name == "digits":
        images = {image.numpy().tobytes() for image, _ in dataset.train}
        assert sum(image.numpy().tobytes() in images for image, _ in dataset.held_out) == 0
    else:
        first = (lambda e: e) if name == "english" else (lambda e: e[0])
        assert not set(map(first, dataset.train)) & set(map(first, dataset.held_out))
    with pytest.raises(ValueError, match="dataset: expected one of dates"):
        datasets.load("nothing")
