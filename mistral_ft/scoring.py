"""A predictions file, scored: totals that are summed row by row, so that memory does not grow with the file."""

import contextlib
import functools
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mistral_ft.confidence import confidence_of
from mistral_ft.errors import RecordError, UserError
from mistral_ft.metrics import FOLDS, anls, answer_of, edit_counts, flatten, fold, is_hit, parse_object, token_f1
from mistral_ft.records import parse_line
from mistral_ft.statistics import wilson

CHUNK_BYTES = 16 << 20


@dataclass
class Totals:
    """Sums over scored rows; the figures follow from them."""

    count: int = 0
    hits: int = 0
    folded_hits: int = 0
    char_edits: int = 0
    chars: int = 0
    word_edits: int = 0
    words: int = 0
    anls: float = 0.0
    f1: float = 0.0
    objects: int = 0  # rows whose expected answer is a JSON object
    valid_objects: int = 0  # ... and whose answer is one too
    expected_fields: Counter = field(default_factory=Counter)  # by path
    right_fields: Counter = field(default_factory=Counter)
    answered_fields: int = 0

    def add(self, row: dict[str, Any], folds: Sequence[str] = FOLDS) -> None:
        """Count a row. Without an answer it counts as one with the empty answer would, and as wrong."""
        expected, hit = row["expected"], is_hit(row)
        actual = answer_of(row) or ""
        self.count += 1
        self.hits += hit
        self.folded_hits += hit or (actual != "" and fold(actual, folds) == fold(expected, folds))
        edits = edit_counts(actual, expected)
        self.char_edits += edits[0]
        self.chars += edits[1]
        self.word_edits += edits[2]
        self.words += edits[3]
        self.anls += 1.0 if hit else anls(actual, expected)
        self.f1 += 1.0 if hit else token_f1(actual, expected)
        if (wanted := parse_object(expected)) is not None:
            self._add_fields(dict(flatten(wanted)), parse_object(actual))

    def _add_fields(self, wanted: dict[str, str], answer: dict[str, Any] | None) -> None:
        found = dict(flatten(answer)) if answer else {}
        self.objects += 1
        self.valid_objects += answer is not None
        self.answered_fields += len(found)
        self.expected_fields.update(wanted.keys())
        self.right_fields.update(path for path, value in wanted.items() if found.get(path) == value)

    def __iadd__(self, other: "Totals") -> "Totals":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class Options:
    """How to score.

    Attributes:
        folds: what normalised exact match makes equal (see `metrics.fold`).
        by: the field to slice by: a record's, dots for nested ones, or "answer_length" or "page_size"; None for none.
        images_dir: folder of the images, for page_size.
        keep_wrong: whether to return the wrong rows.
        confidence: which of the three confidences to use (see `confidence_of`).
    """

    folds: tuple[str, ...] = FOLDS
    by: str | None = None
    images_dir: Path = Path()
    keep_wrong: bool = False
    confidence: str = "min"


def _integers() -> array:
    return array("q")  # 8 bytes each, where a list takes 36


@dataclass
class Score:
    """What a file, or a part of it, holds."""

    totals: Totals = field(default_factory=Totals)
    slices: dict[str, Totals] = field(default_factory=dict)
    lines: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)  # lines that are no record, and why
    with_error: array = field(default_factory=_integers)  # line numbers
    unanswered: array = field(default_factory=_integers)
    unexpected: array = field(default_factory=_integers)
    ids: array = field(default_factory=_integers)  # hashes
    keys: array = field(default_factory=_integers)  # hashes of the prompts of rows with a confidence
    confidences: array = field(default_factory=lambda: array("d"))
    right: array = field(default_factory=lambda: array("b"))
    wrong: list[bytes] = field(default_factory=list)

    def add(self, line: int, raw: bytes, row: dict[str, Any], options: Options) -> None:
        """Count one row."""
        if "id" in row:
            self.ids.append(stable_hash(json.dumps(row["id"])))
        expected = row.get("expected")
        if expected is None:
            self.unexpected.append(line)
            return
        if not isinstance(expected, str):
            raise ValueError("`expected` must be a string")
        if "error" in row:
            self.with_error.append(line)
        elif answer_of(row) is None:
            self.unanswered.append(line)
        self.totals.add(row, options.folds)
        if options.by:
            self.slices.setdefault(slice_of(row, options), Totals()).add(row, options.folds)
        if (confidence := confidence_of(row, options.confidence)) is not None:
            self.keys.append(stable_hash(json.dumps([row.get("id"), row.get("messages")])))
            self.confidences.append(confidence)
            self.right.append(is_hit(row))
        if options.keep_wrong and not is_hit(row):
            self.wrong.append(raw.strip() + b"\n")

    def merge(self, other: "Score") -> None:
        """Take over the next part of the file; its wrong rows are the caller's."""
        for mine, theirs in (
            (self.with_error, other.with_error),
            (self.unanswered, other.unanswered),
            (self.unexpected, other.unexpected),
        ):
            mine.extend(line + self.lines for line in theirs)
        self.faults += [(line + self.lines, reason) for line, reason in other.faults]
        self.ids += other.ids
        self.keys += other.keys
        self.confidences += other.confidences
        self.right += other.right
        self.totals += other.totals
        for name, totals in other.slices.items():
            self.slices.setdefault(name, Totals()).__iadd__(totals)
        self.lines += other.lines

    @property
    def duplicate_ids(self) -> int:
        """How many rows have an id that an earlier row has."""
        return len(self.ids) - len(set(self.ids))


def score_file(path: str | os.PathLike, options: Options, wrong: IO[bytes] | None = None) -> Score:
    """Score a file, on all cores if it is large.

    Args:
        wrong: where to write the wrong rows, part by part; asked for with `options.keep_wrong`.

    Raises:
        UserError: if the file cannot be read, holds a line that is no record, or has nothing to score against.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder; expected a JSONL file' if path.is_dir() else 'no such file'}")
    starts = range(0, max(1, path.stat().st_size), CHUNK_BYTES)
    score = Score()
    with ProcessPoolExecutor(os.cpu_count()) if len(starts) > 1 else contextlib.nullcontext() as pool:
        run = pool.map if pool else map
        for part in run(functools.partial(_score_part, path, options=options), starts):
            score.merge(part)
            if score.faults:
                raise RecordError(path, *score.faults[0])
            if wrong is not None:
                wrong.writelines(part.wrong)
    if not score.totals.count:
        raise UserError(f"{path}: no row has `expected`, so there is nothing to score against")
    return score


def _score_part(path: Path, start: int, options: Options) -> Score:
    """Score the lines that begin in [start, start + CHUNK_BYTES)."""
    score = Score()
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # it belongs to the part before
        position = file.tell()
        for raw in file:
            if position >= start + CHUNK_BYTES:
                break
            position += len(raw)
            score.lines += 1
            try:
                row = parse_line(raw, first=not start and score.lines == 1)
                if row is not None:
                    score.add(score.lines, raw, row, options)
            except ValueError as error:
                score.faults.append((score.lines, str(error)))
    return score


def stable_hash(text: str) -> int:
    """64 bits of a text's hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


LENGTHS = (10, 20, 50, 100, 200)
MEGAPIXELS = (0.5, 1, 2, 4, 8)


def slice_of(row: dict[str, Any], options: Options) -> str:
    """The slice that a row belongs to, as text."""
    if options.by == "answer_length" and options.by not in row:
        return _bucket(len(row["expected"]), LENGTHS, "characters")
    if options.by == "page_size" and options.by not in row:
        return _page_size(row, options.images_dir)
    value: Any = row
    for key in options.by.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _page_size(row: dict[str, Any], images_dir: Path) -> str:
    from mistral_ft.images import page_size
    from mistral_ft.records import image_blocks

    images = image_blocks(row.get("messages") or [])
    if not images:
        return "no page"
    try:
        width, height = page_size(images_dir / images[0])
    except ValueError:
        return "page cannot be opened"
    return _bucket(width * height / 1e6, MEGAPIXELS, "megapixels")


def _bucket(value: float, bounds: Sequence[float], unit: str) -> str:
    upper = next((bound for bound in bounds if value <= bound), None)
    return f"up to {upper} {unit}" if upper is not None else f"more than {bounds[-1]} {unit}"


def figures(totals: Totals) -> dict[str, Any]:
    """The figures that follow from the sums: shares in 0..1, error rates (edits over expected length) from 0 up."""
    low, high = wilson(totals.hits, totals.count)
    result: dict[str, Any] = {
        "count": totals.count,
        "hits": totals.hits,
        "accuracy": totals.hits / totals.count,
        "accuracy_low": low,
        "accuracy_high": high,
        "normalised_accuracy": totals.folded_hits / totals.count,
        "cer": totals.char_edits / totals.chars if totals.chars else None,
        "wer": totals.word_edits / totals.words if totals.words else None,
        "anls": totals.anls / totals.count,
        "token_f1": totals.f1 / totals.count,
    }
    if totals.objects:
        right, answered = totals.right_fields.total(), totals.answered_fields
        expected = totals.expected_fields.total()
        result["json"] = {
            "count": totals.objects,
            "valid": totals.valid_objects / totals.objects,
            "precision": right / answered if answered else 0.0,
            "recall": right / expected if expected else 1.0,
            "f1": 2 * right / (answered + expected) if answered + expected else 1.0,
            "fields": {path: totals.right_fields[path] / count for path, count in totals.expected_fields.items()},
        }
    return result
