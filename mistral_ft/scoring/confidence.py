"""What predict's confidence is worth: how often answers of a given confidence are right, and what may go unreviewed.

Confidences are in 0..1; `right` holds 1 or True for every answer that is right. numpy is imported when first needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_ft.files import JsonObject
from mistral_ft.scoring.statistics import wilson

if TYPE_CHECKING:
    import numpy as np

KINDS = ("min", "mean", "sum")


def confidence_of(row: JsonObject, kind: str = "min") -> float | None:
    """A row's confidence in 0..1, or None if it has none.

    The probability of its least sure token (min), of its tokens on geometric average (mean), or of the whole answer
    (sum). Answers are mostly made of sure tokens, so the least sure one tells most. What is no log-probability (no
    number, NaN, or above 0 by more than rounding) is no confidence.
    """
    sure = row.get("confidence")
    value = sure.get(kind) if isinstance(sure, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 1e-3:
        return None
    return math.exp(max(-1e3, min(0, value)))


@dataclass
class Bin:
    """Answers of like confidence.

    Attributes:
        count: how many.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
        low, high: its 95 % interval.
    """

    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


def reliability(confidences: Sequence[float], right: Sequence[int], bins: int = 10) -> list[Bin]:
    """Answers by confidence, in bins of about equal size, the least sure first.

    Answers of one confidence are in one bin, so the order of the rows does not matter.
    """
    import numpy as np

    sure, hits = _sorted(confidences, right)
    edges = np.unique(np.searchsorted(sure, sure[np.arange(1, bins) * len(sure) // bins]))
    parts = zip(np.split(sure, edges), np.split(hits, edges), strict=True)
    return [Bin(len(s), float(s.mean()), float(h.mean()), *wilson(int(h.sum()), len(h))) for s, h in parts if len(s)]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between confidence and accuracy, weighted by the bins' sizes (Naeini et al. 2015).

    With bins of equal size instead of equal width (Nixon et al. 2019), since most confidences are close to 1.
    """
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / sum(b.count for b in bins)


@dataclass
class RiskCoverage:
    """How many of the surest answers are wrong, whatever share of them one takes.

    Attributes:
        coverage, risk, confidence: the curve, about one point per percent: of the share `coverage` of answers, which
            are at least as sure as `confidence`, the share `risk` is wrong.
        area: mean risk over all coverages from 1/n to n/n (AURC, Geifman and El-Yaniv 2017), answers of one confidence
            in random order.
        area_random: the area if confidence told nothing, which is the share of wrong answers.
        area_best: the area if every wrong answer were less sure than every right one.
    """

    coverage: list[float]
    risk: list[float]
    confidence: list[float]
    area: float
    area_random: float
    area_best: float


def risk_coverage(confidences: Sequence[float], right: Sequence[int], points: int = 100) -> RiskCoverage:
    """The risk-coverage curve; its area is of all answers, however many points are asked for."""
    import numpy as np

    sure, hits = (values[::-1] for values in _sorted(confidences, right))
    taken = np.arange(1, len(sure) + 1)
    ends = _last_of_each(sure)
    counts = np.diff(ends, prepend=0)
    wrong = np.add.reduceat(1 - hits, ends - counts)
    risks = np.cumsum(np.repeat(wrong / counts, counts)) / taken
    shown = ends[np.unique(np.searchsorted(ends, np.arange(1, points + 1) * len(sure) / points))]
    best = np.maximum(0, taken - hits.sum()) / taken
    return RiskCoverage(
        (shown / len(sure)).tolist(),
        risks[shown - 1].tolist(),
        sure[shown - 1].tolist(),
        float(risks.mean()),
        float(1 - hits.mean()),
        float(best.mean()),
    )


def threshold_for(confidences: Sequence[float], right: Sequence[int], target: float) -> float | None:
    """The least confidence for which answers at least as sure are right in `target` of the cases, or None.

    Answers of one confidence are on the same side of it.
    """
    import numpy as np

    sure, hits = (values[::-1] for values in _sorted(confidences, right))
    ends = _last_of_each(sure)
    enough = ends[np.cumsum(hits)[ends - 1] >= target * ends - 1e-9]
    return float(sure[enough[-1] - 1]) if len(enough) else None


@dataclass
class Review:
    """What is left to people, and how good the rest is.

    Attributes:
        share: of the answers, the least sure ones, to be reviewed.
        threshold: the least confidence of the rest; None if all are to be reviewed.
        count: how many the rest are.
        accuracy: of the rest; None if there is none.
        low, high: its 95 % interval.
    """

    share: float
    threshold: float | None
    count: int
    accuracy: float | None
    low: float
    high: float


def review_below(confidences: Sequence[float], right: Sequence[int], threshold: float | None) -> Review:
    """Review the answers that are less sure than the threshold (None: all of them)."""
    import numpy as np

    rest = np.asarray(right)[np.asarray(confidences) >= (math.inf if threshold is None else threshold)]
    hits, count = int(rest.sum()), len(rest)
    return Review(1 - count / len(right), threshold, count, hits / count if count else None, *wilson(hits, count))


def calibrate(confidences: Sequence[float], right: Sequence[int]) -> Callable[[Sequence[float]], Sequence[float]]:
    """Fit a map from confidences to shares of right answers: isotonic regression, interpolated between its points."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    sure, hits = _sorted(confidences, right)
    values, first, counts = np.unique(sure, return_index=True, return_counts=True)
    fitted = isotonic_regression(np.add.reduceat(hits, first) / counts, weights=counts).x
    return lambda others: np.interp(others, values, fitted)


def _sorted(confidences: Sequence[float], right: Sequence[int]) -> "tuple[np.ndarray, np.ndarray]":
    """Confidences from low to high, and whether the answers are right, as arrays of floats."""
    import numpy as np

    order = np.argsort(confidences, kind="stable")
    return np.asarray(confidences, float)[order], np.asarray(right, float)[order]


def _last_of_each(values: "np.ndarray") -> "np.ndarray":
    """How many values there are up to the last of each run of equal ones."""
    import numpy as np

    return np.append(np.flatnonzero(np.diff(values)) + 1, len(values))
