"""What all rows of a file come to, and what is wrong between them."""

import collections
import itertools
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.validation.checker import (
    DUPLICATE,
    EMPTY_FILE,
    LEAK,
    MIXED,
    SAME_ID,
    CheckedRow,
    Kind,
    Place,
    Problem,
    Source,
)


class Tally:
    """What all rows come to. `add` returns what is wrong with a row, `compare_rows` what is wrong between rows.

    Args:
        sources: the files, in the order in which their rows are added.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.counts: collections.Counter[Kind] = collections.Counter()
        self.rows = self.bad_rows = 0
        # Row after row:
        self._file, self._line = array("H"), array("I")
        self._record_key, self._id_key = array("Q"), array("Q")
        self._tokens = array("I")  # three numbers a row
        # Page after page:
        self._page_key, self._page_row, self._page_size = array("Q"), array("I"), array("I")
        # Answers that are JSON objects or not: how many, and the first one's row.
        self._formats: dict[bool, list[int]] = {}

    def add(self, checked: CheckedRow) -> list[Problem]:
        """Count a row; returns its problems."""
        found, row = checked.found, self.rows
        self.rows += 1
        self.bad_rows += any(problem.kind.fatal for problem in found.problems)
        self._file.append(self.sources.index(checked.source))
        self._line.append(checked.line)
        self._record_key.append(found.record_key)
        self._id_key.append(found.id_key)
        self._tokens.extend(found.tokens or (0, 0, 0))
        for page in found.pages:
            self._page_key.append(page.key)
            self._page_row.append(row)
            self._page_size.extend((page.width, page.height))
        if found.answer_is_object is not None:
            self._formats.setdefault(found.answer_is_object, [0, row])[0] += 1
        self.counts.update(problem.kind for problem in found.problems)
        return found.problems

    def compare_rows(self) -> Iterator[tuple[Place, Problem]]:
        """Yield (place, problem) for everything that is wrong between rows or with a whole file."""
        for place, problem in itertools.chain(
            self._empty_files(), self._repeated(), self._leaks(), self._mixed_formats()
        ):
            self.counts[problem.kind] += 1
            yield place, problem

    def place(self, row: int) -> Place:
        """Where a row stands, which is counted from 0."""
        return Place(str(self.sources[self._file[row]].path), self._line[row])

    def lengths(self) -> array:
        """Tokens of the rows to train."""
        sums = self.tokens.sum(1, dtype=np.uint32)
        return array("I", sums[(sums > 0) & ~self._is_eval()].tobytes())

    def longest(self, count: int = 5) -> list[tuple[Place, int]]:
        """(Place, tokens) of the longest rows."""
        sums = self.tokens.sum(1)
        rows = np.argsort(-sums.astype(np.int64), kind="stable")[:count]
        return [(self.place(row), int(sums[row])) for row in rows if sums[row]]

    @property
    def tokens(self) -> np.ndarray:
        """Of each row, (prompt without images, images, answer); zeros where they were not counted."""
        return np.frombuffer(self._tokens, np.uint32).reshape(-1, 3)

    @property
    def page_sizes(self) -> np.ndarray:
        """Of each page that could be opened, (width, height) in pixels."""
        return np.frombuffer(self._page_size, np.uint32).reshape(-1, 2)

    @property
    def pages_per_row(self) -> np.ndarray:
        """How many pages each row has that could be opened."""
        return np.bincount(np.frombuffer(self._page_row, np.uint32), minlength=self.rows)

    def _is_eval(self) -> np.ndarray:
        return np.array([source.is_eval for source in self.sources])[np.frombuffer(self._file, np.uint16)]

    def _empty_files(self) -> Iterator[tuple[Place, Problem]]:
        found = set(self._file)
        for number, source in enumerate(self.sources):
            if number not in found:
                yield (
                    Place(str(source.path), 0),
                    Problem(EMPTY_FILE, "holds no record; expected one JSON object per line"),
                )

    def _repeated(self) -> Iterator[tuple[Place, Problem]]:
        if not self.rows:
            return
        # What is in training and --eval both is a leak, not a duplicate.
        keys = np.frombuffer(self._record_key, np.uint64)
        for part in sorted({source.is_eval for source in self.sources}):
            for later, first in _pairs(np.where(self._is_eval() == part, keys, np.uint64(0))):
                yield self.place(later), Problem(DUPLICATE, f"the same record as {self.place(first)}; remove one")
        for later, first in _pairs(np.frombuffer(self._id_key, np.uint64)):
            yield self.place(later), Problem(SAME_ID, f"the id of line {self._line[first]} again; ids must differ")

    def _leaks(self) -> Iterator[tuple[Place, Problem]]:
        if not self.rows:
            return
        is_eval, rows = self._is_eval(), np.arange(self.rows, dtype=np.uint32)
        leaks = _seen(np.frombuffer(self._record_key, np.uint64), rows, is_eval)
        page_rows = np.frombuffer(self._page_row, np.uint32)
        pages = _seen(np.frombuffer(self._page_key, np.uint64), page_rows, is_eval[page_rows])
        for row in sorted(leaks.keys() | pages.keys()):
            what, first = ("its record", leaks[row]) if row in leaks else ("a page of it", pages[row])
            yield self.place(row), Problem(LEAK, f"{what} is in training too, at {self.place(first)}; remove one")

    def _mixed_formats(self) -> Iterator[tuple[Place, Problem]]:
        if len(self._formats) == 2:
            (objects, first_object), (others, first_other) = self._formats[True], self._formats[False]
            place = self.place(first_object if objects < others else first_other)
            text = f"{objects} answers are JSON objects, {others} are not; this is the first of the fewer"
            yield place, Problem(MIXED, text)

    @property
    def images(self) -> int:
        """Images that could be opened, each counted as often as rows show it."""
        return len(self._page_key)

    @property
    def fatal(self) -> int:
        """Problems that train refuses."""
        return sum(count for kind, count in self.counts.items() if kind.fatal)

    def summary(self, fitter: ImageFitter | None) -> Iterator[str]:
        """Lines for people: rows, images, and with a model tokens, the longest rows and the size pages are fed at."""
        yield f"{self.rows:,} rows, {self.images:,} images"
        tokens = self.tokens
        counted = np.flatnonzero(tokens[:, 0])
        if len(counted):
            yield f"{'tokens':8}{'min':>9}{'median':>9}{'95 %':>9}{'max':>9}"
            for name, column in zip(("prompt", "images", "answer"), tokens.T, strict=True):
                figures = np.percentile(column[counted], (0, 50, 95, 100), method="nearest")
                yield f"{name:8}" + "".join(f"{figure:9,}" for figure in figures)
            yield "The longest rows: " + ", ".join(f"{place} ({count:,})" for place, count in self.longest())
        if fitter and self.images:
            sizes = self.page_sizes
            order = np.argsort(sizes.prod(1, dtype=np.uint64), kind="stable")
            named = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
            for name, (width, height) in ((name, map(int, sizes[page])) for name, page in named.items()):
                rows, columns = fitter.grid(width, height)
                cell = fitter.cell_size
                yield f"The {name} page: {width} × {height} px, fed as {columns * cell} × {rows * cell}"

    def verdict(self) -> Iterator[str]:
        """Lines for people: how often each kind of problem was found, fatal ones first."""
        yield (
            f"{self.fatal:,} fatal problems in {self.bad_rows:,} of {self.rows:,} rows, "
            f"{self.counts.total() - self.fatal:,} warnings"
        )
        for kind, count in sorted(self.counts.items(), key=lambda item: (not item[0].fatal, -item[1])):
            yield f"  {'fatal' if kind.fatal else 'warning':7} {count:9,}  {kind.name}"


def _pairs(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place, place of the first) of every key but 0 that came before, in order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)) + 1
    first = order[np.searchsorted(ordered, ordered[again])]
    later = order[again]
    for k in np.argsort(later):
        yield int(later[k]), int(first[k])


def _seen(keys: np.ndarray, rows: np.ndarray, is_eval: np.ndarray) -> dict[int, int]:
    """Row of --eval to the first row of training that has one of its keys; 0 is no key."""
    asked = np.flatnonzero(is_eval & (keys != 0))
    if not len(asked) or is_eval.all():
        return {}
    known, first = np.unique(keys[~is_eval], return_index=True)
    places = np.searchsorted(known, keys[asked]).clip(max=len(known) - 1)
    found = known[places] == keys[asked]
    train_rows = rows[~is_eval][first[places[found]]]
    # Backwards, so that the first of a row's pages stays.
    return dict(zip(rows[asked[found]].tolist()[::-1], train_rows.tolist()[::-1], strict=True))
