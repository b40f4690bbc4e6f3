"""Two models on the same rows: is one better, and which rows changed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_ft.errors import RecordError, UserError
from mistral_ft.scoring.metrics import Grade
from mistral_ft.scoring.statistics import Fractions, mcnemar, paired_bootstrap
from mistral_ft.scoring.totals import Pairing, Score

if TYPE_CHECKING:
    import numpy as np

# Metrics beside exact match: (numerator, denominator) among the fields of a Grade (None: 1), whether less is better.
GRADED = {
    "cer": ("char_edits", "chars", True),
    "wer": ("word_edits", "words", True),
    "anls": ("anls", None, False),
    "token_f1": ("token_f1", None, False),
}


@dataclass
class Difference:
    """A metric's change from the first file to the second, its 95 % interval, and what that means."""

    difference: float
    low: float
    high: float
    verdict: str


@dataclass
class Comparison:
    """What changed between two predictions files.

    Attributes:
        count: rows that are in both files and can be scored.
        before, after: rows each has right.
        fixed, broken: rows only the second, only the first has right, as (line in the first, line in the second).
        p_value: of McNemar's exact test.
        verdict: better, worse or cannot tell, at 95 %.
        differences: by metric.
        left_out: rows that are in one file only, or have no `expected`.
    """

    count: int
    before: int
    after: int
    fixed: list[tuple[int, int]]
    broken: list[tuple[int, int]]
    p_value: float
    verdict: str
    differences: dict[str, Difference]
    left_out: int


def compare(first: Score, second: Score, names: Sequence[str | os.PathLike]) -> Comparison:
    """Compare the answers of two files, row by row; rows are matched by `id`, or by their prompt where one has none.

    Args:
        first, second: the files, scored with `keep_pairing`.
        names: of the two files, for messages.

    Raises:
        UserError: if a key stands twice in a file, an expected answer differs, or no row is in both.
    """
    import numpy as np

    for score, name in zip((first, second), names, strict=True):
        _check_keys(score.pairing, name)
    a, b = first.pairing, second.pairing
    _, at_a, at_b = np.intersect1d(a.keys, b.keys, assume_unique=True, return_indices=True)
    if not len(at_a):
        raise UserError(
            f"{names[0]} and {names[1]} share no row that can be scored; rows are matched by `id`, or by prompt"
        )
    order = np.argsort(at_b)  # as in the second file
    at_a, at_b = at_a[order], at_b[order]
    lines = np.stack([np.asarray(a.lines)[at_a], np.asarray(b.lines)[at_b]], 1)
    if len(other := lines[np.asarray(a.expected)[at_a] != np.asarray(b.expected)[at_b]]):
        raise UserError(
            f"{names[0]}:{other[0][0]} and {names[1]}:{other[0][1]} are the same record but expect different answers; "
            "compare on the same data"
        )
    before = np.asarray(a.grades).reshape(-1, len(Grade._fields))[at_a]
    after = np.asarray(b.grades).reshape(-1, len(Grade._fields))[at_b]
    was, now = before[:, Grade._fields.index("hit")] == 1, after[:, Grade._fields.index("hit")] == 1
    fixed, broken = lines[now & ~was], lines[was & ~now]
    p_value = mcnemar(len(fixed), len(broken))
    return Comparison(
        count=len(lines),
        before=int(was.sum()),
        after=int(now.sum()),
        fixed=[tuple(pair) for pair in fixed.tolist()],
        broken=[tuple(pair) for pair in broken.tolist()],
        p_value=p_value,
        verdict="cannot tell" if p_value >= 0.05 else "better" if len(fixed) > len(broken) else "worse",
        differences=_differences(before, after),
        left_out=sum(len(score.pairing.lines) - len(lines) + len(score.unexpected) for score in (first, second)),
    )


def _differences(before: "np.ndarray", after: "np.ndarray") -> dict[str, Difference]:
    """How far the graded metrics differ; before and after: arrays (rows, fields of a Grade)."""
    import numpy as np

    columns = (*Grade._fields, None)

    def fractions(grades: np.ndarray) -> Fractions:
        with_ones = np.column_stack([grades, np.ones(len(grades))])
        above, below = ([columns.index(metric[which]) for metric in GRADED.values()] for which in (0, 1))
        return with_ones[:, above], with_ones[:, below]

    differences = paired_bootstrap(fractions(before), fractions(after))
    return {
        name: Difference(*values, _verdict(*values[1:], less_is_better))
        for (name, (_, _, less_is_better)), values in zip(GRADED.items(), differences, strict=True)
    }


def _verdict(low: float, high: float, less_is_better: bool) -> str:
    if low <= 0 <= high:
        return "cannot tell"
    return "better" if (high < 0) == less_is_better else "worse"


def _check_keys(pairing: Pairing, name: str | os.PathLike) -> None:
    """Refuse a file in which two rows have the same key."""
    import numpy as np

    _, first, which = np.unique(np.asarray(pairing.keys), return_index=True, return_inverse=True)
    for row in np.delete(np.arange(len(which)), first):
        line = pairing.lines[first[which[row]]]
        reason = f"has the id (or, without one, the prompt) of line {line}; rows to compare need different ones"
        raise RecordError(name, pairing.lines[row], reason)
