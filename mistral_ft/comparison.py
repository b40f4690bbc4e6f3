"""Two models on the same rows: is one better, and which rows changed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ft.errors import RecordError, UserError, raise_all
from mistral_ft.metrics import anls, answer_of, edit_counts, is_hit, token_f1
from mistral_ft.records import read_jsonl
from mistral_ft.statistics import mcnemar, paired_bootstrap


@dataclass
class Comparison:
    """What changed between two predictions files.

    Attributes:
        count: rows that are in both files and can be scored.
        before, after: rows each has right.
        fixed, broken: rows only the second, only the first has right, as the second file has them.
        p_value: of McNemar's exact test.
        differences: {metric: (second - first, low, high)}, 95 % intervals.
        left_out: rows that are in one file only, or have no `expected`.
    """

    count: int
    before: int
    after: int
    fixed: list[dict[str, Any]]
    broken: list[dict[str, Any]]
    p_value: float
    differences: dict[str, tuple[float, float, float]]
    left_out: int

    @property
    def verdict(self) -> str:
        """better, worse or cannot tell, at 95 %."""
        if self.p_value >= 0.05:
            return "cannot tell"
        return "better" if self.after > self.before else "worse"


def compare(first: str | os.PathLike, second: str | os.PathLike) -> Comparison:
    """Compare the answers of two files, row by row; rows are matched by `id`, or by their prompt where one has none.

    Raises:
        UserError: if a file cannot be read, a key stands twice, an expected answer differs, or no row is in both.
    """
    before, after = _read(first), _read(second)
    shared = [key for key in after if key in before and after[key].get("expected") is not None]
    pairs = [(before[key], after[key]) for key in shared]
    if not pairs:
        raise UserError(f"{first} and {second} share no row that can be scored; rows are matched by `id`, or by prompt")
    for key, (a, b) in zip(shared, pairs, strict=True):
        if a.get("expected") != b["expected"]:
            raise UserError(f"{first} and {second} expect different answers for {key[:80]}; compare on the same data")
    hits = [(is_hit(a), is_hit(b)) for a, b in pairs]
    fixed = [b for (_, b), (was, now) in zip(pairs, hits, strict=True) if now and not was]
    broken = [b for (_, b), (was, now) in zip(pairs, hits, strict=True) if was and not now]
    graded = [(_grades(a), _grades(b)) for a, b in pairs]
    return Comparison(
        count=len(pairs),
        before=sum(was for was, _ in hits),
        after=sum(now for _, now in hits),
        fixed=fixed,
        broken=broken,
        p_value=mcnemar(len(fixed), len(broken)),
        differences={
            name: paired_bootstrap([a[name] for a, _ in graded], [b[name] for _, b in graded]) for name in graded[0][0]
        },
        left_out=len(before) + len(after) - 2 * len(pairs),
    )


def _grades(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    actual = answer_of(row) or ""
    edits = edit_counts(actual, row["expected"])
    return {
        "cer": edits[:2],
        "wer": edits[2:],
        "anls": (anls(actual, row["expected"]), 1),
        "token_f1": (token_f1(actual, row["expected"]), 1),
    }


def _read(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The rows of a file by key."""
    errors: list[RecordError] = []
    rows: dict[str, dict[str, Any]] = {}
    for line, row in read_jsonl(path, errors):
        key = f"id {json.dumps(row['id'])}" if "id" in row else f"prompt {json.dumps(row.get('messages'))}"
        if key in rows:
            errors.append(RecordError(path, line, f"a second row with {key[:80]}; rows to compare need different ids"))
        rows[key] = row
    raise_all(errors)
    if not rows:
        raise UserError(f"{Path(path)}: holds no row")
    return rows
