"""The demo's report: one HTML file that needs no network, and its pictures beside it."""

import base64
import html
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fastattn.demo import figures
from fastattn.demo.comparison import TOLERANCE, Comparison, Timing
from fastattn.demo.dates import LOCALES, Example, language
from fastattn.demo.figures import milliseconds
from fastattn.demo.training import FIRST_STEPS, Result

_STYLE = """
:root { color-scheme: light dark; --back: #f5f6f9; --card: #ffffff; --text: #1f2430;
  --soft: #5b6475; --line: #e1e5ec; --blue: #2457d6; --good: #1a7f4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f1116; --card: #171a21; --text: #e4e7ee; --soft: #9aa4b5; --line: #2a2f3a;
    --blue: #7aa2ff; --good: #58c98b; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 3rem 1.2rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 56rem; margin: 0 auto; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; letter-spacing: -.01em; }
p { margin: 0 0 .9rem; } .soft, figcaption { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 1.5rem 1.7rem; margin-top: 1.3rem; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  margin-top: 1.6rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 1.1rem 1.3rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em;
  color: var(--blue); font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
td small { color: var(--soft); display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 1rem 0 0; } img { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; margin-top: .6rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .88em; }
pre { overflow-x: auto; margin: .6rem 0 0; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; }
"""


@dataclass
class Contents:
    """All that the report tells."""

    info: str
    comparisons: list[Comparison]
    training: Result
    examples: list[Example]
    answers: list[str]
    attention_example: Example
    attention: list[list[float]]  # (characters, source tokens)
    quick: bool = False


def machine() -> str:
    """The processor, threads and torch of this run, in one line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"


def write(contents: Contents, folder: Path) -> Path:
    """Draw the pictures into `folder` and write ``report.html`` there; returns its path."""
    result = contents.training
    bars = [
        figures.Bar(f"{_short(c.name)}\n{work}", timing.stock_median, timing.fastattn_median)
        for c in contents.comparisons
        for work, timing in (("inference", c.inference), ("training step", c.training))
    ]
    timing = result.timing
    bars.append(
        figures.Bar("dates model\ntraining step", timing.stock_median, timing.fastattn_median)
    )
    example = contents.attention_example
    source = [f"‹{example.locale}›", *example.text]
    pictures = {
        "speedups": figures.save(
            figures.speedups(bars), folder, "speedups", (7.6, 0.55 * len(bars) + 0.6)
        ),
        "losses": figures.save(
            figures.losses(result.stock_losses, result.losses, result.accuracies),
            folder, "losses", (7.6, 3.5),
        ),
        "attention": figures.save(
            figures.attention(contents.attention, source, example.iso),
            folder, "attention", (7.6, 3.4),
        ),
    }  # fmt: skip
    path = folder / "report.html"
    path.write_text(_page(contents, pictures), encoding="utf-8")
    return path


def _page(contents: Contents, pictures: dict[str, list[Path]]) -> str:
    result, escape = contents.training, html.escape
    settings = result.settings
    ran = "short run (<code>--quick</code>)" if contents.quick else "full run"
    tiles = [
        (f"{timing.speedup:.2f}×", f"{_short(c.name)}, {work}")
        for c in contents.comparisons
        for work, timing in (("inference", c.inference), ("training step", c.training))
    ]
    tiles += [
        (f"{result.timing.speedup:.2f}×", "dates model, training step"),
        (f"{result.held_out_exact:.1%}", "of unseen dates exactly right"),
    ]
    rows = "".join(_comparison_row(comparison) for comparison in contents.comparisons)
    translations = "".join(
        f"<tr><td>{escape(language(example.locale))}</td><td dir=auto>{escape(example.text)}</td>"
        f"<td class={'good' if answer == example.iso else 'bad'}>{escape(answer)}</td>"
        f"<td>{example.iso}</td></tr>"
        for example, answer in zip(contents.examples, contents.answers)
    )
    steps, twin = len(result.losses), len(result.stock_losses)
    same = "the same" if result.same_curves else "not the same"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastattn: what this machine measured</title><style>{_STYLE}</style></head><body><main>
<h1>fastattn, measured here</h1>
<p class="soft">{escape(machine())}. A {ran}; every figure below was measured in it.</p>
<div class="tiles">{
        "".join(f"<div class=tile><b>{n}</b><span>{escape(t)}</span></div>" for n, t in tiles)
    }</div>
<section><h2>Stock models, accelerated</h2>
<p><code>fastattn.accelerate(model)</code> gave the layers of a stock model fastattn's kernels.
Weights and inputs stayed the same. Outputs and gradients must agree within {TOLERANCE:g} of a
tensor's largest element.</p>
<div class="scroll"><table><tr><th>model</th><th class=n>output error</th>
<th class=n>gradient error</th><th class=n>inference</th><th class=n>training step</th></tr>
{rows}</table></div>
<figure>{_picture(pictures["speedups"], "Speed relative to stock torch")}
<figcaption>Medians; stock torch and fastattn ran by turns. Inference in eval and inference mode,
with stock torch's own fast path. A training step is forward, loss, backward and
Adam.</figcaption></figure></section>
<section><h2>A model trained from nothing</h2>
<p>An encoder-decoder Transformer ({result.model.num_parameters / 1e6:.2f} million weights,
{settings.num_layers}+{settings.num_layers} layers, d_model {settings.d_model}) learnt to read
dates as {len(LOCALES)} languages and regions write them, and to answer in ISO form. Its
twin is <code>torch.nn.Transformer</code> with the same first weights, on the same {twin} batches:
the loss curves are {same} (the first {min(FIRST_STEPS, twin)} losses within {
        result.first_difference:.1g},
the mean of the later ones within {result.mean_difference:.1%}), and a step took
{milliseconds(result.timing.stock_median)} on stock torch and {
        milliseconds(result.timing.fastattn_median)
    } on
fastattn. All {steps} steps took fastattn {result.seconds:.0f} s.</p>
<figure>{_picture(pictures["losses"], "Loss of each step")}</figure>
<p style="margin-top:1rem">Exactly right: <b>{result.held_out_exact:.1%}</b> of
{settings.evaluated} dates from days that were held out in every language, and
{result.train_exact:.1%} of as many from the days of the training.</p></section>
<section><h2>Ten unseen inputs</h2>
<div class="scroll"><table><tr><th>language</th><th>source</th><th>answer</th><th>truth</th></tr>
{translations}</table></div></section>
<section><h2>Where it looks</h2>
<p>Each row is a character of the answer, each column one of the source; the darker, or in the
dark the brighter, the more attention (the mean over the decoder's heads and layers).</p>
<figure>{_picture(pictures["attention"], "Cross-attention of one example")}</figure></section>
<section><details><summary>What is built and what this machine has</summary>
<pre>{escape(contents.info)}</pre></details></section>
</main></body></html>
"""


def _comparison_row(c: Comparison) -> str:
    def cell(timing: Timing) -> str:
        return (
            f"<td class=n><b>{timing.speedup:.2f}×</b><small>{milliseconds(timing.stock_median)} → "
            f"{milliseconds(timing.fastattn_median)}</small></td>"
        )

    colour = "good" if c.agrees else "bad"
    return (
        f"<tr><td>{html.escape(c.name)}<small>{html.escape(c.detail)}</small></td>"
        f"<td class='n {colour}'>{c.output_error:.1e}</td>"
        f"<td class='n {colour}'>{c.gradient_error:.1e}</td>"
        f"{cell(c.inference)}{cell(c.training)}</tr>"
    )


def _picture(paths: list[Path], alt: str) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{alt}"></picture>'
    )


def _short(name: str) -> str:
    return name.removeprefix("torch.").removesuffix("-L6-v2")
