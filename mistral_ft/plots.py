"""The report's plots, as SVG for a page: they take its colours, and so follow light and dark."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Colours that stand for the page's, which replace them in the SVG.
INK, MUTED, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}
SETTINGS = {
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


def reliability_plot(confidence: dict[str, Any]) -> str:
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


def risk_coverage_plot(confidence: dict[str, Any]) -> str:
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


def slices_plot(names: list[str], slices: list[dict[str, Any]], overall: float) -> str:
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


def histogram(values: Sequence[int], title: str) -> str:
    """How many rows have how many tokens."""
    with _style():
        figure, axes = _axes(4.2, 2.8)
        axes.hist(values, bins=min(40, max(values) - min(values) + 1), color=ACCENT)
        axes.set(xlabel="tokens", ylabel="rows", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        return _svg(figure, f"{title}: tokens against rows")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(SETTINGS)
        # The browser brings the fonts; here a glyph that is missing only makes a width a guess.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            yield


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _legend(axes) -> None:
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
