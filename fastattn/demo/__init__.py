"""The demo: stock models accelerated, a model trained beside its stock twin, and a report."""

import sys
import time
import unicodedata
import warnings
from pathlib import Path

import torch

from fastattn import info
from fastattn.demo import comparison, minilm, report, training
from fastattn.demo.comparison import TOLERANCE, Comparison, Workload
from fastattn.demo.dates import Dates, Example, language
from fastattn.demo.training import ACCURACY_BAR, Result, Settings

__all__ = ["run"]

FULL = Settings()
QUICK = Settings(d_model=64, d_ff=128, batch=64, steps=60, twin_steps=25, warmup=20, evaluated=100)


def run(quick: bool, out: Path) -> int:
    """Run the demo and write its report.

    Args:
        quick: smaller models and little training, under half a minute; accuracy is not judged.
        out: folder of the report, made if it is missing.

    Returns:
        The exit status: 0; 1 if outputs, gradients or losses disagree, the model learnt too
        little, or `out` cannot be written; 130 if it was interrupted.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _run(quick, out)
    except OSError as error:
        print(f"the demo cannot write its report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; no report was written", file=sys.stderr)
        return 130


def _run(quick: bool, out: Path) -> int:
    start = time.perf_counter()
    facts = info.render(info.collect())
    print(facts)
    with warnings.catch_warnings():
        # Stock torch's own notes on the nested tensors of its fast path.
        warnings.filterwarnings("ignore", message=".*nested.tensor", category=UserWarning)
        comparisons = _compare(quick)
        contents = _train(quick, facts, comparisons)
    page = report.write(contents, out)
    _title("Report")
    print(f"{page.resolve()}, and the pictures beside it")
    failures = _failures(comparisons, contents.training, quick)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{'done' if not failures else 'ended'} in {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


def _compare(quick: bool) -> list[Comparison]:
    _title("Stock models, accelerated: fastattn.accelerate(model)")
    workloads = [comparison.transformer(*((1, 1, 128) if quick else (3, 2, 256)))]
    folder = minilm.find()
    if isinstance(folder, Path):
        workloads.append(_minilm(folder))
    else:
        print(f"without the MiniLM weights: {folder}")
    found = []
    for workload in workloads:
        result = comparison.compare(workload, rounds=3 if quick else 5)
        found.append(result)
        print(f"{result.name}: {result.detail}")
        print(
            f"  {result.swapped} layers swapped; max error of outputs {result.output_error:.1e}, "
            f"of gradients {result.gradient_error:.1e} (tolerance {TOLERANCE:.0e}): "
            f"{'agree' if result.agrees else 'DISAGREE'}"
        )
        for name, timing in (("inference", result.inference), ("training step", result.training)):
            print(
                f"  {name:<14} stock torch {timing.stock_median * 1e3:7.1f} ms   "
                f"fastattn {timing.fastattn_median * 1e3:7.1f} ms   {timing.speedup:.2f}x"
            )
    return found


def _minilm(folder: Path) -> Workload:
    sentences = [sentence for pair in minilm.PAIRS for sentence in pair]
    model = minilm.load(folder)
    tokens, padding = minilm.tokenize(folder, sentences)
    with torch.inference_mode():
        vectors = model(tokens, padding)
    similarity = (vectors @ vectors.T).fill_diagonal_(-1)
    nearest = similarity.argmax(1).tolist()
    found = sum(index == number ^ 1 for number, index in enumerate(nearest))
    print(f"MiniLM: of {len(sentences)} sentences, {found} have their partner as nearest; such as")
    for number in (0, 4, 16):
        score = similarity[number, nearest[number]]
        print(f"  {score:.2f}  {sentences[number]}  ~  {sentences[nearest[number]]}")
    return Workload(
        "all-MiniLM-L6-v2",
        f"its real weights in torch.nn.TransformerEncoder, {len(sentences)} English sentences of "
        f"{int((~padding).sum(1).min())} to {tokens.shape[1]} tokens, float32",
        model,
        lambda m: m(tokens, padding),
        minilm.pair_loss,
    )


def _train(quick: bool, facts: str, comparisons: list[Comparison]) -> report.Contents:
    settings = QUICK if quick else FULL
    dates = Dates()
    _title("A model trained from nothing: dates of many languages into ISO form")
    print(
        f"{len(dates.locales)} locales of Babel's CLDR data, {len(dates.held_out)} of "
        f"{len(dates.held_out) + len(dates.train)} days held out in every language; "
        f"d_model {settings.d_model}, {settings.num_layers}+{settings.num_layers} layers, "
        f"batch {settings.batch}, Adam"
    )
    result = training.train(settings, dates)
    timing = result.timing
    print(
        f"first {len(result.stock_losses)} steps beside the twin on stock torch: losses "
        f"{'equal' if result.same_curves else 'NOT EQUAL'} (first {training.FIRST_STEPS} within "
        f"{result.first_difference:.1e}, mean of the later half within "
        f"{result.mean_difference:.2%})\n"
        f"  training step  stock torch {timing.stock_median * 1e3:7.1f} ms   "
        f"fastattn {timing.fastattn_median * 1e3:7.1f} ms   {timing.speedup:.2f}x\n"
        f"{len(result.losses)} steps took fastattn {result.seconds:.1f} s; exactly right: "
        f"{result.held_out_exact:.1%} of {settings.evaluated} dates of unseen days, "
        f"{result.train_exact:.1%} of as many of the training's days"
    )
    examples = _one_a_language(dates, 10)
    answers = training.translate(result.model, dates, examples)
    _title("Ten unseen inputs")
    print(f"{'answer':<12}{'truth':<14}{'language':<20}source")
    for example, answer in zip(examples, answers):
        mark = " " if answer == example.iso else "x"
        source = "".join(c for c in example.text if unicodedata.category(c) != "Cf")
        name = language(example.locale)
        print(f"{answer:<12}{example.iso:<12}{mark} {name:<20}{source}")
    shown = _readable(dates)
    weights = training.cross_attention(result.model, dates, shown).tolist()
    return report.Contents(facts, comparisons, result, examples, answers, shown, weights, quick)


def _one_a_language(dates: Dates, count: int) -> list[Example]:
    """Held-out examples of different locales."""
    chosen: dict[str, Example] = {}
    for example in dates.sample(dates.held_out, 50 * count, seed="unseen"):
        if example.text.isascii() and len(example.text) < 12:
            continue
        chosen.setdefault(example.locale, example)
    return list(chosen.values())[:count]


def _readable(dates: Dates) -> Example:
    """A held-out example in Latin letters, long enough to show where the model looks."""
    for example in dates.sample(dates.held_out, 2000, seed="shown"):
        short_name = len(example.locale) == 2
        if short_name and example.text.isascii() and 20 <= len(example.text) <= 26:
            return example
    return dates.sample(dates.held_out, 1, seed="shown")[0]


def _failures(comparisons: list[Comparison], result: Result, quick: bool) -> list[str]:
    failures = [
        f"{found.name}: outputs or gradients differ from stock torch's by more than {TOLERANCE:g}"
        for found in comparisons
        if not found.agrees
    ]
    if not result.same_curves:
        failures.append("the losses differ from the stock twin's")
    if not quick and result.held_out_exact < ACCURACY_BAR:
        failures.append(
            f"{result.held_out_exact:.1%} of the unseen dates right, expected {ACCURACY_BAR:.0%}"
        )
    return failures


def _title(text: str) -> None:
    print(f"\n== {text}")
