"""What predict's confidence is worth: how often answers of a given confidence are right, and what may go unreviewed."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_ft.statistics import wilson

KINDS = ("min", "mean", "sum")


def confidence_of(row: dict[str, Any], kind: str = "min") -> float | None:
    """A row's confidence in 0..1, or None if it has none.

    The probability of its least sure token (min), of its tokens on geometric average (mean), or of the whole answer
    (sum). Answers are mostly made of sure tokens, so the least sure one tells most.
    """
    sure = row.get("confidence")
    value = sure.get(kind) if isinstance(sure, dict) else None
    return math.exp(min(0.0, value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass
class Bin:
    """Answers of like confidence.

    Attributes:
        count: how many.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
    """

    count: int
    confidence: float
    accuracy: float


def reliability(confidences: Sequence[float], right: Sequence[int], bins: int = 10) -> list[Bin]:
    """Answers by confidence, in bins of equal size, the least sure first."""
    order = sorted(range(len(confidences)), key=confidences.__getitem__)
    edges = [round(len(order) * k / bins) for k in range(bins + 1)]
    parts = [order[start:end] for start, end in itertools.pairwise(edges) if end > start]
    return [
        Bin(len(part), sum(confidences[i] for i in part) / len(part), sum(right[i] for i in part) / len(part))
        for part in parts
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between confidence and accuracy, weighted by the bins' sizes (Naeini et al. 2015)."""
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / sum(b.count for b in bins)


@dataclass
class Review:
    """Whom to review so that the rest is good enough.

    Attributes:
        share: of the rows, the least sure ones, to be reviewed.
        threshold: the least confidence of the rest; None if there is no rest.
        accuracy: of the rest; 1.0 if there is none.
        low, high: its 95 % interval.
    """

    share: float
    threshold: float | None
    accuracy: float
    low: float
    high: float


def review_for(confidences: Sequence[float], right: Sequence[int], target: float) -> Review:
    """The smallest share to review for which the rest is right in at least `target` of its rows.

    Rows of one confidence are reviewed together or not at all.
    """
    order = sorted(range(len(confidences)), key=confidences.__getitem__, reverse=True)
    best, hits = 0, 0
    best_hits = 0
    for count, index in enumerate(order, 1):
        hits += right[index]
        last_of_its_kind = count == len(order) or confidences[order[count]] != confidences[index]
        if last_of_its_kind and hits >= target * count:
            best, best_hits = count, hits
    if not best:
        return Review(1.0, None, 1.0, *wilson(0, 0))
    return Review(1 - best / len(order), confidences[order[best - 1]], best_hits / best, *wilson(best_hits, best))


def calibrate(confidences: Sequence[float], right: Sequence[int]) -> Callable[[float], float]:
    """Fit a map from confidence to the share of right answers: isotonic regression, interpolated between its points."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    order = np.argsort(confidences, kind="stable")
    x, y = np.asarray(confidences, float)[order], np.asarray(right, float)[order]
    values, first, counts = np.unique(x, return_index=True, return_counts=True)
    means = np.add.reduceat(y, first) / counts
    fitted = isotonic_regression(means, weights=counts).x
    return lambda confidence: float(np.interp(confidence, values, fitted))
