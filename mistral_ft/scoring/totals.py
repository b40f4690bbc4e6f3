"""A predictions file, scored: totals that are summed row by row, so that memory does not grow with the file.

What does grow are arrays of 8 bytes a row: hashes of the ids, confidences, and for comparisons what each row is worth.
"""

import contextlib
import functools
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mistral_ft.data.json_fields import look_up
from mistral_ft.data.records import check_record, image_blocks
from mistral_ft.data.row_keys import expected_of, hash_bytes, hash_json, identity_of, key_of, right_answers
from mistral_ft.data.rows import parse_line
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import JsonObject
from mistral_ft.progress import Progress
from mistral_ft.scoring.confidence import confidence_of
from mistral_ft.scoring.metrics import FOLDS, Grade, answer_of, fields_to_compare, grade
from mistral_ft.scoring.mistakes import Mistakes
from mistral_ft.scoring.perplexity import Texts, is_scored
from mistral_ft.scoring.statistics import wilson

CHUNK_BYTES = 16 << 20
MOST_SLICES = 10_000
MOST_FIELDS = 10_000
OTHER_FIELDS = "(other fields)"


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
    token_f1: float = 0.0
    objects: int = 0  # rows whose expected answer is a JSON object or list
    valid_objects: int = 0  # ... and whose answer is one too
    answered_fields: int = 0
    expected_fields: Counter[str] = field(default_factory=Counter)  # by path, the first MOST_FIELDS of them
    right_fields: Counter[str] = field(default_factory=Counter)

    def add(self, grade: Grade, wanted: dict[str, str] | None, found: dict[str, str] | None) -> None:
        """Count a row: its grade and, if JSON is wanted, the fields expected and those answered (None: no JSON)."""
        self.count += 1
        self.hits += grade.hit
        self.folded_hits += grade.folded_hit
        self.char_edits += grade.char_edits
        self.chars += grade.chars
        self.word_edits += grade.word_edits
        self.words += grade.words
        self.anls += grade.anls
        self.token_f1 += grade.token_f1
        if wanted is not None:
            self.objects += 1
            self.valid_objects += found is not None
            self.answered_fields += len(found or ())
            for path, value in wanted.items():
                self._add_field(path, 1, (found or {}).get(path) == value)

    def _add_field(self, path: str, count: int, right: int) -> None:
        if path not in self.expected_fields and len(self.expected_fields) >= MOST_FIELDS:
            path = OTHER_FIELDS
        self.expected_fields[path] += count
        self.right_fields[path] += right

    def merge(self, other: "Totals") -> None:
        """Count the rows that `other` has counted."""
        for name, value in vars(other).items():
            if not isinstance(value, Counter):
                setattr(self, name, getattr(self, name) + value)
        for path, count in other.expected_fields.items():
            self._add_field(path, count, other.right_fields[path])


@dataclass
class Options:
    """How to score.

    Attributes:
        folds: what normalised exact match makes equal (see `metrics.fold`).
        by: the field to slice by: a path as `json_fields.flatten` has it, or "answer_length" or "page_size";
            None for none.
        images_dir: folder of the images, for page_size.
        keep_wrong: whether to return the wrong rows.
        keep_pairing: whether to return what pairs the rows of two files, and their grades.
        examples: how many wrong rows to return for people to look at.
        confidence: which of the three confidences to use (see `confidence_of`).
    """

    folds: tuple[str, ...] = FOLDS
    by: str | None = None
    images_dir: Path = Path()
    keep_wrong: bool = False
    keep_pairing: bool = False
    examples: int = 0
    confidence: str = "min"


def _integers() -> array:
    return array("q")  # 8 bytes each, where a list takes 36


@dataclass
class Pairing:
    """What pairs the rows of two files, and their grades; hashes are 64 bits.

    Attributes:
        lines: line numbers of the rows that can be scored; the other arrays belong to these.
        keys, identities, expected: as in `row_keys`.
        grades: the `Grade`s, one after the other.
    """

    lines: array = field(default_factory=_integers)
    keys: array = field(default_factory=_integers)
    identities: array = field(default_factory=_integers)
    expected: array = field(default_factory=_integers)
    grades: array = field(default_factory=lambda: array("d"))

    def add(self, line: int, row: JsonObject, grade: Grade) -> None:
        """Add one row."""
        self.lines.append(line)
        self.keys.append(key_of(row))
        known = row.get("id") is not None or "messages" in row
        # Of others only the whole row tells: many may expect the same.
        self.identities.append(identity_of(row) if known else hash_json(row))
        self.expected.append(expected_of(row))
        self.grades.extend(grade)

    def merge(self, other: "Pairing", lines: int) -> None:
        """Take over the rows of the next part of the file, which follows `lines` lines."""
        self.lines.extend(line + lines for line in other.lines)
        for name in ("keys", "identities", "expected", "grades"):
            getattr(self, name).extend(getattr(other, name))


@dataclass
class Score:
    """What a file, or a part of it, holds."""

    totals: Totals = field(default_factory=Totals)
    slices: defaultdict[str, Totals] = field(default_factory=functools.partial(defaultdict, Totals))
    mistakes: Mistakes = field(default_factory=Mistakes)
    lines: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)  # lines that are no record, and why
    with_error: array = field(default_factory=_integers)  # line numbers
    unanswered: array = field(default_factory=_integers)
    unexpected: array = field(default_factory=_integers)
    ids: array = field(default_factory=_integers)  # hashes
    id_lines: array = field(default_factory=_integers)
    confidences: array = field(default_factory=lambda: array("d"))
    right: array = field(default_factory=lambda: array("b"))  # of the rows with a confidence
    pairing: Pairing = field(default_factory=Pairing)
    wrong: list[bytes] = field(default_factory=list)
    texts: Texts = field(default_factory=Texts)  # plain texts, which have no answer

    def add(self, line: int, raw: bytes, row: JsonObject, options: Options) -> None:
        """Count one row."""
        if row.get("id") is not None:
            self.ids.append(key_of(row))
            self.id_lines.append(line)
        if "messages" not in row and is_scored(row):
            self.texts.add(line, key_of(row), row)
            return
        if row.get("expected") is None:
            self.unexpected.append(line)
            return
        answer = answer_of(row)
        if row.get("error") is not None:
            self.with_error.append(line)
        elif answer is None:
            self.unanswered.append(line)
        graded = grade(row, options.folds)
        wanted, found = fields_to_compare(row)
        self.totals.add(graded, wanted, found)
        if options.by is not None:
            self.slices[slice_of(row, options.by, options.images_dir)].add(graded, wanted, found)
        if (confidence := confidence_of(row, options.confidence)) is not None:
            self.confidences.append(confidence)
            self.right.append(graded.hit)
        if options.keep_pairing:
            self.pairing.add(line, row, graded)
        if not graded.hit:
            kind = self.mistakes.add(row, graded)
            if options.examples:
                about = {"kind": kind, "confidence": confidence}
                self.mistakes.add_example(hash_bytes(raw), line, row, about, options.examples)
            if options.keep_wrong:
                self.wrong.append(raw.strip() + b"\n")

    def merge(self, other: "Score", options: Options) -> None:
        """Take over the next part of the file; its wrong rows are the caller's."""
        for name in ("with_error", "unanswered", "unexpected", "id_lines"):
            getattr(self, name).extend(line + self.lines for line in getattr(other, name))
        self.faults += [(line + self.lines, reason) for line, reason in other.faults]
        for name in ("ids", "confidences", "right"):
            getattr(self, name).extend(getattr(other, name))
        self.pairing.merge(other.pairing, self.lines)
        self.mistakes.merge(other.mistakes, self.lines, options.examples)
        self.totals.merge(other.totals)
        self.texts.merge(other.texts, self.lines)
        for name, totals in other.slices.items():
            self.slices[name].merge(totals)
        self.lines += other.lines

    @property
    def repeated_ids(self) -> list[int]:
        """Lines with an id that stands in the file before."""
        import numpy as np

        _, first = np.unique(np.asarray(self.ids), return_index=True)
        return np.delete(np.asarray(self.id_lines), first).tolist()


def score_file(path: str | os.PathLike, options: Options, wrong: IO[bytes] | None = None) -> Score:
    """Score a file, on all cores if it is large.

    Args:
        wrong: where to write the wrong rows, part by part; asked for with `options.keep_wrong`.

    Raises:
        UserError: if the file cannot be read, holds a line that is no record, has nothing to score against, or if
            `options.by` is no field of it or one with too many values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder; expected a JSONL file' if path.is_dir() else 'no such file'}")
    starts = range(0, max(1, path.stat().st_size), CHUNK_BYTES)
    score = Score()
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[Score]] = map
        progress = None
        if len(starts) > 1:
            run = stack.enter_context(ProcessPoolExecutor(min(len(starts), os.cpu_count() or 1))).map
            progress = stack.enter_context(contextlib.closing(Progress("scoring", len(starts), "part")))
        for part in run(functools.partial(_score_part, path, options=options), starts):
            score.merge(part, options)
            if score.faults:
                raise RecordError(path, *score.faults[0])
            if len(score.slices) > MOST_SLICES:
                raise UserError(f"--by {options.by}: more than {MOST_SLICES:,} values; slice by a field with fewer")
            if wrong is not None:
                wrong.writelines(part.wrong)
            if progress:
                progress.update()
    if not score.totals.count and not score.texts.lines:
        raise UserError(f"{path}: no row has `expected`, or is plain text with `nll`, so there is nothing to score")
    if set(score.slices) == {NO_VALUE}:
        raise UserError(f"--by {options.by}: no row of {path} has that field")
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
            if position >= start + CHUNK_BYTES or len(score.slices) > MOST_SLICES:
                break
            position += len(raw)
            score.lines += 1
            try:
                row = parse_line(raw, first=not start and score.lines == 1)
                if row is not None:
                    score.add(score.lines, raw, row, options)
            except ValueError as error:
                score.faults.append((score.lines, str(error)))
                break
    return score


def read_lines(path: str | os.PathLike, lines: Iterable[int]) -> Iterator[tuple[int, JsonObject]]:
    """(line number, row) of these lines of a file that was scored before, in the order of the file."""
    wanted = set(lines)
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not wanted:
                return
            if line in wanted:
                wanted.remove(line)
                row = parse_line(raw, first=line == 1)
                assert row is not None  # a blank line has no score
                yield line, row


LENGTHS = (10, 20, 50, 100, 200)
MEGAPIXELS = (0.5, 1, 2, 4, 8)
NO_VALUE = "(none)"


def slice_of(row: JsonObject, by: str, images_dir: Path) -> str:
    """The slice that a row belongs to, as text of at most 200 characters; see `Options`."""
    value = look_up(row, by)
    if by not in row and by == "answer_length":
        return _bucket(len(right_answers(row)[0].strip()), LENGTHS, "characters")
    if by not in row and by == "page_size":
        return _page_size(row, images_dir)
    if value is None:
        return NO_VALUE
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _page_size(row: JsonObject, images_dir: Path) -> str:
    from mistral_ft.data.pages import page_size
    from mistral_ft.data.references import resolve

    try:
        check_record(row)
        images = image_blocks(row["messages"])
        if not images:
            return "no page"
        width, height = page_size(resolve(images[0], images_dir))
    except ValueError:
        return "page cannot be opened"
    return _bucket(width * height / 1e6, MEGAPIXELS, "megapixels")


def _bucket(value: float, bounds: Sequence[float], unit: str) -> str:
    upper = next((bound for bound in bounds if value <= bound), None)
    return f"up to {upper} {unit}" if upper is not None else f"more than {bounds[-1]} {unit}"


def figures(totals: Totals) -> JsonObject:
    """The figures that follow from the sums: shares in 0..1, error rates (edits over expected length) from 0 up."""
    low, high = wilson(totals.hits, totals.count)
    result: JsonObject = {
        "count": totals.count,
        "hits": totals.hits,
        "accuracy": totals.hits / totals.count,
        "accuracy_low": low,
        "accuracy_high": high,
        "normalised_accuracy": totals.folded_hits / totals.count,
        "cer": totals.char_edits / totals.chars if totals.chars else None,
        "wer": totals.word_edits / totals.words if totals.words else None,
        "anls": totals.anls / totals.count,
        "token_f1": totals.token_f1 / totals.count,
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
            "fields": {
                path: _share(totals.right_fields[path], count) for path, count in totals.expected_fields.items()
            },
        }
    return result


def _share(hits: int, count: int) -> JsonObject:
    low, high = wilson(hits, count)
    return {"count": count, "accuracy": hits / count, "low": low, "high": high}
