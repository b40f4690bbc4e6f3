"""Checks of whole data files, row by row in worker processes: every line, every image, every token.

What the main process keeps of a row are a few numbers in arrays, below 100 bytes with what sorting them takes, so
files may have millions of rows.
"""

import functools
import itertools
import multiprocessing
import os
import re
import signal
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from mistral_ft.data.conversation import thinking_text
from mistral_ft.data.formats import as_record
from mistral_ft.data.image_fitter import TEXT_ONLY
from mistral_ft.data.json_fields import read_json
from mistral_ft.data.pages import fingerprint, open_image, page_size
from mistral_ft.data.processor import Processor
from mistral_ft.data.prompt.encoder import (
    CONTROL_TOKEN_NAMES,
    IGNORE_INDEX,
    PromptEncoder,
    encode_record,
    length_problem,
    split_at,
)
from mistral_ft.data.prompt.token_view import mark_learned
from mistral_ft.data.records import MAX_NEW_TOKENS, Record, check_record, how_to_convert, image_blocks
from mistral_ft.data.references import is_data_url, resolve, split_page
from mistral_ft.data.row_keys import hash_json
from mistral_ft.data.rows import RowSource, parse_line
from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject
from mistral_ft.progress import Progress

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
REPEATED = Kind("keys that stand twice in an object", fatal=False)
CONTROL = Kind("texts that look like control tokens", fatal=False)
OUTSIDE = Kind("images outside of their folder", fatal=False)
SMALL = Kind("pages too small to read", fatal=False)
SHRUNK = Kind("pages that lose small print", fatal=False)
DENSITY = Kind("pages whose pixels are not square", fatal=False)
DUPLICATE = Kind("duplicate records", fatal=False)
SAME_ID = Kind("ids used twice", fatal=False)
LEAK = Kind("rows of --eval that training has seen", fatal=False)


class Problem(NamedTuple):
    """One thing that is wrong with one row; `name` is what in the text is the row's own, if it stands in no quotes."""

    kind: Kind
    text: str
    name: str = ""


class Place(NamedTuple):
    """A line of a file, counted from 1; 0 for all of it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Source(NamedTuple):
    """A file to check: where it is, where its images are, and whether it is kept from training."""

    path: Path
    images_dir: Path
    is_eval: bool


class Page(NamedTuple):
    """An image of a row: 64 bits of its fingerprint, its size in pixels, and what is unusual about their shape."""

    key: int
    width: int
    height: int
    density: str | None = None


class Tokens(NamedTuple):
    """How many tokens a row has."""

    prompt: int  # without images
    images: int
    answer: int


class Checked(NamedTuple):
    """What a worker found out about a row; keys are 64-bit hashes, 0 for none. `record_key` is 0 for a bad record."""

    problems: list[Problem]
    record_key: int = 0
    id_key: int = 0
    answer_is_object: bool | None = None
    pages: list[Page] = []  # noqa: RUF012 - never changed
    tokens: Tokens | None = None


class CheckedRow(NamedTuple):
    """A line of a file that is not blank, and what was found."""

    source: Source
    line: int  # from 1
    raw: bytes
    found: Checked

    @property
    def place(self) -> Place:
        return Place(str(self.source.path), self.line)


class RowChecker:
    """Checks rows one by one; each worker process has its own.

    Args:
        processor: of the model to train; without one nothing is said about tokens and the size pages are fed at.
        max_seq_length: tokens that a record may have.
    """

    def __init__(self, processor: Processor | None = None, max_seq_length: int = 0):
        self.encoder = processor.encoder if processor else None
        self.fitter = processor.fitter if processor else None
        self.max_seq_length = max_seq_length
        # Rows that ask about the same page mostly stand together.
        self._open = functools.lru_cache(1024)(self._open_page)

    def check(self, raw: bytes, line: int, source: Source) -> Checked | None:
        """Everything about one line of a file; None if it is blank."""
        repeated: list[str] = []
        try:
            data = parse_line(raw, line == 1, source.path, repeated)
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
            found = self._check_record(Record(source.path, line, data, source.images_dir), source)
        except ValueError as error:
            return Checked([Problem(RECORD, str(error))])
        except RecursionError:  # deep enough to be read, too deep to be written
            return Checked([Problem(LINE, "nested too deeply to be read")])
        if repeated:
            text = f"`{repeated[0]}` stands twice in an object, and only the last is read; remove one"
            return found._replace(problems=[*found.problems, Problem(REPEATED, text)])
        return found

    def _check_record(self, record: Record, source: Source) -> Checked:
        data, messages = record.data, record.conversation
        problems = _check_texts([*messages, {"content": record.text}])
        of_answers = [_check_answer(answer, number) for number, answer in enumerate(record.answers, 1)]
        problems += [problem for _, found in of_answers for problem in found]
        answer_is_object = of_answers[0][0] if of_answers else None

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
            found, tokens = self._check_tokens(self.encoder, record, grids)
            problems += found

        same = [messages, record.text, data.get("tools")]
        return Checked(
            problems,
            # Paths mean the same page only in the same folder.
            record_key=_key([same, str(source.images_dir.resolve()) if names else ""]),
            # score tells rows of one file apart by their id.
            id_key=0 if data.get("id") is None else _key([str(source.path), data["id"]]),
            answer_is_object=answer_is_object,
            pages=pages,
            tokens=tokens,
        )

    def _check_page(self, name: str, folder: Path) -> tuple[list[Problem], Page | None]:
        problems = []
        path = Path(split_page(name)[0])
        if not is_data_url(name) and (path.is_absolute() or ".." in path.parts):
            text = f"image {name} is not below {folder}: copy it there, to keep data in one"
            problems.append(Problem(OUTSIDE, text, name))
        # Images within the rows come once, and would fill the memory.
        reference, name = resolve(name, folder), name[:200]
        page = (self._open_page if is_data_url(name) else self._open)(reference)
        if isinstance(page, str):
            return [*problems, Problem(IMAGE, page, reference[:300])], None
        size = f"image {name} of {page.width} × {page.height} px"
        if min(page.width, page.height) < SMALLEST_SIDE:
            problems.append(Problem(SMALL, f"{size} is too small to read; scan it at a higher resolution", name))
        if page.density:
            problems.append(Problem(DENSITY, f"image {name} of {page.density}", name))
        if self.fitter:
            try:
                self.fitter.grid(page.width, page.height)
            except ValueError as error:
                return [*problems, Problem(IMAGE, f"{size}: {error}", name)], None
            factor = max(page.width, page.height) / self.fitter.longest_edge
            if factor > MOST_SHRUNK:
                problems.append(Problem(SHRUNK, f"{size} is shrunk {factor:.1f} times; cut it into parts", name))
        return problems, page

    def _open_page(self, reference: str) -> Page | str:
        """The page, opened and decoded as train does; or why that cannot be done."""
        try:
            density = open_image(reference, self.fitter).info.get("density")
            return Page(int(fingerprint(reference)[:16], 16), *page_size(reference, self.fitter), density)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"image {reference} cannot be opened: {error.strerror}"

    def _check_tokens(
        self, encoder: PromptEncoder, record: Record, grids: list[tuple[int, int]]
    ) -> tuple[list[Problem], Tokens]:
        problems = []
        ids, labels = encode_record(encoder, record, grids, with_answer=True)
        answer = [label for label in labels if label != IGNORE_INDEX]
        image_tokens = sum(rows * (columns + 1) for rows, columns in grids)
        # Plain text is no problem: train cuts it into pieces.
        problem = length_problem(len(ids), image_tokens, len(grids), self.max_seq_length)
        if problem and record.text is None:
            problems.append(Problem(LENGTH, problem))
        learned = split_at(answer, encoder.control.eos)[:-1]  # each answer ends with it
        if record.text is None and learned and (length := len(learned[-1]) + 1) > MAX_NEW_TOKENS:
            text = f"the answer has {length:,} tokens; predict needs --max_new_tokens {length} or more for it"
            problems.append(Problem(LONG_ANSWER, text))
        for part, text in zip(learned, record.learned, strict=True):
            if (back := encoder.decode_thinking(part) + encoder.decode(part)) != text:
                place = next((k for k, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), len(back))
                found = f"the answer comes back from the tokenizer as {back[place : place + 20]!r} at character"
                problems.append(Problem(ROUND_TRIP, f"{found} {place + 1}, not as {text[place : place + 20]!r}"))
        return problems, Tokens(len(ids) - image_tokens - len(answer), image_tokens, len(answer))


def texts_of(messages: Sequence[JsonObject]) -> list[str]:
    """Every text in checked messages, thinking too."""
    texts = []
    for message in messages:
        content = message.get("content") or ""
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            texts.append(thinking_text(block) if block["type"] == "thinking" else block.get("text") or "")
    return texts


def _check_texts(messages: Sequence[JsonObject]) -> list[Problem]:
    found = sorted({name for text in texts_of(messages) for name in LOOK_ALIKE.findall(text)})
    if not found:
        return []
    remedy = 'write blocks of type "thinking"' if "[THINK]" in found else "remove it if it is no text"
    return [Problem(CONTROL, f"{', '.join(found)} in a text is learned letter by letter; {remedy}")]


def _check_answer(answer: str, number: int) -> tuple[bool, list[Problem]]:
    """Whether a right answer, the first of which is learned, is a JSON object, and what is wrong with it."""
    name = "`expected`" if number == 1 else f"answer {number} in `expected`"
    if not answer.strip():
        then = "the model learns to say nothing" if number == 1 else "saying nothing counts as right"
        return False, [Problem(EMPTY_ANSWER, f"{name} is empty: {then}")]
    if not answer.lstrip().startswith("{"):
        return False, []
    try:
        return isinstance(read_json(answer), dict), []
    except ValueError as error:
        return False, [Problem(BROKEN_JSON, f"{name} starts like a JSON object and is none: {error}")]


def _key(value: Json) -> int:
    return hash_json(value) & (1 << 64) - 1 or 1


_checker: RowChecker  # a worker's own


def _start_worker(model: str | None, max_seq_length: int) -> None:
    global _checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    warnings.simplefilter("ignore")  # Pillow's, which name no file
    _checker = RowChecker(Processor.from_model(model) if model else None, max_seq_length)


def _check_lines(source: Source, lines: list[tuple[int, bytes]]) -> list[Checked | None]:
    return [_checker.check(raw, line, source) for line, raw in lines]


def check_files(sources: Sequence[Source], model: str | None, max_seq_length: int) -> Generator[CheckedRow, None, None]:
    """Check files in parallel, with a progress bar.

    Args:
        model: as for `Processor.from_model`; None leaves out tokens and the size pages are fed at.

    Yields:
        Every line that is not blank, in order.

    Raises:
        UserError: if a file cannot be read.
    """
    read = [RowSource(source.path, source.images_dir) for source in sources]
    progress = Progress("checking", sum(rows.count() for rows in read), "row")
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # a forked process that had threads can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, max_seq_length))
    window: deque[tuple[Source, list[tuple[int, bytes]], Future[list[Checked | None]]]] = deque()

    def take() -> Iterator[CheckedRow]:
        source, lines, future = window.popleft()
        for (line, raw), checked in zip(lines, future.result(), strict=True):
            if checked is not None:
                yield CheckedRow(source, line, raw, checked)
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


def mark_trained(processor: Processor, row: CheckedRow) -> str:
    """A good row as `mark_learned` shows it."""
    data = parse_line(row.raw, first=row.line == 1)
    assert data is not None  # it was checked
    record = Record(row.source.path, row.line, as_record(data), row.source.images_dir)
    ids, labels = encode_record(processor.encoder, record, processor.grids(record.image_paths), with_answer=True)
    return mark_learned(processor.encoder, ids, labels)


def describe(place: Place, problem: Problem) -> str:
    """A problem on one line of at most 500 characters, without those that act on a terminal."""
    text = f"{place}: {'' if problem.kind.fatal else 'warning: '}{problem.text}"
    return "".join(c if c.isprintable() else " " for c in (text if len(text) <= 500 else f"{text[:499]}…"))
