"""Checks of whole data files, row by row in worker processes: every line, every image, every token.

What the main process keeps of a row are a few numbers in arrays, below 100 bytes with what sorting them takes, so
files may have millions of rows.
"""

import collections
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_ft.data.conversation import thinking_text
from mistral_ft.data.formats import as_record
from mistral_ft.data.image_fitter import TEXT_ONLY, ImageFitter
from mistral_ft.data.pages import fingerprint, open_image, page_size
from mistral_ft.data.prompt.encoder import (
    CONTROL_TOKEN_NAMES,
    IGNORE_INDEX,
    PromptEncoder,
    encode_record,
    length_problem,
    split_at,
)
from mistral_ft.data.records import MAX_NEW_TOKENS, Record, check_record, how_to_convert, image_blocks
from mistral_ft.data.references import is_data_url, resolve, split_page
from mistral_ft.data.rows import RowSource, parse_line
from mistral_ft.errors import UserError
from mistral_ft.progress import Progress

MOST_EXAMPLES = 10  # of each kind of problem, for the report
CHUNK = 16  # lines that a worker gets at a time
LOOK_ALIKE = re.compile("|".join(map(re.escape, CONTROL_TOKEN_NAMES)))

# An A3 page scanned at 300 dpi, 4961 px long, is shrunk 3.2 times: 8-point print, 33 px high there, keeps 10 px.
MOST_SHRUNK = 3
SMALLEST_SIDE = 28  # pixels of one image token: a page that is less high holds no line of print that can be read


class Kind(NamedTuple):
    """A sort of problem, as the count at the end names it; a fatal one is what train refuses."""

    name: str
    fatal: bool = True


EMPTY_FILE = Kind("files without a record")
LINE = Kind("lines that are no JSON object")
RECORD = Kind("records of a wrong shape")
IMAGE = Kind("images that cannot be used")
LENGTH = Kind("records that are too long")
EMPTY_ANSWER = Kind("empty answers", fatal=False)
LONG_ANSWER = Kind("very long answers", fatal=False)
ROUND_TRIP = Kind("answers that the tokenizer does not give back", fatal=False)
BROKEN_JSON = Kind("answers that are broken JSON", fatal=False)
MIXED = Kind("answers of mixed formats", fatal=False)
CONTROL = Kind("texts that look like control tokens", fatal=False)
OUTSIDE = Kind("images outside of their folder", fatal=False)
SMALL = Kind("pages too small to read", fatal=False)
SHRUNK = Kind("pages that lose small print", fatal=False)
DUPLICATE = Kind("duplicate records", fatal=False)
SAME_ID = Kind("ids used twice", fatal=False)
LEAK = Kind("rows of --eval that training has seen", fatal=False)


class Problem(NamedTuple):
    """One thing that is wrong with one row."""

    kind: Kind
    text: str


class Source(NamedTuple):
    """A file to check: where it is, where its images are, and whether it is kept from training."""

    path: Path
    images_dir: Path
    is_eval: bool


class Page(NamedTuple):
    """An image of a row: 64 bits of its fingerprint, and its size in pixels."""

    key: int
    width: int
    height: int


class Checked(NamedTuple):
    """What a worker found out about a row; keys are 64-bit hashes, 0 for none. `record_key` is 0 for a bad record."""

    problems: list[Problem]
    record_key: int = 0
    id_key: int = 0
    answer_is_object: bool | None = None
    pages: list[Page] = []  # noqa: RUF012 - never changed
    tokens: tuple[int, int, int] | None = None  # prompt without images, images, answer


class RowChecker:
    """Checks rows one by one; each worker process has its own.

    Args:
        encoder, fitter: of the model to train; without them nothing is said about tokens and the size pages are fed at.
            A model that reads text only has no fitter.
        max_seq_length: tokens that a record may have.
    """

    def __init__(
        self, encoder: PromptEncoder | None = None, fitter: ImageFitter | None = None, max_seq_length: int = 0
    ):
        self.encoder, self.fitter, self.max_seq_length = encoder, fitter, max_seq_length
        # Rows that ask about the same page mostly stand together.
        self._open = functools.lru_cache(1024)(self._open_page)

    @classmethod
    def from_folders(cls, prompt: Path, pages: Path, max_seq_length: int) -> "RowChecker":
        """A checker for a model's tokenizer and page settings; raises UserError if they cannot be used."""
        return cls(PromptEncoder.from_folder(prompt), ImageFitter.from_folder(pages), max_seq_length)

    def check(self, raw: bytes, line: int, source: Source) -> Checked | None:
        """Everything about one line of a file; None if it is blank."""
        try:
            data = parse_line(raw, first=line == 1)
        except ValueError as error:
            return Checked([Problem(LINE, str(error))])
        if data is None:
            return None
        try:
            data = as_record(data)
            check_record(data, expected_required=not source.is_eval)
        except ValueError as error:
            return Checked([Problem(RECORD, f"{error}{how_to_convert(source.path, data)}")])
        try:
            return self._check_record(Record(source.path, line, data, source.images_dir), source)
        except ValueError as error:
            return Checked([Problem(RECORD, str(error))])
        except RecursionError:  # deep enough to be read, too deep to be written
            return Checked([Problem(LINE, "nested too deeply to be read")])

    def _check_record(self, record: Record, source: Source) -> Checked:
        data, messages, expected = record.data, record.conversation, record.expected
        problems = _check_texts([*messages, {"content": record.text}])
        answer_is_object = None
        if expected is not None:
            answer_is_object, found = _check_answer(expected)
            problems += found

        pages, grids = [], []
        names = image_blocks(messages)
        for name in names:
            found, page = self._check_page(name, source.images_dir)
            problems += found
            if page:
                pages.append(page)
                grids += [self.fitter.grid(page.width, page.height)] if self.fitter else []
        tokens = None
        if self.encoder and names and not self.fitter:
            raise ValueError(TEXT_ONLY)
        if self.encoder and len(grids) == len(names):
            found, tokens = self._check_tokens(record, grids)
            problems += found

        same = [messages, record.text, data.get("tools")]
        return Checked(
            problems,
            # Paths mean the same page only in the same folder.
            record_key=_key(json.dumps(same, sort_keys=True) + (str(source.images_dir.resolve()) if names else "")),
            # score tells rows of one file apart by their id.
            id_key=0 if data.get("id") is None else _key(f"{source.path} {json.dumps(data['id'], sort_keys=True)}"),
            answer_is_object=answer_is_object,
            pages=pages,
            tokens=tokens,
        )

    def _check_page(self, name: str, folder: Path) -> tuple[list[Problem], Page | None]:
        problems = []
        path = Path(split_page(name)[0])
        if not is_data_url(name) and (path.is_absolute() or ".." in path.parts):
            problems.append(Problem(OUTSIDE, f"image {name} is not below {folder}: copy it there, to keep data in one"))
        # Images within the rows come once, and would fill the memory.
        page = (self._open_page if is_data_url(name) else self._open)(resolve(name, folder))
        if isinstance(page, str):
            return [*problems, Problem(IMAGE, page)], None
        size = f"image {name[:200]} of {page.width} × {page.height} px"
        if min(page.width, page.height) < SMALLEST_SIDE:
            problems.append(Problem(SMALL, f"{size} is too small to read; scan it at a higher resolution"))
        if self.fitter:
            try:
                self.fitter.grid(page.width, page.height)
            except ValueError as error:
                return [*problems, Problem(IMAGE, f"{size}: {error}")], None
            factor = max(page.width, page.height) / self.fitter.longest_edge
            if factor > MOST_SHRUNK:
                problems.append(Problem(SHRUNK, f"{size} is shrunk {factor:.1f} times; cut it into parts"))
        return problems, page

    def _open_page(self, reference: str) -> Page | str:
        """The page, opened and decoded as train does; or why that cannot be done."""
        try:
            open_image(reference, self.fitter)
            return Page(int(fingerprint(reference)[:16], 16), *page_size(reference, self.fitter))
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"image {reference} cannot be opened: {error.strerror}"

    def _check_tokens(self, record: Record, grids: list[tuple[int, int]]) -> tuple[list[Problem], tuple[int, int, int]]:
        problems = []
        ids, labels = encode_record(self.encoder, record, grids, with_answer=True)
        answer = [label for label in labels if label != IGNORE_INDEX]
        image_tokens = sum(rows * (columns + 1) for rows, columns in grids)
        # Plain text is no problem: train cuts it into pieces.
        problem = length_problem(len(ids), image_tokens, len(grids), self.max_seq_length)
        if problem and record.text is None:
            problems.append(Problem(LENGTH, problem))
        learned = split_at(answer, self.encoder.control.eos)[:-1]  # each answer ends with it
        if record.text is None and learned and (length := len(learned[-1]) + 1) > MAX_NEW_TOKENS:
            text = f"the answer has {length:,} tokens; predict needs --max_new_tokens {length} or more for it"
            problems.append(Problem(LONG_ANSWER, text))
        for part, text in zip(learned, record.learned, strict=True):
            if (back := self.encoder.decode_thinking(part) + self.encoder.decode(part)) != text:
                place = next((k for k, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), len(back))
                found = f"the answer comes back from the tokenizer as {back[place : place + 20]!r} at character"
                problems.append(Problem(ROUND_TRIP, f"{found} {place + 1}, not as {text[place : place + 20]!r}"))
        return problems, (len(ids) - image_tokens - len(answer), image_tokens, len(answer))


def _check_texts(messages: Sequence[dict[str, Any]]) -> list[Problem]:
    texts = []
    for message in messages:
        content = message.get("content") or ""
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            texts.append(thinking_text(block) if block["type"] == "thinking" else block.get("text") or "")
    found = sorted({name for text in texts for name in LOOK_ALIKE.findall(text)})
    if not found:
        return []
    remedy = 'write blocks of type "thinking"' if "[THINK]" in found else "remove it if it is no text"
    return [Problem(CONTROL, f"{', '.join(found)} in a text is learned letter by letter; {remedy}")]


def _check_answer(expected: str) -> tuple[bool, list[Problem]]:
    """Whether an answer is a JSON object, and what is wrong with it."""
    if not expected.strip():
        return False, [Problem(EMPTY_ANSWER, "`expected` is empty: the model learns to say nothing")]
    if not expected.lstrip().startswith("{"):
        return False, []
    try:
        return isinstance(json.loads(expected), dict), []
    except (ValueError, RecursionError) as error:
        return False, [Problem(BROKEN_JSON, f"`expected` starts like a JSON object and is none: {error}")]


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1


_checker: RowChecker  # a worker's own


def _start_worker(folders: tuple[Path, Path] | None, max_seq_length: int) -> None:
    global _checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    warnings.simplefilter("ignore")  # Pillow's, which name no file
    _checker = RowChecker.from_folders(*folders, max_seq_length) if folders else RowChecker()


def _check_lines(source: Source, lines: list[tuple[int, bytes]]) -> list[Checked | None]:
    return [_checker.check(raw, line, source) for line, raw in lines]


def check_files(
    sources: Sequence[Source], folders: tuple[Path, Path] | None, max_seq_length: int
) -> Iterator[tuple[Source, int, bytes, Checked]]:
    """Check files in parallel, with a progress bar.

    Args:
        folders: of a model, as for `RowChecker.from_folders`; None leaves out tokens and the size pages are fed at.

    Yields:
        For every line that is not blank, in order: its file, its number from 1, the line itself, what was found.

    Raises:
        UserError: if a file cannot be read.
    """
    read = [RowSource(source.path, source.images_dir) for source in sources]
    progress = Progress("checking", sum(rows.count() for rows in read), "row")
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # a forked process that had threads can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (folders, max_seq_length))
    window = collections.deque()

    def take() -> Iterator[tuple[Source, int, bytes, Checked]]:
        source, lines, future = window.popleft()
        for (line, raw), checked in zip(lines, future.result(), strict=True):
            if checked is not None:
                yield source, line, raw, checked
        progress.update(len(lines))

    try:
        for source, rows in zip(sources, map(iter, read), strict=True):
            while lines := list(itertools.islice(rows, CHUNK)):
                window.append((source, lines, pool.submit(_check_lines, source, lines)))
                if len(window) > 8 * workers:  # a little ahead, so that memory does not grow with the file
                    yield from take()
        while window:
            yield from take()
    except BrokenProcessPool:
        raise UserError("a worker process was killed; is the memory too small for a page?") from None
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


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

    def add(self, source: Source, line: int, checked: Checked) -> list[Problem]:
        """Count a row; returns its problems."""
        row = self.rows
        self.rows += 1
        self.bad_rows += any(problem.kind.fatal for problem in checked.problems)
        self._file.append(self.sources.index(source))
        self._line.append(line)
        self._record_key.append(checked.record_key)
        self._id_key.append(checked.id_key)
        self._tokens.extend(checked.tokens or (0, 0, 0))
        for page in checked.pages:
            self._page_key.append(page.key)
            self._page_row.append(row)
            self._page_size.extend((page.width, page.height))
        if checked.answer_is_object is not None:
            self._formats.setdefault(checked.answer_is_object, [0, row])[0] += 1
        self.counts.update(problem.kind for problem in checked.problems)
        return checked.problems

    def compare_rows(self) -> Iterator[tuple[str, Problem]]:
        """Yield (place, problem) for everything that is wrong between rows or with a whole file."""
        for place, problem in itertools.chain(
            self._empty_files(), self._repeated(), self._leaks(), self._mixed_formats()
        ):
            self.counts[problem.kind] += 1
            yield place, problem

    def place(self, row: int) -> str:
        """`file:line` of a row, counted from 0."""
        return f"{self.sources[self._file[row]].path}:{self._line[row]}"

    def lengths(self) -> array:
        """Tokens of the rows to train."""
        sums = self.tokens.sum(1, dtype=np.uint32)
        return array("I", sums[(sums > 0) & ~self._is_eval()].tobytes())

    def longest(self, count: int = 5) -> list[tuple[str, int]]:
        """(Place, tokens) of the longest rows."""
        sums = self.tokens.sum(1)
        rows = np.argsort(-sums.astype(np.int64), kind="stable")[:count]
        return [(self.place(row), int(sums[row])) for row in rows if sums[row]]

    @property
    def tokens(self) -> np.ndarray:
        """Of each row, (prompt without images, images, answer); zeros where they were not counted."""
        return np.frombuffer(self._tokens, np.uint32).reshape(-1, 3)

    def _is_eval(self) -> np.ndarray:
        return np.array([source.is_eval for source in self.sources])[np.frombuffer(self._file, np.uint16)]

    def _empty_files(self) -> Iterator[tuple[str, Problem]]:
        found = set(self._file)
        for number, source in enumerate(self.sources):
            if number not in found:
                yield str(source.path), Problem(EMPTY_FILE, "holds no record; expected one JSON object per line")

    def _repeated(self) -> Iterator[tuple[str, Problem]]:
        if not self.rows:
            return
        # What is in training and --eval both is a leak, not a duplicate.
        keys = np.frombuffer(self._record_key, np.uint64)
        for part in sorted({source.is_eval for source in self.sources}):
            for later, first in _pairs(np.where(self._is_eval() == part, keys, np.uint64(0))):
                yield self.place(later), Problem(DUPLICATE, f"the same record as {self.place(first)}; remove one")
        for later, first in _pairs(np.frombuffer(self._id_key, np.uint64)):
            yield self.place(later), Problem(SAME_ID, f"the id of line {self._line[first]} again; ids must differ")

    def _leaks(self) -> Iterator[tuple[str, Problem]]:
        if not self.rows:
            return
        is_eval, rows = self._is_eval(), np.arange(self.rows, dtype=np.uint32)
        leaks = _seen(np.frombuffer(self._record_key, np.uint64), rows, is_eval)
        page_rows = np.frombuffer(self._page_row, np.uint32)
        pages = _seen(np.frombuffer(self._page_key, np.uint64), page_rows, is_eval[page_rows])
        for row in sorted(leaks.keys() | pages.keys()):
            what, first = ("its record", leaks[row]) if row in leaks else ("a page of it", pages[row])
            yield self.place(row), Problem(LEAK, f"{what} is in training too, at {self.place(first)}; remove one")

    def _mixed_formats(self) -> Iterator[tuple[str, Problem]]:
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
            sizes = np.frombuffer(self._page_size, np.uint32).reshape(-1, 2)
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


class Examples:
    """The first problems of each kind, with their places."""

    def __init__(self):
        self.found: dict[Kind, list[tuple[str, Problem]]] = collections.defaultdict(list)

    def add(self, place: str, problem: Problem) -> None:
        if len(self.found[problem.kind]) < MOST_EXAMPLES:
            self.found[problem.kind].append((place, problem))


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


def mark_trained(encoder: PromptEncoder, fitter: ImageFitter, raw: bytes, source: Source) -> str:
    """A good row as the model reads it, each trained token between ⟦ and ⟧, each image as [IMG]×tokens."""
    record = Record(source.path, 1, as_record(parse_line(raw, first=True)), source.images_dir)
    grids = [fitter.grid(*page_size(path, fitter)) for path in record.image_paths]
    ids, labels = encode_record(encoder, record, grids, with_answer=True)
    control = vars(encoder.control)
    image_ids = {control["image"], control["image_break"], control["image_end"]}

    def kind_of(place: int) -> str:
        if labels[place] != IGNORE_INDEX:
            return "trained"
        return "image" if ids[place] in image_ids else "control" if ids[place] in control.values() else "text"

    shown = ""
    for kind, places in itertools.groupby(range(len(ids)), kind_of):
        part = [ids[place] for place in places]
        if kind == "text":
            shown += encoder.decode(part)
        elif kind == "image":
            shown += f"[IMG]×{len(part)}"
        else:
            names = [encoder.tokenizer.id_to_token(i) if i in control.values() else encoder.decode([i]) for i in part]
            shown += "".join(f"⟦{name}⟧" if kind == "trained" else name for name in names)
    return shown


def describe(place: str, problem: Problem) -> str:
    """A problem on one line of at most 500 characters, without those that act on a terminal."""
    text = f"{place}: {'' if problem.kind.fatal else 'warning: '}{problem.text}"
    return "".join(c if c.isprintable() else " " for c in (text if len(text) <= 500 else f"{text[:499]}…"))
