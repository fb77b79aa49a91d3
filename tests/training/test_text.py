"""Text from trained models, in Python and from the command line."""

import pytest

from fastattn import cli, models
from fastattn.training import text, tokens


@pytest.fixture(params=["translation", "language-modeling"])
def folder(request, trainer):
    run = trainer(request.param, training=dict(steps=4))
    run.run()
    return run.folder


def test_a_stream_is_the_text(folder):
    model = models.load(folder / "model")
    tokenizer = tokens.read(folder / "model" / "tokenizer.json")
    pieces = list(text.stream(model, tokenizer, "the cat", max_new_tokens=4))
    assert len(pieces) <= 4
    (whole,) = text.stream(model, tokenizer, "the cat", max_new_tokens=4, num_beams=2)
    assert isinstance(whole, str)


@pytest.mark.parametrize("options", [[], ["--top-k", "3", "--seed", "1"], ["--beams", "2"]])
def test_the_command(folder, options, capsys):
    arguments = ["generate", str(folder), "--prompt", "the", "--max-new-tokens", "4", *options]
    printed = []
    for _ in range(2):
        assert cli.main(arguments) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].endswith("\n")


def test_the_command_says_what_is_wrong(folder, tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "gone")]) == 1
    assert "config.json" in capsys.readouterr().err
    assert cli.main(["generate", str(folder), "--top-k", "0"]) == 1
    assert "top_k: expected at least 1, got 0" in capsys.readouterr().err
