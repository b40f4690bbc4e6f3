"""What is in data files, for the report: how long questions and answers are, what is answered, which rows to show.

The rows are read once more for it, and what is kept of each are 14 bytes and one answer of the first 10,000 different
ones.
"""

import random
from array import array
from collections import Counter
from collections.abc import Container, Iterator, Sequence

import numpy as np

from mistral_ft.data.json_fields import flatten, parse_answer
from mistral_ft.data.records import Record, checked
from mistral_ft.data.rows import RowSource, parse_line
from mistral_ft.files import Json
from mistral_ft.validation.checker import Place, Source, texts_of

MOST_COUNTED = 10_000  # different answers, and different fields; further ones are counted together
LONGEST_ANSWER = 200  # characters that are kept of an answer to count
OTHER_ANSWERS, OTHER_FIELDS = ("", -1), "(other fields)"  # no hash is -1
DRAWN = 4  # rows to show, always the same ones of the same files


class Contents:
    """What the rows hold that train takes.

    Attributes:
        answers: how often each answer is there, its first characters.
        objects: how many answers are JSON objects or lists.
        present, filled: in how many of these a field is, and is neither null nor empty.
    """

    def __init__(self, sources: Sequence[Source]):
        self.answers: Counter[tuple[str, int]] = Counter()  # and a hash of all of it
        self.objects = 0
        self.present: Counter[str] = Counter()
        self.filled: Counter[str] = Counter()
        self._sources = sources
        self._file, self._line = array("H"), array("I")
        self._lengths = array("i")  # two numbers a row
        for number, source in enumerate(sources):
            for record in read_records(source):
                self._file.append(number)
                self._line.append(record.line)
                answer = record.text if record.expected is None else record.expected
                self._lengths.extend((len(question_of(record)), -1 if answer is None else len(answer)))
                if answer is not None:
                    self._add_answer(answer.strip())

    @property
    def lengths(self) -> np.ndarray:
        """Of each row, (question, answer) in characters; -1 for no answer."""
        return np.frombuffer(self._lengths, np.int32).reshape(-1, 2)

    @property
    def fields(self) -> list[tuple[str, int, int]]:
        """(path, how often it is there, how often it is filled) of the fields of JSON answers, the commonest first."""
        return [(path, count, self.filled[path]) for path, count in self.present.most_common()]

    def samples(self) -> dict[Place, str]:
        """Rows to show, and why each: the first, that of median length, the longest, and some drawn by lot."""
        if not self._line:
            return {}
        order = np.argsort(self.lengths.clip(min=0).sum(1), kind="stable")
        drawn = random.Random(0).sample(range(len(order)), min(DRAWN, len(order)))
        rows = [(0, "the first row"), (order[len(order) // 2], "of median length"), (order[-1], "the longest row")]
        found: dict[Place, str] = {}
        for row, why in (*rows, *((row, "drawn by lot") for row in sorted(drawn))):
            found.setdefault(Place(str(self._sources[self._file[row]].path), self._line[row]), why)
        return found

    def _add_answer(self, answer: str) -> None:
        _count(self.answers, (answer[:LONGEST_ANSWER], hash(answer)), OTHER_ANSWERS)
        if (data := parse_answer(answer)) is None:
            return
        self.objects += 1
        fields: dict[str, bool] = {}
        for path, value in flatten(data, places=False):
            filled = value is not None and value != {} and value != [] and str(value).strip() != ""
            fields[path] = fields.get(path, False) or filled
        for path, filled in fields.items():
            path = _count(self.present, path, OTHER_FIELDS)
            self.filled[path] += filled


def read_records(source: Source, lines: Container[int] | None = None) -> Iterator[Record]:
    """The records of a file that train takes; of all its lines or of some."""
    for line, raw in RowSource(source.path, source.images_dir):
        if lines is not None and line not in lines:
            continue
        try:
            data = parse_line(raw, first=line == 1)
            if data is not None:
                yield Record(source.path, line, checked(data), source.images_dir)
        except ValueError:
            continue


def question_of(record: Record) -> str:
    """All text that comes before the answer."""
    return "\n".join(filter(None, texts_of(record.messages)))


def _count(counter: Counter, key: Json, others: Json) -> Json:
    """Count a thing, or with the others if there are too many different ones; returns which it was."""
    key = key if key in counter or len(counter) < MOST_COUNTED else others
    counter[key] += 1
    return key
