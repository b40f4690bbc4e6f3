"""How right an answer is, row by row. Nothing here needs torch or numpy.

White space around a text never counts. What else is made equal, Unicode forms among it, is said at each metric.
"""

import math
import re
import string
import unicodedata
from typing import NamedTuple

from rapidfuzz.distance import LCSseq, Levenshtein

from mistral_ft.data.json_fields import fields_of
from mistral_ft.data.row_keys import right_answers
from mistral_ft.files import JsonObject

FOLDS = ("nfc", "case", "space")


def is_exact(actual: str, expected: str) -> bool:
    """Equal, white space around both aside: the encoder strips answers, so no model can write what was around them."""
    return actual.strip() == expected.strip()


def answer_of(row: JsonObject) -> str | None:
    """A predicted row's answer; None for one with an `error` or without `actual`."""
    actual = row.get("actual")
    return actual if row.get("error") is None and isinstance(actual, str) else None


def is_hit(row: JsonObject) -> bool:
    """Whether a predicted row has an answer, and it is one of the right ones."""
    actual = answer_of(row)
    return actual is not None and any(is_exact(actual, expected) for expected in right_answers(row))


def fold(text: str, folds: tuple[str, ...] = FOLDS) -> str:
    """Make answers equal that differ only in Unicode form (nfc), capitals (case) or runs of white space (space)."""
    if "nfc" in folds:
        text = unicodedata.normalize("NFC", text)
    if "case" in folds:
        text = text.casefold()
    if "space" in folds:
        text = " ".join(text.split())
    return text.strip()


class Edits(NamedTuple):
    """What CER and WER are sums of: edits that turn an answer into the expected one, and what that one has."""

    char_edits: int
    chars: int
    word_edits: int
    words: int


def edit_counts(actual: str, expected: str) -> Edits:
    """The edits of one answer.

    They are insertions, deletions and substitutions (Levenshtein). Words are split at white space.
    """
    actual, expected = unicodedata.normalize("NFC", actual).strip(), unicodedata.normalize("NFC", expected).strip()
    if actual == expected:
        return Edits(0, len(expected), 0, len(expected.split()))
    words = expected.split()
    distance = Levenshtein.distance
    return Edits(distance(actual, expected), len(expected), distance(actual.split(), words), len(words))


def anls(actual: str, expected: str, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer, as DocVQA scores it.

    1 - NL if NL < threshold, else 0, where NL is the edit distance over the longer length; capitals do not count.
    Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """
    distance = Levenshtein.normalized_distance(fold(actual, ("nfc", "case")), fold(expected, ("nfc", "case")))
    return 1 - distance if distance < threshold else 0.0


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(actual: str, expected: str) -> float:
    """F1 of the words two answers share, without capitals, punctuation and English articles.

    Rajpurkar et al. 2016, "SQuAD": the official evaluation script's definition, where an answer without any word is
    right only if both have none.
    """

    def words(text: str) -> list[str]:
        return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()

    ours, theirs = words(actual), words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = LCSseq.similarity(sorted(ours), sorted(theirs))  # of sorted lists: words in both, repeated ones too
    return 2 * shared / (len(ours) + len(theirs))


class Grade(NamedTuple):
    """How right the answer of one row is; a file's figures are sums of these."""

    hit: bool
    folded_hit: bool
    char_edits: int
    chars: int
    word_edits: int
    words: int
    anls: float
    token_f1: float


def grade(row: JsonObject, folds: tuple[str, ...] = FOLDS) -> Grade:
    """Grade a row with `expected`; of several right answers each figure is that of the one which is best by it.

    Edits are those of the right answer with the fewest per character, or per word, the first of equals. Without an
    answer a row is wrong, and every character and word of its first right answer is missing.
    """
    answer, answers = answer_of(row), right_answers(row)
    if answer is None:
        return Grade(False, False, *edit_counts("", answers[0]), 0.0, 0.0)
    if len(answers) == 1:
        return _grade(answer, answers[0], folds)
    grades = [_grade(answer, expected, folds) for expected in answers]
    chars = min(grades, key=lambda grade: _rate(grade.char_edits, grade.chars))
    words = min(grades, key=lambda grade: _rate(grade.word_edits, grade.words))
    best = Grade(*map(max, zip(*grades, strict=True)))
    return best._replace(char_edits=chars.char_edits, chars=chars.chars, word_edits=words.word_edits, words=words.words)


def _grade(answer: str, expected: str, folds: tuple[str, ...]) -> Grade:
    edits = edit_counts(answer, expected)
    if is_exact(answer, expected):
        return Grade(True, True, *edits, 1.0, 1.0)
    folded_hit = fold(answer, folds) == fold(expected, folds)
    return Grade(False, folded_hit, *edits, anls(answer, expected), token_f1(answer, expected))


def _rate(edits: int, length: int) -> float:
    return edits / length if length else edits and math.inf


def nearest_answer(row: JsonObject) -> str:
    """The right answer with the fewest edits per character, the first of equals; the first for a row without answer."""
    answer, answers = answer_of(row), right_answers(row)
    if answer is None or len(answers) == 1:
        return answers[0]
    return min(answers, key=lambda expected: _rate(*edit_counts(answer, expected)[:2]))


def fields_to_compare(row: JsonObject) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """The fields (wanted, answered) of a row, as `fields_of` gives them; nothing is wanted if the answer is no JSON.

    Of several right answers the nearest says whether JSON is wanted; then, of those that are JSON, the one with the
    best F1 of its fields is, the first of equals.
    """
    answers = right_answers(row)
    wanted = fields_of(answers[0] if len(answers) == 1 else nearest_answer(row))  # a call less for each of many rows
    if wanted is None:
        return None, None
    found = fields_of(answer_of(row))
    if found and len(answers) > 1:
        ours = found.items()
        wanted = max(
            filter(None, map(fields_of, answers)),
            key=lambda fields: len(fields.items() & ours) / (len(fields) + len(ours)),
        )
    return wanted, found
