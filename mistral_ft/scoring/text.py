"""What score prints for people: the summary as text, and the rows that need a word."""

import json
import sys
from collections.abc import Sequence

from mistral_ft.files import JsonObject
from mistral_ft.html import name_lines, visible
from mistral_ft.scoring.mistakes import KINDS

FOLD_NAMES = {"case": "capitals", "space": "runs of spaces", "nfc": "Unicode forms"}


def headline(result: JsonObject) -> str:
    """The first line that score prints."""
    return (
        f"Accuracy = {result['hits']}/{result['count']} = {result['accuracy']:.4f} "
        f"(95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f})"
    )


def folded(folds: Sequence[str]) -> str:
    """What normalised accuracy looks over."""
    return (
        f"{', '.join(name for fold, name in FOLD_NAMES.items() if fold in folds)} do not count"
        if folds
        else "nothing is folded"
    )


def print_text(result: JsonObject, folds: Sequence[str]) -> None:
    """The summary as text; the first line is the accuracy, or where there is only plain text the perplexity."""
    if "accuracy" not in result:
        print_perplexity(result["text"])
        return
    print(headline(result))
    print_figures(result, folds)
    print_mistakes(result["wrong"])
    if "slices" in result:
        print_slices(result["by"], result["slices"])
    if "confidence" in result:
        print_confidence(result["confidence"])
    if "comparison" in result:
        print_comparison(result["comparison"])
    if "text" in result:
        print()
        print_perplexity(result["text"])


def print_figures(result: JsonObject, folds: Sequence[str], shown: int = 20) -> None:
    """How far off the answers are."""
    rows = [
        ("normalised accuracy", result["normalised_accuracy"], folded(folds)),
        ("character error rate", result["cer"], "edits per expected character, 0 is best"),
        ("word error rate", result["wer"], "edits per expected word, 0 is best"),
        ("ANLS", result["anls"], "edit similarity as in DocVQA, 1 is best"),
        ("token F1", result["token_f1"], "shared words as in SQuAD, 1 is best"),
    ]
    more = 0
    if fields := result.get("json"):
        worst = worst_fields(fields)
        more = len(worst) - shown
        rows += [
            ("valid JSON", fields["valid"], f"of the {fields['count']} answers that should be JSON"),
            ("field precision", fields["precision"], "answered fields that are right"),
            ("field recall", fields["recall"], "expected fields that are right"),
            ("field F1", fields["f1"], ""),
            *((f"  {visible(path)}", part["accuracy"], "") for path, part in worst[:shown]),
        ]
    width = max(len(name) for name, _, _ in rows)
    for name, value, meaning in rows:
        print(f"{name:<{width}}  {'-' if value is None else f'{value:.4f}'}  {meaning}".rstrip())
    if more > 0:
        print(f"  … and {more} more fields")


def worst_fields(fields: JsonObject) -> list[tuple[str, JsonObject]]:
    """(path, accuracy and count) of the fields of JSON answers, the worst first."""
    return sorted(fields["fields"].items(), key=lambda item: (item[1]["accuracy"], -item[1]["count"], item[0]))


def print_mistakes(wrong: JsonObject, shown: int = 8) -> None:
    """Kinds of wrong answers and the commonest confusions, if there are any."""
    if not wrong["kinds"]:
        return
    print("\nThe wrong answers:")
    width = len(str(max(wrong["kinds"].values())))
    for kind, count in wrong["kinds"].items():
        print(f"{count:>{width}}  {KINDS[kind]}")
    for name, confusions in confusions_by_name(wrong).items():
        named = (" → ".join(f'"{text}"' for text in texts) + f" ×{count}" for texts, count in confusions[:shown])
        print(f"{name}: {', '.join(named)}{', …' if len(confusions) > shown else ''}")


def confusions_by_name(wrong: JsonObject) -> dict[str, list[tuple[list[str], int]]]:
    """{name: [([expected and answered, or the one there is], count)]} of the sorts of confusion that were seen."""
    return {
        f"{sort} {what}": [
            ([visible(row[side]) for side in ("expected", "answered") if side in row], row["count"]) for row in rows
        ]
        for what in ("characters", "words")
        for sort, rows in wrong[what].items()
        if rows
    }


def print_slices(by: str, slices: dict[str, JsonObject], shown: int = 20) -> None:
    """Accuracy by slice, the worst first."""
    worst = [(visible(name), part) for name, part in list(slices.items())[:shown]]
    width = max(len(name) for name, _ in worst)
    print(f"\nBy {visible(by)}, worst first:")
    for name, part in worst:
        interval = f"{part['accuracy_low']:.3f} to {part['accuracy_high']:.3f}"
        print(f"{name:<{width}}  {part['accuracy']:.4f}  ({interval})  {part['hits']}/{part['count']}")
    if len(slices) > shown:
        print(f"… and {len(slices) - shown} more")


def print_confidence(sure: JsonObject) -> None:
    """How far the confidence can be trusted, and what may go unreviewed."""
    how = f"calibrated on {visible(sure['calibrated_on'], 200)}" if sure["calibrated_on"] else "not calibrated"
    print(f"\nConfidence ({sure['kind']}, {how}) of {sure['count']} answers, the least sure first:")
    print("answers  confidence  right")
    for part in sure["bins"]:
        print(f"{part['count']:>7}  {part['confidence']:>10.4f}  {part['accuracy']:.4f}")
    print(f"expected calibration error       {sure['expected_calibration_error']:.4f}")
    curve = sure["risk_coverage"]
    print(
        f"area under risk–coverage curve   {curve['area']:.4f}  "
        f"(best possible {curve['area_best']:.4f}, useless confidence {curve['area_random']:.4f})"
    )
    print(review_sentence(sure))
    if sure["missing"]:
        print(f"Not part of this, for want of a usable confidence: {sure['missing']} of the rows.")


def review_sentence(sure: JsonObject) -> str:
    """Whom to review, and how good the rest is."""
    review = sure["review"]
    if not review["count"]:
        return f"No part of the answers is {review['target']:.1%} right without review."
    right = f"{review['accuracy']:.1%} right (95 % interval {review['low']:.1%} to {review['high']:.1%})"
    if not review["share"]:
        return f"Without any review the answers are {right}."
    below = f"{review['threshold']:.4f}{' before calibration' if sure['calibrated_on'] else ''}"
    return f"Review the least sure {review['share']:.1%} (confidence below {below}), and the rest is {right}."


def print_comparison(comparison: JsonObject) -> None:
    """Better, worse or cannot tell, and by how much."""
    before, after, other = comparison["before"], comparison["after"], visible(comparison["other"], 200)
    print(f"\nAgainst {other}, on {comparison['count']} rows: {before} right there, {after} here")
    fixed, broken = comparison["fixed"], comparison["broken"]
    print(f"{len(fixed)} fixed, {len(broken)} broken, McNemar p = {comparison['p_value']:.4g}")
    for what, changed in (("fixed", fixed), ("broken", broken)):
        if changed:
            print(f"{what}: {name_lines([row['line'] for row in changed])}")
    print(f"Verdict: {comparison['verdict']} at 95 %")
    for name, part in comparison["differences"].items():
        interval = f"(95 % interval {part['low']:+.4f} to {part['high']:+.4f})"
        print(f"{name:<8}  {part['difference']:+.4f}  {interval}  {part['verdict']}")


ROWS = {
    "with_error": "with an `error` count as wrong",
    "unanswered": "whose `actual` is missing or no string count as wrong",
    "without_expected": "without `expected`, or without `nll` in the case of plain text, are left out",
    "repeated_id": "with an id that stands in the file before count like any other",
}


def name_rows(result: JsonObject) -> None:
    """Say on stderr which rows need a word."""
    for what, lines in result["rows"].items():
        if lines:
            print(f"Rows {ROWS[what]}: {len(lines)} ({name_lines(lines)})", file=sys.stderr)
    if left_out := result.get("comparison", {}).get("left_out"):
        print(f"{left_out} rows are in one file only, or have no `expected`", file=sys.stderr)


def print_json(result: JsonObject) -> None:
    """Everything as one JSON object, for machines; what acts on a terminal, or is no text, as JSON's escapes."""
    text = json.dumps(result, ensure_ascii=sys.stdout.encoding.lower() != "utf-8")
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


def print_perplexity(text: JsonObject) -> None:
    """One line of figures, and two if they are compared."""
    print(
        f"Perplexity = {text['perplexity']:.4f} (95 % interval {text['perplexity_low']:.4f} to "
        f"{text['perplexity_high']:.4f}) on {text['count']:,} plain texts, {text['tokens']:,} tokens"
    )
    if found := text.get("comparison"):
        print(
            f"Against {visible(found['other'], 200)}, on {found['count']:,} texts: {found['before']:.4f} there, "
            f"{found['after']:.4f} here, {found['ratio']:.4f} times "
            f"(95 % interval {found['low']:.4f} to {found['high']:.4f})"
        )
        print(f"Verdict: {found['verdict']} at 95 %")
