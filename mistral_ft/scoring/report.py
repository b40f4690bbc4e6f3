"""The report: a scored file as one page that explains itself to people who have never seen the tool.

The page is one file without scripts, and its policy forbids the browser to load anything. Every text of a record
passes through jinja2's escaping; the plots' through matplotlib's.
"""

import os
from collections.abc import Sequence

from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

from mistral_ft import plots
from mistral_ft.files import JsonObject
from mistral_ft.html import templates, visible, visible_lines
from mistral_ft.scoring.diff import diff
from mistral_ft.scoring.mistakes import KINDS, example_of
from mistral_ft.scoring.text import ROWS, confusions_by_name, folded, review_sentence, worst_fields
from mistral_ft.scoring.totals import read_lines

MOST_SLICES_PLOTTED = 25
MOST_TABLE_ROWS = 200
MOST_CHANGED = 10  # examples of fixed and of broken rows


def report(result: JsonObject, file: str | os.PathLike, folds: Sequence[str], examples: Sequence[JsonObject]) -> str:
    """The page, as HTML. The same arguments give the same text.

    Args:
        result: as `summary.summarize` gives it.
        file: the predictions file; read again for rows that a comparison names, as is the other file.
        folds: what normalised accuracy folds.
        examples: wrong rows to show, as `mistakes.example_of` gives them.
    """
    slices = list(result.get("slices", {}).items())
    plotted = slices[:MOST_SLICES_PLOTTED]
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            file=visible(str(file), 200),
            result=result,
            folded=folded(folds),
            kinds=KINDS,
            confusions=confusions_by_name(result["wrong"]),
            rows={ROWS[what]: lines for what, lines in result["rows"].items() if lines},
            slices=slices,
            fields=worst_fields(result["json"]) if "json" in result else [],
            most_rows=MOST_TABLE_ROWS,
            review=review_sentence(result["confidence"]) if "confidence" in result else "",
            examples=[_with_diff(shown) for shown in examples],
            changed=_changed(result["comparison"], file) if "comparison" in result else {},
            slices_plot=Markup(
                plots.slices_plot(
                    [visible(n, 32) for n, _ in plotted], [part for _, part in plotted], result["accuracy"]
                )
            )
            if plotted
            else "",
            reliability_plot=Markup(plots.reliability_plot(result["confidence"])) if "confidence" in result else "",
            risk_coverage_plot=Markup(plots.risk_coverage_plot(result["confidence"])) if "confidence" in result else "",
        )
    )


def sides(expected: str, actual: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What two answers share and what not: two lists of (kind, text), for the expected and for the actual answer.

    The kind is "same", "only" for what the other one lacks, or "cut" for a note about what is left out. Answers that
    are alike are compared by character, others by word.
    """
    alike = Levenshtein.normalized_distance(expected, actual) <= 0.5
    pieces = diff(expected, actual, "characters" if alike else "words")
    kinds = ["same" if there == here else "only" for there, here in pieces]
    ours, theirs = ([(kind, pair[side]) for kind, pair in zip(kinds, pieces, strict=True)] for side in (0, 1))
    return _shown(ours), _shown(theirs)


def _shown(pieces: Sequence[tuple[str, str]], most: int = 1200) -> list[tuple[str, str]]:
    """Pieces of an answer as they are shown: long ones shortened, what cannot be seen made visible."""
    shown: list[tuple[str, str]] = []
    length = 0
    for number, (kind, text) in enumerate(pieces):
        if length > most:
            rest = sum(len(piece) for _, piece in pieces[number:])
            return [*shown, ("cut", f"{rest:,} more characters")]
        if len(text) > 200:
            parts = [(kind, text[:80]), ("cut", f"{len(text) - 160:,} more characters"), (kind, text[-80:])]
        else:
            parts = [(kind, text)] if text else []
        shown += [(kind, part if kind == "cut" else _visible(part, kind == "only")) for kind, part in parts]
        length += sum(len(part) for _, part in parts)
    return shown


def _visible(text: str, marked: bool) -> str:
    """Text with escapes for what a page does not show; in marked text, spaces and line ends are signs too."""
    if marked:
        text = text.replace(" ", "␣").replace("\t", "⇥").replace("\n", "⏎")
    return visible_lines(text, len(text))


def _with_diff(shown: JsonObject) -> JsonObject:
    if not shown["actual"]:
        return shown | {"expected": _shown([("same", shown["expected"])]), "actual": shown["actual"] and []}
    expected, actual = sides(shown["expected"].strip(), shown["actual"].strip())
    return shown | {"expected": expected, "actual": actual}


def _changed(comparison: JsonObject, file: str | os.PathLike) -> dict[str, list[JsonObject]]:
    """The first rows that were broken and fixed: examples with the other file's answer as `before`."""
    found = {}
    for what in ("broken", "fixed"):
        pairs = [(row["other_line"], row["line"]) for row in comparison[what][:MOST_CHANGED]]
        before = {
            line: _with_diff(example_of(row)) for line, row in read_lines(comparison["other"], (a for a, _ in pairs))
        }
        after = {line: _with_diff(example_of(row)) for line, row in read_lines(file, (b for _, b in pairs))}
        found[what] = [after[b] | {"line": b, "before": before[a]} for a, b in pairs]
    return found
