"""How sure a number is: intervals and tests. scipy and numpy are imported when first needed; they take a second."""

import math
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Fractions: TypeAlias = "tuple[np.ndarray, np.ndarray]"  # numerators and denominators


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a share, 95 % by default (Wilson 1927): it holds for small counts and for shares near 0 and 1."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # It holds the share itself, which rounding must not change.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that two models are right equally often (McNemar 1947).

    Args:
        fixed: rows that only the second model has right.
        broken: rows that only the first has right.
    """
    from scipy.special import bdtr  # the binomial distribution function; scipy.stats takes a second to import

    return min(1.0, 2 * float(bdtr(min(fixed, broken), fixed + broken, 0.5)))


MOST_DRAWN = 10_000


def paired_bootstrap(
    before: Fractions, after: Fractions, rounds: int = 2000, seed: int = 0
) -> list[tuple[float, float, float]]:
    """Differences of two models' metrics on the same rows, with 95 % intervals (percentiles of resampled rows).

    More than `MOST_DRAWN` rows are first added up to so many groups, drawn by lot: a group's sum varies as those of
    its rows do, so resampling groups gives the same interval, in a time that does not grow with the file.

    Args:
        before, after: (numerators, denominators) of a model, each of shape (rows, metrics). The model's value of a
            metric is the sum of the one over the sum of the other, so that error rates weigh long answers more, and
            scores with denominator 1 are means.

    Returns:
        (after - before, low, high) of each metric.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    values = np.stack([*before, *after], 1)  # (rows, 4, metrics)
    if len(values) > MOST_DRAWN:
        values = np.stack([values[part].sum(0) for part in np.array_split(rng.permutation(len(values)), MOST_DRAWN)])

    def differences(sums: np.ndarray) -> np.ndarray:
        a, total_a, b, total_b = sums
        return b / np.maximum(total_b, 1e-12) - a / np.maximum(total_a, 1e-12)

    drawn = []
    for _ in range(rounds):
        # How often each row is drawn, instead of which rows: one multiplication instead of copies.
        times = np.bincount(rng.integers(0, len(values), len(values)), minlength=len(values))
        drawn.append(differences(np.tensordot(times, values, 1)))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    found = differences(values.sum(0))
    return list(zip(found.tolist(), low.tolist(), high.tolist(), strict=True))
