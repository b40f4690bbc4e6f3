"""The reviewer's desk: a file's index with the reviews laid over it, beside the file it is compared with."""

import asyncio
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mistral_ft.data.row_keys import identity_in, key_of
from mistral_ft.files import JsonObject
from mistral_ft.review.index import EDITED, FAILED, FLAGGED, HIT, REVIEWED, SCORED, RowIndex, index_part, line_starts
from mistral_ft.review.log import Review, ReviewLog
from mistral_ft.review.shown import answers_of
from mistral_ft.scoring.metrics import is_hit

Result = TypeVar("Result")

FIRST_BYTES = 1 << 20  # indexed before the first page is served
POLL_SECONDS = 0.7  # between looks at whether the files have grown
MANY_PARTS = 4  # from so many on, other processes index them

# Rows to show: (bits that must be set, bits that must not be, what the other file must have).
SHOWN = {
    "all": (0, 0, None),
    "errors": (SCORED, HIT, None),
    "correct": (HIT, 0, None),
    "failed": (FAILED, 0, None),
    "unreviewed": (0, REVIEWED, None),
    "reviewed": (REVIEWED, 0, None),
    "edited": (EDITED, 0, None),
    "flagged": (FLAGGED, 0, None),
    "fixed": (HIT, 0, 0),
    "broken": (SCORED, HIT, 1),
}
NEEDS_ANSWERS = {"errors", "correct", "failed", "fixed", "broken"}
# Column to sort by, and whether its largest values come first unless asked otherwise.
SORTS = {"file": None, "confidence": "confidence", "cer": "cer", "length": "characters"}


@dataclass(frozen=True)
class Query:
    """Which rows, in which order.

    Attributes:
        text: that they hold, in the file or as corrected.
        show: of `SHOWN`.
        where: (field, value) pairs that hold.
        sort: of `SORTS`; rows without the value come last.
        descending: the largest first.
    """

    text: str = ""
    show: str = "all"
    where: tuple[tuple[str, str], ...] = ()
    sort: str = "file"
    descending: bool = False


class Desk:
    """What the server works on. All but indexing is done by one thread, so nothing is locked.

    Args:
        path: the file to review.
        log: its review log.
        other: a predictions file to compare it with.
    """

    def __init__(self, path: str | os.PathLike, log: ReviewLog, other: str | os.PathLike | None = None):
        self.index, self.log = RowIndex(path), log
        self.other = RowIndex(other) if other else None
        self.other_rows: np.ndarray = np.zeros(0, np.int32)  # by row: the other file's, or -1
        # The other file's (generation, rows), and its keys with the first row of each.
        self._other_keys: tuple[tuple[int, int], np.ndarray, np.ndarray] = ((0, 0), np.zeros(0), np.zeros(0))
        self.ready = False  # whether all was read that stood in the files at the start

    # Reading the files.

    async def begin(self) -> None:
        """Index the file's first rows."""
        self._take(self.index.add(await asyncio.to_thread(index_part, self.index.path, 0, FIRST_BYTES)))

    async def follow(self) -> None:
        """Index the rest, then what is added to the files, until cancelled."""
        while True:
            grown = False
            with contextlib.suppress(FileNotFoundError):  # another file is just taking its place: look again
                for index in filter(None, (self.other, self.index)):
                    grown |= await self._advance(index)
                self.ready = True
            await asyncio.sleep(0 if grown else POLL_SECONDS)

    async def _advance(self, index: RowIndex) -> bool:
        """Index what was added to a file; False if nothing was."""
        if index.replaced():
            index.restart()
            self._take(range(self.index.count))
        if index.size == index.end or index.size == index.looked_at:
            return False
        index.looked_at = index.size
        starts = await asyncio.to_thread(line_starts, index.path, index.end, index.size)
        jobs = list(itertools.pairwise(starts))
        async for part in run_jobs(functools.partial(index_part, index.path), jobs, len(jobs) >= MANY_PARTS):
            rows = index.add(part)
            if index is self.index:
                self._take(rows)
        if index is self.other:
            self._take(range(self.index.count))
        return True

    def _take(self, rows: range) -> None:
        self._match(rows)
        self._lay_over(rows)

    def _match(self, rows: range) -> None:
        """Find rows' counterparts in the other file."""
        if self.other is None:
            return
        other, ours = self.other.rows, self.index.rows[rows.start : rows.stop]
        if self._other_keys[0] != (state := (self.other.generation, self.other.count)):
            self._other_keys = (state, *np.unique(other["key"], return_index=True))
        _, keys, places = self._other_keys
        found: np.ndarray = np.full(len(ours), -1, np.int32)
        if len(keys):
            at = np.searchsorted(keys, ours["key"]).clip(max=len(keys) - 1)
            found = np.where(keys[at] == ours["key"], places[at], -1).astype(np.int32)
        self.other_rows = np.concatenate([self.other_rows[: rows.start], found])
        ours["other_hit"] = -1
        both = np.flatnonzero(found >= 0)
        theirs = other[found[both]]
        ours["other_hit"][both] = theirs["state"] & HIT > 0
        # Where the two files expect different answers, the other one's is held against ours.
        for k in both[theirs["expected"] != ours["expected"][both]]:
            ours["other_hit"][k] = self._other_hit(rows.start + int(k), self.index.read(rows.start + int(k)))

    def _other_hit(self, row: int, data: JsonObject) -> int:
        answered = self.read_other(row)
        if answered is None or not answers_of(data):
            return -1
        return int(is_hit(answered | {"expected": data["expected"]}))

    def _lay_over(self, rows: range) -> None:
        """Apply the log to new rows."""
        wanted = {identity_in(name) for name in self.log.reviews}
        identities = self.index.rows["identity"][rows.start : rows.stop]
        for k in np.flatnonzero(np.isin(identities, np.array(sorted(wanted), np.int64))):
            row = rows.start + int(k)
            if (review := self.review_of(row)).version:
                self._update(row, review)

    # Rows.

    def review_of(self, row: int) -> Review:
        """The review of a row."""
        return self.log.get(self.index.name_of(row))

    def read(self, row: int) -> JsonObject:
        """A row with its correction."""
        return self.review_of(row).apply(self.index.read(row))

    def read_other(self, row: int) -> JsonObject | None:
        """The other file's row of the same record."""
        if self.other is None or row >= len(self.other_rows) or self.other_rows[row] < 0:
            return None
        return self.other.read(int(self.other_rows[row]))

    def save(self, row: int, review: Review) -> Review:
        """Write a decision to the log (see `ReviewLog.save` for what it raises) and show it in the index."""
        data = self.index.read(row)
        about = {"line": int(self.index.rows["line"][row]), "id": data.get("id")}
        if review.expected in answers_of(data)[:1]:
            review = Review(review.version, None, review.reviewed, review.flagged)
        saved = self.log.save(self.index.name_of(row), about, review)
        self._update(row, saved)
        return saved

    def _update(self, row: int, review: Review) -> None:
        data = review.apply(self.index.read(row))
        state = REVIEWED * review.reviewed | EDITED * (review.expected is not None) | FLAGGED * review.flagged
        self.index.update(row, data, state, self._other_hit(row, data))

    # Lists.

    def select(self, query: Query) -> np.ndarray:
        """The numbers of the rows that a query asks for, in its order."""
        rows = self.index.rows
        wanted, unwanted, other_hit = SHOWN[query.show]
        mask = (rows["state"] & (wanted | unwanted)) == wanted
        if query.show in NEEDS_ANSWERS and not self.index.predicted:
            mask[:] = False
        if other_hit is not None:
            mask &= rows["other_hit"] == other_hit
        for name, value in query.where:
            column = self.index.columns.get(name)
            code = column.values.get(value) if column else None
            mask &= np.frombuffer(column.codes, np.intc) == code if column and code is not None else False
        if query.text.strip():
            mask &= self.index.search(query.text)
        found = np.flatnonzero(mask).astype(np.int32)
        if (measure := SORTS[query.sort]) is None:
            return found[::-1] if query.descending else found
        values = rows[measure][found].astype(np.float64)
        order = np.argsort(-values if query.descending else values, kind="stable")  # NaN is last in both
        return found[order]

    def find(self, name: str) -> int | None:
        """The row with an id, written as text."""
        for value in (name, *_numbers(name)):
            if len(found := np.flatnonzero(self.index.rows["key"] == key_of({"id": value}))):
                return int(found[0])
        return None


def _numbers(text: str) -> Iterable[int | float]:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            yield kind(text)


async def run_jobs(work: Callable[..., Result], jobs: list[tuple], elsewhere: bool) -> AsyncIterator[Result]:
    """The results of work(*job), in order.

    Args:
        elsewhere: in other processes, which leave this one free to answer; they take half a second to start.
    """
    if not elsewhere:
        for job in jobs:
            yield await asyncio.to_thread(work, *job)
        return
    with ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn"), prepare_worker
    ) as pool:
        results = deque(pool.submit(work, *job) for job in jobs)
        while results:
            yield await asyncio.wrap_future(results.popleft())  # kept no longer than needed


def prepare_worker() -> None:
    """Make a worker process leave Ctrl-C to its parent, and end when that is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # only the main process has none

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
