"""The log of a review: what was decided about which row, appended to <jsonl>.review.jsonl the moment it was decided.

Every line holds a row's whole state and is on the disk before the reviewer sees it as saved:

    {"time": "2026-01-31T12:00:00Z", "row": "5e3f…", "version": 2, "line": 7, "id": "test-007",
     "expected": "Permit 13", "reviewed": true, "flagged": false}

`row` names the row by its id and messages (`row_keys.row_name`), so that it is found again when the file is
finished, sorted or grows. The last line of a row holds. Lines are never changed; the file that is reviewed neither.
"""

import fcntl
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from mistral_ft.data.json_fields import has_half
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject, check_target, fsync_path
from mistral_ft.review.shown import answers_of


@dataclass(frozen=True)
class Review:
    """What was decided about a row.

    Attributes:
        version: how many decisions there were; 0 is a row that nobody has touched.
        expected: the corrected answer; None leaves the file's.
        reviewed: whether somebody says that the expected answer is right.
        flagged: whether somebody is to look again.
    """

    version: int = 0
    expected: str | None = None
    reviewed: bool = False
    flagged: bool = False

    def apply(self, row: JsonObject) -> JsonObject:
        """The row with its correction, in the place of the first of several right answers; the others stay.

        If it is one of the others, it moves to the front and none goes.
        """
        if self.expected is None:
            return row
        if not isinstance(row.get("expected"), list):
            return row | {"expected": self.expected}
        answers = answers_of(row)
        kept = answers if self.expected in answers else answers[1:]
        return row | {"expected": [self.expected, *(answer for answer in kept if answer != self.expected)]}


class Outdated(Exception):
    """Somebody else, in another tab, has decided about the row in the meantime."""


def log_path(path: str | os.PathLike) -> Path:
    """Where the log of a file is."""
    return Path(f"{path}.review.jsonl")


def read_log(path: Path) -> tuple[dict[str, Review], int]:
    """Reviews by the rows' names, and where the last whole line ends.

    Raises:
        UserError: if a whole line is none of ours.
    """
    reviews: dict[str, Review] = {}
    end = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break
            try:
                entry = json.loads(raw)
                review = Review(*(entry[name] for name in Review.__dataclass_fields__))
                good = isinstance(review.version, int) and isinstance(review.expected, str | None)
                good &= re.fullmatch(r"([0-9a-f]{2}){1,8}(-[0-9]+)?", entry["row"]) is not None
                good &= not has_half(review.expected or "")
                reviews[entry["row"]] = review
            except (ValueError, TypeError, KeyError, RecursionError):
                good = False
            if not good:
                raise UserError(f"{path}:{number}: is no line of a review; move the file away, or remove the line")
            end += len(raw)
    return reviews, end


class ReviewLog:
    """The log, open for writing.

    Args:
        path: the file that is reviewed.

    Attributes:
        reviews: the newest of each row, by its name.
        revision: how many decisions were written since the start.

    Raises:
        UserError: if another server has the log open, or it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = check_target(log_path(path))
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise UserError(f"{self.path}: another server is writing reviews of this file; use that one") from None
        except OSError:
            pass  # a disk of another machine that knows no locks
        self.reviews, end = read_log(self.path)
        if end < os.fstat(self._handle).st_size:
            # A server that was killed while it wrote has left half a line, which it never called saved.
            os.ftruncate(self._handle, end)
            print(f"{self.path}: removed half a line at its end", file=sys.stderr)
        fsync_path(self.path.parent)
        self.revision = 0

    def get(self, name: str) -> Review:
        """The review of a row."""
        return self.reviews.get(name, Review())

    def save(self, name: str, about: JsonObject, review: Review) -> Review:
        """Put a decision on the disk.

        Args:
            name: of the row.
            about: what tells people which row it is.
            review: with the version of the one that it takes the place of.

        Returns:
            The review with its own version.

        Raises:
            Outdated: if there is a newer one.
            OSError: if the disk takes no more; then nothing was written.
        """
        if review.version != self.get(name).version:
            raise Outdated
        state = asdict(review) | {"version": review.version + 1}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "row": name, **about, **state}, ensure_ascii=False).encode() + b"\n"
        end = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, line)
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, end)
            raise
        self.reviews[name] = Review(**state)
        self.revision += 1
        return self.reviews[name]

    def close(self) -> None:
        """Let go of the log; an empty one is removed."""
        if not os.fstat(self._handle).st_size:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
