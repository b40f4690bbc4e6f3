"""How sure a number is: intervals and tests. scipy and numpy are imported when first needed; they take a second."""

import math
from collections.abc import Sequence


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a share, 95 % by default (Wilson 1927): it holds for small counts and for shares near 0 and 1."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that two models are right equally often (McNemar 1947).

    Args:
        fixed: rows that only the second model has right.
        broken: rows that only the first has right.
    """
    if not fixed + broken:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken).pvalue)


def paired_bootstrap(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two models' ratios on the same rows, and its 95 % interval (percentiles of resampled rows).

    Args:
        before, after: (numerator, denominator) of each row; a model's value is the sum of the one over the sum of the
            other, so that error rates weigh long answers more, and scores with denominator 1 are means.

    Returns:
        (after - before, low, high).
    """
    import numpy as np

    a, b = np.asarray(before, float), np.asarray(after, float)
    rng = np.random.default_rng(seed)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)

    differences = []
    for _ in range(rounds):
        # How often each row is drawn, instead of which rows: one multiplication instead of copies.
        times = np.bincount(rng.integers(0, len(a), len(a)), minlength=len(a))
        differences.append(ratio(times @ b) - ratio(times @ a))
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(ratio(b.sum(0)) - ratio(a.sum(0))), float(low), float(high)
