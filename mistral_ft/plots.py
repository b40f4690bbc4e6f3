"""Plots as SVG: those of the report take the colours of its page, and so follow light and dark; a run's is a file."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from mistral_ft.files import JsonObject

# Colours that stand for the page's, which replace them in the SVG.
INK, MUTED, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
# A file's own colours, dark on white.
ON_WHITE = {"--ink": "#1f2328", "--muted": "#8c959f", "--line": "#d0d7de", "--accent": "#0969da", "--second": "#bc4c00"}
CSS = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}
SETTINGS: dict[Any, Any] = {  # no narrower type is right for every matplotlib: from 3.11 on it lists the names
    "svg.fonttype": "none",  # text stays text: it can be selected, and is drawn in the page's font
    "svg.hashsalt": "score",  # the same data give the same bytes
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names of slices are the user's: a $ in one is a $
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}


def reliability_plot(confidence: JsonObject) -> str:
    """Confidence against the share of right answers, with 95 % intervals."""
    bins = confidence["bins"]
    with _style():
        figure, axes = _axes(5.2, 4.2)
        x, y = [part["confidence"] for part in bins], [part["accuracy"] for part in bins]
        below = [part["accuracy"] - part["low"] for part in bins]
        above = [part["high"] - part["accuracy"] for part in bins]
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1, label="as right as it is sure")
        axes.errorbar(
            x, y, [below, above], color=ACCENT, marker="o", linewidth=1.5, elinewidth=1, label="answers, 95 % interval"
        )
        lowest = min(*x, *(part["low"] for part in bins))
        start = max(0, int(lowest * 10) / 10 - 0.05) if lowest >= 0.1 else -0.02
        axes.set(xlim=(start, 1.02), ylim=(start, 1.02), xlabel="confidence", ylabel="answers that are right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(axes)
        return _svg(figure, "Reliability: confidence against the share of right answers")


def risk_coverage_plot(confidence: JsonObject) -> str:
    """The share of answers taken without review against the share of these that is wrong."""
    curve, review = confidence["risk_coverage"], confidence["review"]
    with _style():
        figure, axes = _axes(5.2, 4.2)
        coverage, risk = curve["coverage"], curve["risk"]
        total = curve["area_random"]
        best = [max(0.0, share - (1 - total)) / share for share in coverage]
        axes.plot(
            coverage, [total] * len(coverage), color=MUTED, linestyle="--", linewidth=1, label="useless confidence"
        )
        axes.plot(coverage, best, color=MUTED, linestyle=":", linewidth=1.2, label="best possible")
        axes.plot(
            coverage, risk, color=ACCENT, linewidth=1.8, marker="o" if len(risk) < 20 else None, label="this file"
        )
        if review["count"]:
            at = 1 - review["share"], 1 - review["accuracy"]
            axes.plot(*at, color=SECOND, marker="D", linestyle="", label="review threshold")
        axes.set(
            xlim=(0, 1.02), ylim=(-0.02 * max(risk), 1.15 * max(*risk, 1e-3)),
            xlabel="answers taken without review, the surest first", ylabel="of these, wrong",
        )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        _legend(axes)
        return _svg(figure, "Risk-coverage curve: answers taken without review against the wrong ones among them")


def slices_plot(names: list[str], slices: list[JsonObject], overall: float) -> str:
    """Accuracy of every slice with its 95 % interval, from top to bottom."""
    with _style():
        figure, axes = _axes(9, 0.9 + 0.32 * len(names))
        y = list(range(len(names)))
        accuracy = [part["accuracy"] for part in slices]
        below = [part["accuracy"] - part["accuracy_low"] for part in slices]
        above = [part["accuracy_high"] - part["accuracy"] for part in slices]
        axes.axvline(overall, color=MUTED, linestyle="--", linewidth=1, label="all rows")
        axes.errorbar(
            accuracy, y, xerr=[below, above], color=ACCENT, marker="o", linestyle="", elinewidth=1.5, capsize=3,
            label="slice, 95 % interval",
        )  # fmt: skip
        axes.set_yticks(y, names)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="answers that are right")
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(axes)
        return _svg(figure, "Accuracy by slice")


def loss_plot(history: Sequence[JsonObject], best_step: int | None) -> str:
    """The course of a run, by optimizer step: losses on a logarithmic axis, right answers on another. A whole file.

    Args:
        history: a trainer's log, with at least one `loss`.
        best_step: that of the best evaluation, if there was any.
    """

    def curve(name: str) -> tuple[list[int], list[float]]:
        found = [(entry["step"], entry[name]) for entry in history if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    with _style():
        figure, axes = _axes(8, 4.2)
        axes.plot(*curve("loss"), color=MUTED, linewidth=1, label="loss in training")
        evaluated: dict[str, Any] = {"marker": "o", "markersize": 4}
        if best_step is not None:
            axes.plot(*curve("eval_loss"), color=ACCENT, linewidth=1.8, label="loss in evaluation", **evaluated)
            axes.axvline(
                best_step, color=ACCENT, linestyle=":", linewidth=1.2, label=f"best evaluation, step {best_step}"
            )
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set(xlabel="step", ylabel="loss")
        if any("eval_exact_match" in entry for entry in history):
            right = axes.twinx()
            right.plot(*curve("eval_exact_match"), color=SECOND, linewidth=1.5, linestyle="--", **evaluated)
            axes.plot([], [], color=SECOND, linewidth=1.5, linestyle="--", label="answers that are right", **evaluated)
            right.set(ylim=(-0.02, 1.02), ylabel="answers that are right")
            right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            right.grid(visible=False)
        _legend(axes)
        svg = _svg(figure, "Loss in training and in evaluation, by step")
    for name, colour in ON_WHITE.items():
        svg = svg.replace(f"var({name})", colour)
    return svg.replace("<svg ", '<svg style="background: white; font-family: sans-serif" ', 1)


def histogram(values: np.ndarray, title: str, unit: str) -> str:
    """How many rows have how much of something; on a logarithmic axis if few have far more than the others.

    Args:
        values: integers from 0 on, at least one.
        unit: of the values, such as "tokens".
    """
    low, high = int(values.min()), int(values.max())
    skewed = high > 20 * max(1, np.percentile(values, 90))
    with _style():
        figure, axes = _axes(4.2, 2.8)
        if skewed:
            # From 1 on: a logarithmic axis has no 0.
            axes.hist(values.clip(min=1), bins=np.geomspace(max(1, low), high + 1, 41).tolist(), color=ACCENT)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        else:
            step = -(-(high - low + 1) // 40)
            axes.hist(values, bins=(np.arange(low, high + step + 1, step) - 0.5).tolist(), color=ACCENT)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlim(max(-1, min(low, high - 4) - 1), max(high, low + 4) + step)  # one value makes no block
        axes.set(xlabel=unit, ylabel="rows", title=title)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        return _svg(figure, f"{title}: {unit} against rows")


def page_sizes_plot(sizes: np.ndarray) -> str:
    """Width against height of pages; the more of one size, the larger its dot.

    Args:
        sizes: array of (width, height) in pixels, at least one.
    """
    step = max(1, int(sizes.max()) // 100)  # no more dots than can be told apart
    dots, counts = np.unique((sizes // step) * step, axis=0, return_counts=True)
    with _style():
        figure, axes = _axes(4.2, 2.8)
        axes.scatter(dots[:, 0], dots[:, 1], s=12 + 150 * counts / counts.max(), color=ACCENT, alpha=0.6, linewidths=0)
        axes.set(xlabel="width, pixels", ylabel="height, pixels", title="Page sizes")
        axes.set(xlim=(0, 1.08 * dots[:, 0].max()), ylim=(0, 1.08 * dots[:, 1].max()))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, "Page sizes: width against height")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(SETTINGS)
        # The browser brings the fonts; here a glyph that is missing only makes a width a guess.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            yield


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above, where no point is


def _svg(figure: Figure, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub("<(metadata|style).*?</\\1>", "", svg, flags=re.DOTALL)
    svg = re.sub('<g id="[^"]*">', "<g>", svg)  # not unique in a page of several plots, and nothing refers to them
    svg = re.sub("<[^>]*>", _tag, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _tag(match: re.Match) -> str:
    """A tag in the page's colours and font."""
    tag = re.sub("font-family:[^;]*;", "", match[0])
    return re.sub("#0[1-5]0[1-5]0[1-5]", lambda colour: f"var({CSS[colour[0]]})", tag)
