"""The report's pictures, each in a light and a dark version."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


class Theme(NamedTuple):
    """The colours of one version."""

    suffix: str  # of the file's name
    background: str
    text: str
    faint: str  # lines, grid
    stock: str
    fastattn: str
    map: str  # matplotlib's colour map of the attention


LIGHT = Theme("", "#ffffff", "#1f2430", "#d9dde5", "#9aa3b2", "#2457d6", "Blues")
DARK = Theme("-dark", "#171a21", "#e4e7ee", "#353b48", "#7d8798", "#7aa2ff", "magma")
THEMES = (LIGHT, DARK)


class Bar(NamedTuple):
    """One piece of work and its times."""

    label: str
    stock: float  # seconds
    fastattn: float


def save(
    draw: Callable[[Axes, Theme], None], folder: Path, name: str, size: tuple[float, float]
) -> list[Path]:
    """Draw into ``name.png`` and ``name-dark.png`` in `folder`; returns both."""
    paths = []
    for theme in THEMES:
        figure = Figure(figsize=size, dpi=160, facecolor=theme.background, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=theme.background)
        axes.tick_params(colors=theme.text, labelsize=9, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.faint)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(theme.text)
            label.set_fontsize(9.5)
        draw(axes, theme)
        paths.append(folder / f"{name}{theme.suffix}.png")
        figure.savefig(paths[-1], facecolor=theme.background)
    return paths


def speedups(bars: Sequence[Bar]) -> Callable[[Axes, Theme], None]:
    """How many times as fast as stock torch each piece of work became."""

    def draw(axes: Axes, theme: Theme) -> None:
        rows = range(len(bars))
        factors = [bar.stock / bar.fastattn for bar in bars]
        axes.barh(rows, factors, height=0.56, color=theme.fastattn)
        axes.plot([1, 1], [-0.42, len(bars) - 0.58], color=theme.stock, linewidth=1.6)
        axes.text(1, -0.5, "stock torch", ha="center", fontsize=9, color=theme.text)
        for row, bar, factor in zip(rows, bars, factors):
            axes.text(
                max(factor, 1) + 0.02 * max(factors),
                row,
                f"{factor:.2f}×   {milliseconds(bar.stock)} → {milliseconds(bar.fastattn)}",
                va="center", fontsize=9.5, color=theme.text,
            )  # fmt: skip
        axes.set_yticks(rows, [bar.label for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.8)
        axes.set_xlim(0, max(*factors, 1) * 1.42)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    return draw


def losses(
    stock: Sequence[float], ours: Sequence[float], accuracies: Sequence[float]
) -> Callable[[Axes, Theme], None]:
    """The loss of each step, of both models while both train, and the characters' accuracy."""

    def draw(axes: Axes, theme: Theme) -> None:
        steps = range(1, len(ours) + 1)
        axes.plot(steps, ours, color=theme.fastattn, linewidth=1.3)
        axes.plot(
            range(1, len(stock) + 1), stock,
            color=theme.stock, linewidth=4.2, alpha=0.65, zorder=1, solid_capstyle="round",
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
        axes.grid(axis="y", color=theme.faint, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlim(0, len(ours) * 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy of a character")
        axes.axvline(len(stock), color=theme.stock, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.annotate(
            "stock torch stops here", (len(stock), 0.94), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", fontsize=8.5, color=theme.text,
        )  # fmt: skip
        handles = [
            axes.plot([], [], color=theme.stock, linewidth=4.2, alpha=0.65, label="stock torch")[0],
            axes.plot([], [], color=theme.fastattn, linewidth=1.3, label="fastattn")[0],
        ]
        last = accuracies[-20:]
        axes.legend(
            handles=handles, frameon=False, labelcolor=theme.text, fontsize=9, loc="upper right",
            title=f"characters right at the end: {sum(last) / len(last):.1%}",
            title_fontproperties={"size": 9},
        ).get_title().set_color(theme.text)  # fmt: skip

    return draw


def attention(
    weights: Sequence[Sequence[float]], source: Sequence[str], answer: str
) -> Callable[[Axes, Theme], None]:
    """Where the model looked in the source while it wrote each character of the answer."""

    def draw(axes: Axes, theme: Theme) -> None:
        axes.imshow(weights, cmap=theme.map, aspect="auto", vmin=0)
        labels = ["␣" if symbol == " " else symbol for symbol in source]
        axes.set_xticks(range(len(labels)), labels, fontsize=10, family="monospace")
        axes.set_yticks(range(len(answer)), list(answer), fontsize=10, family="monospace")
        axes.xaxis.tick_top()
        axes.set_ylabel("written")
        axes.set_xlabel("read")
        axes.xaxis.set_label_position("top")
        axes.spines["bottom"].set_visible(False)

    return draw


def milliseconds(seconds: float) -> str:
    """Seconds for a reader."""
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
