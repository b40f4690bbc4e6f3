"""How wrong answers are wrong: of which kind, and what is commonly answered in place of what."""

import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from mistral_ft.data.records import check_record
from mistral_ft.data.row_keys import right_answers
from mistral_ft.files import JsonObject
from mistral_ft.scoring.metrics import Grade, answer_of, nearest_answer

# Every wrong row is of the first kind that fits.
KINDS = {
    "error": "predict could not answer: the row has an `error`",
    "unanswered": "no `actual` in the row",
    "length": "cut off at the length limit: raise predict's --max_new_tokens",
    "empty": "the answer is empty",
    "form": "right once normalised: only capitals, spaces or Unicode forms differ",
    "near": "nearly right: less than half of the characters differ",
    "different": "another answer altogether",
}


def kind_of(row: JsonObject, grade: Grade) -> str:
    """The kind of a wrong row."""
    answer = answer_of(row)
    if answer is None:
        return "unanswered" if row.get("error") is None else "error"
    if row.get("finish_reason") == "length":
        return "length"
    if not answer.strip():
        return "empty"
    if grade.folded_hit:
        return "form"
    return "near" if grade.anls else "different"


Pair = tuple[str, str]  # what was expected, and what was answered


@dataclass
class Common:
    """How often each pair was seen, in bounded memory: what is rare is forgotten when there is too much of it.

    Attributes:
        counts: at most 2 * `keep` of them.
        missed: how much a count can be too low; 0 while nothing was forgotten.
    """

    counts: Counter[Pair] = field(default_factory=Counter)
    missed: int = 0
    keep = 20_000

    def merge(self, things: "Common | Iterable[Pair]") -> None:
        """Count more pairs."""
        if isinstance(things, Common):
            self.missed += things.missed
            things = things.counts
        self.counts.update(things)
        if len(self.counts) > 2 * self.keep:
            ranked = self.most_common(len(self.counts))
            self.counts = Counter(dict(ranked[: self.keep]))
            self.missed += ranked[self.keep][1]

    def most_common(self, count: int) -> list[tuple[Pair, int]]:
        """The most common pairs with their counts, in an order that does not depend on when they were seen."""
        return heapq.nsmallest(count, self.counts.items(), key=lambda item: (-item[1], item[0]))


LONGEST_WORD = 64  # characters; longer ones are not common


def edits(expected: Sequence[str], actual: Sequence[str]) -> Iterator[Pair]:
    """(expected, answered) of each Levenshtein edit: "" is answered for what is missing, expected for what is extra."""
    for op in Levenshtein.editops(expected, actual):
        yield ("" if op.tag == "insert" else expected[op.src_pos]), ("" if op.tag == "delete" else actual[op.dest_pos])


def confusions(expected: str, actual: str) -> tuple[list[Pair], list[Pair]]:
    """(characters, words) that an answer has wrong, as pairs (expected, answered).

    Characters are compared inside words that stand for each other and differ in at most half of their characters:
    elsewhere, letters that happen to be in each other's place would hide those that are misread.
    """
    expected, actual = unicodedata.normalize("NFC", expected), unicodedata.normalize("NFC", actual)
    words = list(edits(expected.split(), actual.split()))
    characters = [
        pair
        for wanted, got in words
        if wanted and got and Levenshtein.normalized_distance(wanted, got) <= 0.5
        for pair in edits(wanted, got)
    ]
    return characters, [pair for pair in words if max(map(len, pair)) <= LONGEST_WORD]


class Example(NamedTuple):
    """A wrong row to show; of many, those with the highest ranks."""

    rank: int
    line: int
    shown: JsonObject


@dataclass
class Mistakes:
    """The wrong rows of a file or of a part of it.

    Attributes:
        kinds: how many are of each kind.
        characters, words: what they have wrong; only of rows with an answer.
        examples: some of them.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    characters: Common = field(default_factory=Common)
    words: Common = field(default_factory=Common)
    examples: list[Example] = field(default_factory=list)

    def add(self, row: JsonObject, grade: Grade) -> str:
        """Count a wrong row; return its kind."""
        kind = kind_of(row, grade)
        self.kinds[kind] += 1
        if (answer_of(row) or "").strip():
            characters, words = confusions(nearest_answer(row), row["actual"])
            self.characters.merge(characters)
            self.words.merge(words)
        return kind

    def add_example(self, rank: int, line: int, row: JsonObject, about: JsonObject, most: int) -> None:
        """Keep a row, and what is known `about` it, if its rank is among the `most` highest.

        With hashes as ranks, that draws them by lot.
        """
        if len(self.examples) < most or rank > self.examples[0].rank:
            push = heapq.heappush if len(self.examples) < most else heapq.heappushpop
            push(self.examples, Example(rank, line, example_of(row) | about | {"line": line}))

    def merge(self, other: "Mistakes", lines: int, most: int) -> None:
        """Take over the mistakes of the next part of the file, which follows `lines` lines."""
        self.kinds.update(other.kinds)
        self.characters.merge(other.characters)
        self.words.merge(other.words)
        moved = [Example(rank, line + lines, shown | {"line": line + lines}) for rank, line, shown in other.examples]
        self.examples = heapq.nlargest(most, self.examples + moved)


LONGEST_SHOWN = 5_000  # characters of an answer
MOST_SHOWN = 10  # right answers beside the nearest


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … (cut off at {most:,} of {len(text):,} characters)"


def example_of(row: JsonObject) -> JsonObject:
    """What to show of a row: its id, question, pages, the nearest right answer and others, its answer or error."""
    try:
        check_record(row)
        content = row["messages"][-1]["content"]
    except ValueError:
        content = ""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    answer, nearest = answer_of(row), nearest_answer(row)
    others = [other for other in right_answers(row) if other != nearest]
    more = [f"… ({len(others) - MOST_SHOWN:,} more)"] if len(others) > MOST_SHOWN else []
    return {
        "id": None if row.get("id") is None else _cut(str(row["id"]), 200),
        "question": " ".join(block["text"] for block in blocks if block["type"] == "text")[:500],
        "pages": [block["image"][:200] for block in blocks if block["type"] == "image"][:10],
        "expected": _cut(nearest, LONGEST_SHOWN),
        "others": [_cut(other, 500) for other in others[:MOST_SHOWN]] + more,
        "actual": None if answer is None else _cut(answer, LONGEST_SHOWN),
        "error": None if row.get("error") is None else _cut(str(row["error"]), 500),
    }
