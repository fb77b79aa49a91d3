"""The demo: its data don't leak or lie, its twins are twins, its report stands alone."""

import datetime
import re

import pytest
import torch

pytest.importorskip("babel")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastattn.demo
from fastattn.demo import comparison, minilm, report, training
from fastattn.demo.comparison import Comparison, Timing
from fastattn.demo.dates import LOCALES, PAD, Dates, Example, formats
from fastattn.models import Transformer

TINY = training.Settings(
    d_model=16, num_heads=2, d_ff=32, batch=8, steps=6, twin_steps=4, warmup=2, evaluated=8
)


@pytest.fixture(scope="module")
def dates():
    return Dates()


def test_the_same_seed_gives_the_same_data(dates):
    again = Dates()
    assert again.held_out == dates.held_out and again.train == dates.train
    assert dates.sample(dates.train, 50, seed=3) == again.sample(again.train, 50, seed=3)
    assert dates.sample(dates.train, 50, seed=3) != dates.sample(dates.train, 50, seed=4)
    assert Dates(seed=1).held_out != dates.held_out


def test_no_day_of_the_training_is_held_out(dates):
    assert not set(dates.held_out) & set(dates.train)
    assert len(dates.held_out) == pytest.approx(0.1 * 36525, abs=1)
    train = dates.sample(dates.train, 2000, seed=0)
    held_out = dates.sample(dates.held_out, 2000, seed=0)
    assert len(set(train)) == len(train)
    assert not {(e.locale, e.text) for e in train} & {(e.locale, e.text) for e in held_out}
    assert not {e.iso for e in train} & {e.iso for e in held_out}


def test_a_text_in_a_locale_means_one_day_only(dates):
    # Days whose day, month and year are easily taken for one another, and any others.
    days = [
        datetime.date(year, month, day)
        for year in (2001, 2002, 2010, 2012)
        for month in (1, 2, 10, 11, 12)
        for day in (1, 2, 10, 11, 12, 21)
    ] + dates.train[:100]
    for locale in LOCALES:
        meaning: dict[str, datetime.date] = {}
        for format_ in formats(locale):
            for day in days:
                assert meaning.setdefault(format_(day), day) == day, (locale, format_.pattern)


def test_formats_are_what_babel_writes():
    from babel.dates import format_date

    day = datetime.date(2024, 3, 5)
    for locale in LOCALES:
        ours = {format_(day) for format_ in formats(locale) if format_.zero == ord("0")}
        theirs = {format_date(day, style, locale) for style in ("medium", "long", "full")}
        assert len(formats(locale)) >= 4
        if ours:
            assert theirs & ours, locale


def test_native_digits_are_used():
    texts = {format_(datetime.date(2024, 3, 5)) for format_ in formats("hi")}
    assert any("२०२४" in text for text in texts) and any("2024" in text for text in texts)


def test_tokens_round_trip(dates):
    examples = dates.sample(dates.train, 300, seed=5)
    sources, targets = dates.encode_sources(examples), dates.encode_targets(examples)
    assert sources.max() < dates.input_vocab_size and targets.max() < dates.target_vocab_size
    for example, source, target in zip(examples, sources.tolist(), targets.tolist()):
        assert dates.decode_source(source) == (example.locale, example.text)
        assert dates.decode_target(target[1:]) == example.iso


def test_every_character_has_a_token(dates):
    for locale in LOCALES:
        for format_ in formats(locale):
            for day in dates.held_out[:40]:
                dates.encode_sources([Example(locale, format_(day), "")])


def test_batches_hold_every_example_once(dates):
    examples = dates.sample(dates.train, 100, seed=6)
    batches = dates.batches(examples, 16, seed=0)
    seen = [
        (*dates.decode_source(row), dates.decode_target(target[1:]))
        for src, tgt in batches
        for row, target in zip(src.tolist(), tgt.tolist())
    ]
    assert sorted(seen) == sorted(examples)


def test_the_stock_twin_computes_the_same(dates):
    model = Transformer(
        input_vocab_size=dates.input_vocab_size,
        target_vocab_size=dates.target_vocab_size,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_ff=32,
        dropout=0.0,
        norm_first=True,
        pad_id=PAD,
    )
    twin = training.StockTransformer(model)
    ((src, tgt),) = dates.batches(dates.sample(dates.train, 5, seed=0), 5, seed=0)
    torch.testing.assert_close(twin(src, tgt), model(src, tgt), rtol=1e-4, atol=1e-5)


def test_training_beside_the_twin(dates):
    result = training.train(TINY, dates)
    assert len(result.losses) == 6 and len(result.stock_losses) == 4
    assert result.same_curves
    assert len(result.timing.stock) == len(result.timing.fastattn) == 4


def test_different_curves_are_noticed(dates):
    result = training.Result(TINY, None, losses=[2.0, 1.5], stock_losses=[2.0, 1.0])
    assert not result.same_curves


def test_compare_finds_agreement_and_disagreement():
    workload = comparison.transformer(1, 1, 8)
    found = comparison.compare(workload, rounds=1)
    assert found.agrees and found.swapped == 12
    assert found.inference.speedup > 0
    assert not found._replace(gradient_error=0.1).agrees


@pytest.fixture(scope="module")
def encoder():
    folder = minilm.find()
    if isinstance(folder, str):
        pytest.skip(folder)
    return folder, minilm.load(folder)


def test_minilm_finds_the_partner_of_each_sentence(encoder):
    folder, model = encoder
    sentences = [sentence for pair in minilm.PAIRS for sentence in pair]
    with torch.no_grad():
        vectors = model(*minilm.tokenize(folder, sentences))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(sentences)))
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1).tolist()
    assert nearest == [number ^ 1 for number in range(len(sentences))]


def test_minilm_does_not_see_padding(encoder):
    folder, model = encoder
    sentences = ["A dog barks.", "The committee has postponed its decision to next Thursday."]
    with torch.no_grad():
        together = model(*minilm.tokenize(folder, sentences))
        alone = model(*minilm.tokenize(folder, sentences[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_minilm_missing_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    assert "pip install 'fastattn[demo]'" in minilm.find()


def contents() -> report.Contents:
    timing = Timing([0.02, 0.03, 0.02], [0.01, 0.02, 0.01])
    model = Transformer(
        input_vocab_size=8, target_vocab_size=8, d_model=8, num_layers=1, num_heads=2, d_ff=8
    )
    result = training.Result(
        TINY, model, [2.0, 1.0, 0.5, 0.2], [0.3, 0.5, 0.8, 0.9], [2.0, 1.0], timing, 1.0, 0.95, 0.93
    )
    example = Example("fr", "5 <mars> 2024", "2024-03-05")
    weights = torch.rand(10, 1 + len(example.text)).tolist()
    compared = Comparison("torch.nn.Transformer", "small", 5, 1e-7, 1e-6, timing, timing)
    return report.Contents(
        "the facts", [compared], result, [example], ["2024-03-06"], example, weights
    )


def test_report_stands_alone(tmp_path):
    page = report.write(contents(), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:)""", text)
    assert "http" not in text
    assert "5 &lt;mars&gt; 2024" in text and "2024-03-06" in text
    assert "2.00×" in text and "93.0%" in text
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"losses.png", "speedups.png", "attention.png", "losses-dark.png"} <= names


def test_interrupt_is_a_quiet_end(tmp_path, monkeypatch, capsys):
    def interrupted(quick, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastattn.demo, "_run", interrupted)
    assert fastattn.demo.run(True, tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert fastattn.demo.run(True, tmp_path / "file") == 1
    assert "cannot write its report" in capsys.readouterr().err


def test_failures_are_named():
    good = contents()
    assert fastattn.demo._failures(good.comparisons, good.training, quick=False) == []
    bad = [good.comparisons[0]._replace(output_error=1.0)]
    good.training.held_out_exact = 0.5
    assert len(fastattn.demo._failures(bad, good.training, quick=False)) == 2
    assert len(fastattn.demo._failures(bad, good.training, quick=True)) == 1


@pytest.mark.slow
def test_quick_demo(tmp_path, capsys):
    assert fastattn.demo.run(quick=True, out=tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert "Ten unseen inputs" in printed and printed.count("agree") >= 1
    assert "DISAGREE" not in printed
    assert (tmp_path / "new" / "report.html").is_file()
