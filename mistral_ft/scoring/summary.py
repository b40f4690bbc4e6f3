"""What a scored file says, as one JSON object: what --json prints, and what the text and the report are made of."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject, sha256_file
from mistral_ft.scoring.comparison import Comparison
from mistral_ft.scoring.confidence import (
    calibrate,
    expected_calibration_error,
    reliability,
    review_below,
    risk_coverage,
    threshold_for,
)
from mistral_ft.scoring.mistakes import KINDS, Common
from mistral_ft.scoring.perplexity import perplexity
from mistral_ft.scoring.totals import Score, figures, read_lines

MOST_CONFUSIONS = 50  # of each sort


def summarize(
    score: Score,
    by: str | None = None,
    confidence: JsonObject | None = None,
    comparison: JsonObject | None = None,
    text_comparison: JsonObject | None = None,
) -> JsonObject:
    """Everything that is known of a file; a part that does not apply is left out.

    Args:
        by: the field of the slices.
        confidence, comparison, text_comparison: as `judge_confidence`, `describe_comparison` and `compare_texts` give
            them.
    """
    result: JsonObject = {}
    if score.texts.lines:
        result["text"] = perplexity(score.texts) | ({"comparison": text_comparison} if text_comparison else {})
    if not score.totals.count:
        return result | {"rows": _rows(score)}
    result |= figures(score.totals)
    mistakes = score.mistakes
    result["wrong"] = {
        "kinds": {kind: mistakes.kinds[kind] for kind in KINDS if mistakes.kinds[kind]},
        "characters": _confusions(mistakes.characters),
        "words": _confusions(mistakes.words),
        "counts_too_low_by": {"characters": mistakes.characters.missed, "words": mistakes.words.missed},
    }
    if by is not None:
        slices = {name: figures(totals) for name, totals in score.slices.items()}
        worst_first = sorted(slices, key=lambda name: (slices[name]["accuracy"], -slices[name]["count"], name))
        result["by"] = by
        result["slices"] = {name: slices[name] for name in worst_first}
    if confidence:
        result["confidence"] = confidence
    if comparison:
        result["comparison"] = comparison
    result["rows"] = _rows(score)
    return result


def _rows(score: Score) -> dict[str, list[int]]:
    return {
        "with_error": list(score.with_error),
        "unanswered": list(score.unanswered),
        "without_expected": list(score.unexpected),
        "repeated_id": score.repeated_ids,
    }


def _confusions(common: Common) -> dict[str, list[JsonObject]]:
    ranked = common.most_common(len(common.counts))
    return {
        "replaced": [{"expected": a, "answered": b, "count": n} for (a, b), n in ranked if a and b][:MOST_CONFUSIONS],
        "missing": [{"expected": a, "count": n} for (a, b), n in ranked if not b][:MOST_CONFUSIONS],
        "extra": [{"answered": b, "count": n} for (a, b), n in ranked if not a][:MOST_CONFUSIONS],
    }


def judge_confidence(
    score: Score, kind: str, target: float, other: Score | None = None, other_name: str | None = None
) -> JsonObject:
    """What the confidence of a file's answers is worth.

    Args:
        target: the share of right answers wanted among those that nobody reviews.
        other: another file: what a confidence is worth, and the threshold for the review, are learned from it and
            applied to `score`. Without it the threshold is chosen on the rows that it is then judged by. The threshold
            is one of confidences as predict gives them, the rest of the figures is of calibrated ones.

    Raises:
        UserError: if there is nothing to learn from, or the files share rows.
    """
    confidences: Sequence[float] = score.confidences
    right = score.right
    if other:
        if not other.confidences:
            raise UserError(f"{other_name}: no row has a usable `confidence` to calibrate on")
        if shared := len(set(score.pairing.identities) & set(other.pairing.identities)):
            raise UserError(f"{other_name}: {shared} of the records are also in the file to be scored; use other ones")
        learned = calibrate(other.confidences, other.right)
        confidences, others = learned(score.confidences), learned(other.confidences)
        enough = threshold_for(others, other.right, target)
        passing = [raw for raw, sure in zip(other.confidences, others, strict=True) if enough and sure >= enough]
        threshold = min(passing, default=None)  # as predict gives it: to be applied without calibrating
    else:
        threshold = threshold_for(confidences, right, target)
    bins = reliability(confidences, right, bins=max(1, min(10, len(confidences) // 10)))
    return {
        "kind": kind,
        "count": len(confidences),
        "missing": score.totals.count - len(confidences),
        "calibrated_on": other_name,
        "bins": [asdict(part) for part in bins],
        "expected_calibration_error": expected_calibration_error(bins),
        "risk_coverage": asdict(risk_coverage(confidences, right)),
        "review": {"target": target} | asdict(review_below(score.confidences, right, threshold)),
    }


def describe_comparison(comparison: Comparison, file: str | os.PathLike, other: str) -> JsonObject:
    """A comparison of `file` with the `other` one, with the ids of the rows that changed."""
    changed = [*comparison.fixed, *comparison.broken]
    ids = {line: row.get("id") for line, row in read_lines(file, (line for _, line in changed))}
    return asdict(comparison) | {
        "other": other,
        "fixed": [{"line": line, "other_line": before, "id": ids[line]} for before, line in comparison.fixed],
        "broken": [{"line": line, "other_line": before, "id": ids[line]} for before, line in comparison.broken],
    }


def card_scores(path: str | os.PathLike) -> dict[str, str]:
    """The figures of a predictions file that a card shows, by name.

    Raises:
        UserError: if it cannot be scored.
    """
    from mistral_ft.scoring.perplexity import perplexity
    from mistral_ft.scoring.totals import Options, figures, score_file

    score = score_file(path, Options())
    scores = {"predictions": f"{Path(path).name}, SHA-256 `{sha256_file(path)}`"}
    if score.texts.lines:
        text = perplexity(score.texts)
        interval = f"95 % interval {text['perplexity_low']:.4f} to {text['perplexity_high']:.4f}"
        scores["perplexity"] = f"{text['perplexity']:.4f} ({interval}) on {text['tokens']:,} tokens"
    if not score.totals.count:
        return scores
    result = figures(score.totals)
    interval = f"95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}"
    scores["accuracy"] = f"{result['hits']}/{result['count']} = {result['accuracy']:.4f} ({interval})"
    names = {"cer": "character error rate", "wer": "word error rate", "anls": "ANLS", "token_f1": "token F1"}
    return scores | {names[key]: f"{result[key]:.4f}" for key in names if result[key] is not None}
