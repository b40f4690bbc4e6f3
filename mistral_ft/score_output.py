"""What score prints: text for people, one JSON object for machines."""

import json
import sys
from typing import Any

from mistral_ft.comparison import Comparison
from mistral_ft.scoring import Score


def print_figures(result: dict[str, Any]) -> None:
    """The accuracy, and how far off the answers are."""
    print(
        f"Accuracy = {result['hits']}/{result['count']} = {result['accuracy']:.4f} "
        f"(95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f})"
    )
    rows = [
        ("normalised accuracy", result["normalised_accuracy"], "without capitals, runs of spaces, Unicode forms"),
        ("character error rate", result["cer"], "edits per expected character, 0 is best"),
        ("word error rate", result["wer"], "edits per expected word, 0 is best"),
        ("ANLS", result["anls"], "edit similarity as in DocVQA, 1 is best"),
        ("token F1", result["token_f1"], "shared words as in SQuAD, 1 is best"),
    ]
    if "json" in result:
        fields = result["json"]
        rows += [
            ("valid JSON", fields["valid"], f"of the {fields['count']} answers that should be an object"),
            ("field precision", fields["precision"], "answered fields that are right"),
            ("field recall", fields["recall"], "expected fields that are right"),
            ("field F1", fields["f1"], ""),
            *((f"  {path}", share, "") for path, share in sorted(fields["fields"].items(), key=lambda item: item[1])),
        ]
    width = max(len(name) for name, _, _ in rows)
    for name, value, meaning in rows:
        print(f"{name:<{width}}  {'-' if value is None else f'{value:.4f}'}  {meaning}".rstrip())


def print_slices(by: str | None, slices: dict[str, dict[str, Any]], shown: int = 20) -> None:
    """Accuracy by slice, the worst first."""
    if not by:
        return
    worst = sorted(slices.items(), key=lambda item: (item[1]["accuracy"], -item[1]["count"], item[0]))
    width = max(len(name) for name, _ in worst[:shown])
    print(f"\nBy {by}, worst first:")
    for name, part in worst[:shown]:
        interval = f"{part['accuracy_low']:.3f} to {part['accuracy_high']:.3f}"
        print(f"{name:<{width}}  {part['accuracy']:.4f}  ({interval})  {part['hits']}/{part['count']}")
    if len(worst) > shown:
        print(f"… and {len(worst) - shown} more")


def print_confidence(sure: dict[str, Any], target: float) -> None:
    """How far the confidence can be trusted, and what may go unreviewed."""
    how = f"calibrated on {sure['calibrated_on']}" if sure["calibrated_on"] else "not calibrated"
    print(f"\nConfidence ({sure['kind']}, {how}) of {sure['count']} answers, the least sure first:")
    print("answers  confidence  right")
    for part in sure["bins"]:
        print(f"{part['count']:>7}  {part['confidence']:>10.4f}  {part['accuracy']:.4f}")
    print(f"expected calibration error  {sure['expected_calibration_error']:.4f}")
    review = sure["review"]
    interval = f"(95 % interval {review['low']:.1%} to {review['high']:.1%})"
    if not review["share"]:
        print(f"Without any review the answers are {review['accuracy']:.1%} right {interval}.")
    elif review["threshold"] is None:
        print(f"No part of the answers is {target:.1%} right without review.")
    else:
        print(
            f"Review the least sure {review['share']:.1%} (confidence below {review['threshold']:.4f}), and the rest "
            f"is {review['accuracy']:.1%} right {interval}."
        )


def print_comparison(other: str, comparison: Comparison) -> None:
    """Better, worse or cannot tell, and by how much."""
    print(f"\nAgainst {other}, on {comparison.count} rows: {comparison.before} right there, {comparison.after} here")
    print(f"{len(comparison.fixed)} fixed, {len(comparison.broken)} broken, McNemar p = {comparison.p_value:.4g}")
    print(f"Verdict: {comparison.verdict} at 95 %")
    for name, (difference, low, high) in comparison.differences.items():
        print(f"{name:<8}  {difference:+.4f}  (95 % interval {low:+.4f} to {high:+.4f})")
    if comparison.left_out:
        print(f"{comparison.left_out} rows are in one file only, or have no `expected`", file=sys.stderr)


def print_json(
    result: dict[str, Any],
    slices: dict[str, dict[str, Any]],
    comparison: Comparison | None,
    score: Score,
    sure: dict[str, Any] | None,
) -> None:
    """Everything as one JSON object, for machines."""
    rows = {"with_error": len(score.with_error), "unanswered": len(score.unanswered)}
    rows |= {"without_expected": len(score.unexpected), "duplicate_ids": score.duplicate_ids}
    result = result | {"rows": rows}
    if slices:
        result["slices"] = slices
    if sure:
        result["confidence"] = sure
    if comparison:
        result["comparison"] = {
            "count": comparison.count,
            "before": comparison.before,
            "after": comparison.after,
            "fixed": [row.get("id") for row in comparison.fixed],
            "broken": [row.get("id") for row in comparison.broken],
            "p_value": comparison.p_value,
            "verdict": comparison.verdict,
            "differences": comparison.differences,
        }
    print(json.dumps(result, ensure_ascii=False))


def name_rows(score: Score, shown: int = 20) -> None:
    """Say on stderr which rows need a word."""
    for lines, what in (
        (score.with_error, "with an `error` count as wrong"),
        (score.unanswered, "without `actual` count as wrong"),
        (score.unexpected, "without `expected` are left out"),
    ):
        if lines:
            more = ", …" if len(lines) > shown else ""
            print(f"Rows {what}: {len(lines)} (lines {', '.join(map(str, lines[:shown]))}{more})", file=sys.stderr)
    if score.duplicate_ids:
        print(f"Rows with an id that stands in the file before: {score.duplicate_ids}", file=sys.stderr)
