"""An index over a JSONL file: where its rows stand, and what lists, filters and sorts need to know of them.

The rows stay in the file and are read again when they are shown. Of each one the index keeps a `ROW` of 54 bytes, its
values of the fields that rows can be filtered by, 4 bytes each, and its text for the search, in a temporary file that
has no name. The index follows the file while it grows.
"""

import contextlib
import math
import mmap
import os
import re
import tempfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mistral_ft.data.json_fields import field_name
from mistral_ft.data.predictions import find_predictions, row_in
from mistral_ft.data.records import as_predicted
from mistral_ft.data.references import is_data_url
from mistral_ft.data.row_keys import expected_of, identity_of, key_of, row_name
from mistral_ft.data.rows import parse_line
from mistral_ft.files import Json, JsonObject
from mistral_ft.review.shown import answers_of
from mistral_ft.scoring.confidence import confidence_of
from mistral_ft.scoring.metrics import answer_of, fold, grade
from mistral_ft.scoring.mistakes import kind_of
from mistral_ft.scoring.totals import MOST_SLICES, NO_VALUE, slice_of

CHUNK_BYTES = 4 << 20
LONGEST_LINE = 64 << 20  # bytes; a longer line is listed as bad, not read
MOST_FIELDS = 60  # that rows can be filtered by
LONGEST_NAME = 200  # of a field, in characters; what has a longer one is no name to choose from a list
MOST_BAD_LINES = 1000  # that are listed; more are counted

# Bits of `state`.
SCORED, HIT, FAILED, ANSWERED, REVIEWED, EDITED, FLAGGED = (1 << bit for bit in range(7))

# key, identity, expected: as in `row_keys`.
# other_hit: whether the file that this one is compared with has the row right; -1 if it has no such row.
ROW = np.dtype(
    [
        ("offset", "i8"), ("length", "i4"), ("line", "i4"), ("key", "i8"), ("identity", "i8"),
        ("expected", "i8"), ("state", "u1"), ("other_hit", "i1"), ("cer", "f4"), ("confidence", "f4"),
        ("characters", "i4"),
    ]
)  # fmt: skip

# Not among the fields to filter by: what every row has of its own.
OWN = {"id", "messages", "expected", "actual", "thinking", "confidence", "error", "tools"}
COMPUTED = {"answer_length": "length of the expected answer", "mistake": "kind of mistake"}


@dataclass
class Column:
    """One field's values: `values[codes[row]]` is the row's; code 0 stands for rows without the field."""

    codes: array = field(default_factory=lambda: array("i"))
    values: dict[str, int] = field(default_factory=lambda: {NO_VALUE: 0})
    too_many: bool = False  # more than MOST_SLICES values: not kept

    def set(self, row: int, value: str) -> None:
        """Set a row's value; rows in between have none."""
        code = self.values.setdefault(value, len(self.values))
        if self.too_many or len(self.values) > MOST_SLICES:
            self._give_up()
        elif row == len(self.codes):
            self.codes.append(code)
        else:
            self.pad(row + 1)
            self.codes[row] = code

    def pad(self, count: int) -> None:
        """Make it `count` rows long."""
        if not self.too_many and len(self.codes) < count:
            self.codes.frombytes(bytes(self.codes.itemsize * (count - len(self.codes))))

    def extend(self, other: "Column", start: int, count: int) -> None:
        """Take over the `count` rows of the next part of the file, which are numbered from `start`."""
        new = np.array([self.values.setdefault(value, len(self.values)) for value in other.values], np.intc)
        if self.too_many or other.too_many or len(self.values) > MOST_SLICES:
            self._give_up()
            return
        self.pad(start)
        self.codes.frombytes(new[np.frombuffer(other.codes, np.intc)].tobytes())
        self.pad(start + count)

    def _give_up(self) -> None:
        self.too_many, self.codes, self.values = True, array("i"), {NO_VALUE: 0}


@dataclass
class Part:
    """What a stretch of the file holds.

    Attributes:
        rows: array of `ROW`; lines are counted from the part's first, as 1.
        text: what the search looks through, one line per row, and its offsets.
        end: where in the file the next part starts.
        lines: how many lines it has.
        bad: (line, reason) of the first lines that are no record; bad_count: of how many.
    """

    rows: np.ndarray
    text: bytes
    text_offsets: np.ndarray
    columns: dict[str, Column]
    end: int
    lines: int
    bad: list[tuple[int, str]]
    bad_count: int
    tail: str | None = None


def index_part(path: Path, start: int, stop: int) -> Part:
    """Index the lines that begin in [start, stop) of a file; `start` is the beginning of a line.

    The file's last line, if it has no line end and is no record, is left for later: it may be half written.
    """
    found: list[tuple[float, ...]] = []  # as `ROW`
    texts: list[bytes] = []
    columns: dict[str, Column] = {}
    bad: list[tuple[int, str]] = []
    bad_count, lines, tail = 0, 0, None
    with open(path, "rb") as file:
        position = _skip_line_end(file, start)
        while position < stop and (raw := file.readline(LONGEST_LINE)):
            length, row, reason = len(raw), None, None
            while not raw.endswith(b"\n") and (raw_end := file.readline(LONGEST_LINE)):
                raw, length, reason = raw_end, length + len(raw_end), f"longer than {LONGEST_LINE >> 20} MiB"
            try:
                row = None if reason else row_in(path, parse_line(raw, first=position == 0))
                if row is not None:
                    numbers, values = measure(row)
                    keys = key_of(row), identity_of(row), expected_of(row)
                    entry, text = (position, length, lines + 1, *keys, *numbers), searchable(row)
            except ValueError as error:
                reason = str(error)
            except RecursionError:
                reason = "nested too deeply to be read"
            if reason and not raw.endswith(b"\n"):
                tail = reason
                break
            lines += 1
            if reason:
                bad_count += 1
                bad += [(lines, reason)] * (len(bad) < MOST_BAD_LINES)
            elif row is not None:
                for name, value in values.items():
                    if name not in columns and len(columns) < MOST_FIELDS:
                        columns[name] = Column()
                    if name in columns:
                        columns[name].set(len(found), value)
                found.append(entry)
                texts.append(text.encode(errors="replace"))
            position += length
    for column in columns.values():
        column.pad(len(found))
    offsets = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])]) if texts else np.zeros(0, np.int64)
    joined = b"".join(text + b"\n" for text in texts)
    return Part(np.array(found, ROW), joined, offsets, columns, position, lines, bad, bad_count, tail)


def line_starts(path: Path, start: int, end: int) -> list[int]:
    """Where parts of about `CHUNK_BYTES` begin that make up [start, end) of a file, and `end`."""
    starts = [start]
    with open(path, "rb") as file:
        while starts[-1] + CHUNK_BYTES < end:
            file.seek(starts[-1] + CHUNK_BYTES - 1)
            while (piece := file.readline(LONGEST_LINE)) and not piece.endswith(b"\n"):
                pass
            starts.append(min(file.tell(), end))
    return [*starts, end] if starts[-1] < end else starts


def _skip_line_end(file: IO[bytes], start: int) -> int:
    """Go to `start`, or behind a line end there that belongs to the row before, which was read without it."""
    if start:
        file.seek(start - 1)
        if file.read(1) != b"\n" and file.read(1) == b"\n":
            return start + 1
    file.seek(start)
    return start


class Measures(NamedTuple):
    """The last fields of `ROW`; NaN for what a row has not, -1 for no other file."""

    state: int
    other_hit: int
    cer: float
    confidence: float
    characters: int


def measure(row: JsonObject) -> tuple[Measures, dict[str, str]]:
    """A row's measures, and values to filter by: its fields, by paths as of `rows.flatten`, and `COMPUTED` ones."""
    answer, answers, confidence = answer_of(row), answers_of(row), confidence_of(row)
    state = FAILED * (row.get("error") is not None) | ANSWERED * (answer is not None)
    values: dict[str, str] = {}
    for name, value in row.items():
        if name not in OWN:
            _add_values(values, field_name(name), value)
    cer, characters = math.nan, len(answer or "")
    if answers:
        graded = grade(row)
        state |= SCORED | HIT * graded.hit
        cer = graded.char_edits / graded.chars if graded.chars else float(graded.char_edits > 0)
        characters = len(answers[0])
        if not graded.hit:
            values.setdefault("mistake", kind_of(row, graded))
        values.setdefault("answer_length", slice_of(row, "answer_length", Path()))
    return Measures(state, -1, cer, math.nan if confidence is None else confidence, characters), values


def _add_values(values: dict[str, str], name: str, value: Json, depth: int = 3) -> None:
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            _add_values(values, f"{name}.{field_name(key)}", inner, depth - 1)
    elif value is not None and len(name) <= LONGEST_NAME:
        values[name] = slice_of({name: value}, name, Path())


def searchable(row: JsonObject) -> str:
    """All text of a row in one line, folded: capitals, runs of white space and Unicode forms do not count."""
    texts: list[str] = []
    for name, value in row.items():
        if name != "confidence":
            _collect(value, texts)
    return fold("\x1f".join(texts))


def _collect(value: Json, texts: list[str]) -> None:
    if isinstance(value, str):
        texts += [] if is_data_url(value) else [value]
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "type"):
                _collect(inner, texts)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, texts)
    elif value is not None and not isinstance(value, bool):
        texts.append(str(value))


class RowIndex:
    """The index. Everything but `index_part` is done by one thread.

    Attributes:
        path: the file that is read: predict's unfinished one as long as there is no other.
        rows: array of `ROW`.
        generation: grows when the file was replaced and the index begins anew; row numbers are those of one generation.
        columns: by field.
        bad: (line, reason) of the first bad lines; bad_count: how many there are.
        tail: what is wrong with the half line at the file's end, if there is one.
        looked_at: bytes of the file when its end was last read.
        predicted: whether any row was answered; if none was, the file is a data set and nothing is right or wrong.
    """

    def __init__(self, path: str | os.PathLike):
        self.wanted = Path(path)
        self.generation = 0
        self.restart()

    def restart(self) -> None:
        """Begin anew.

        Raises:
            OSError: if the file cannot be read; then nothing has changed.
        """
        path = find_predictions(self.wanted)
        file = open(path, "rb")  # noqa: SIM115 - kept open for reading rows
        if self.generation:
            self.close()
        self.path, self._file = path, file
        self.generation += 1
        self._rows: np.ndarray = np.zeros(1024, ROW)
        self._text_offsets: np.ndarray = np.zeros(1024, np.int64)
        self._text = tempfile.TemporaryFile()  # noqa: SIM115 - as is this one
        self.count = self._text_size = 0
        self._changed_text: dict[int, str] = {}
        self.columns: dict[str, Column] = {}
        self.bad: list[tuple[int, str]] = []
        self.bad_count = self.lines = self.end = 0
        self.tail: str | None = None
        self.predicted = False
        self.looked_at = -1

    @property
    def rows(self) -> np.ndarray:
        return self._rows[: self.count]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def unfinished(self) -> bool:
        """Whether the file is that of a run which is not done."""
        return self.path != self.wanted

    def replaced(self) -> bool:
        """Whether another file has taken the place of the one that was read, or it was cut."""
        if self.unfinished and self.wanted.exists():
            return True
        with contextlib.suppress(OSError):
            if not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return True
        return self.size < self.end

    def add(self, part: Part) -> range:
        """Take over the next part of the file; return the new rows' numbers."""
        start, new = self.count, len(part.rows)
        while start + new > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._text_offsets = np.concatenate([self._text_offsets, np.zeros_like(self._text_offsets)])
        self._rows[start : start + new] = part.rows
        self._rows["line"][start : start + new] += self.lines
        self._text_offsets[start : start + new] = part.text_offsets + self._text_size
        self._text.write(part.text)
        self._text.flush()
        self._text_size += len(part.text)
        for name, column in part.columns.items():
            if name in self.columns or len(self.columns) < MOST_FIELDS:
                self.columns.setdefault(name, Column()).extend(column, start, new)
        self.count += new
        self.predicted |= bool((part.rows["state"] & (ANSWERED | FAILED)).any())
        for column in self.columns.values():
            column.pad(self.count)
        self.bad += [(line + self.lines, reason) for line, reason in part.bad][: MOST_BAD_LINES - len(self.bad)]
        self.bad_count += part.bad_count
        self.lines += part.lines
        self.end, self.tail = part.end, part.tail
        return range(start, self.count)

    def read(self, row: int) -> JsonObject:
        """A row as predict writes it: question and answer of a chat apart, columns as messages; as it stands if bad.

        Raises:
            ValueError: if the file was changed under the index.
        """
        entry = self._rows[row]
        raw = os.pread(self._file.fileno(), int(entry["length"]), int(entry["offset"]))
        data = row_in(self.path, parse_line(raw, first=entry["offset"] == 0))
        if data is None or identity_of(data) != entry["identity"]:
            raise ValueError(f"{self.path}: was changed while it was open")
        return as_predicted(data)

    def name_of(self, row: int) -> str:
        """A row's name: see `row_name`."""
        identities = self.rows["identity"]
        return row_name(int(identities[row]), int((identities[:row] == identities[row]).sum()))

    def update(self, row: int, data: JsonObject, state: int, other_hit: int) -> None:
        """Measure a row again that was corrected.

        Args:
            data: the row with its corrections.
            state: of REVIEWED, EDITED and FLAGGED those that hold.
        """
        measured, values = measure(data)
        entry = self._rows[row]
        entry["state"], entry["other_hit"] = measured.state | state, other_hit
        entry["cer"], entry["confidence"], entry["characters"] = measured[2:]
        for name in COMPUTED:
            if name in self.columns or name in values:
                self.columns.setdefault(name, Column()).set(row, values.get(name, NO_VALUE))
        self._changed_text.pop(row, None)
        if state & EDITED:
            self._changed_text[row] = searchable(data)

    def search(self, text: str) -> np.ndarray:
        """Which rows hold a text, in the file or as corrected: array of bool."""
        found = np.zeros(self.count, bool)
        needle = fold(text)
        if not needle:
            return ~found
        if self._text_size:
            with mmap.mmap(self._text.fileno(), self._text_size, access=mmap.ACCESS_READ) as memory:
                pattern = re.compile(re.escape(needle.encode(errors="replace")) + rb"[^\n]*\n")  # one match per row
                places = np.fromiter((match.start() for match in pattern.finditer(memory)), np.int64)
            found[np.searchsorted(self._text_offsets[: self.count], places, "right") - 1] = True
        for row, changed in self._changed_text.items():
            found[row] |= needle in changed
        return found

    def close(self) -> None:
        """Let go of the files."""
        self._file.close()
        self._text.close()
