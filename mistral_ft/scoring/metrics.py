"""How right an answer is, row by row. Nothing here needs torch or numpy.

White space around a text never counts. What else is made equal, Unicode forms among it, is said at each metric.
"""

import re
import string
import unicodedata
from typing import NamedTuple

from rapidfuzz.distance import LCSseq, Levenshtein

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
    """Whether a predicted row has an answer, and it is right."""
    actual = answer_of(row)
    return actual is not None and is_exact(actual, row["expected"])


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
    """Grade a row with `expected`. Without an answer it is wrong, with every expected character and word missing."""
    expected, answer = row["expected"], answer_of(row)
    edits = edit_counts(answer or "", expected)
    if answer is None:
        return Grade(False, False, *edits, 0.0, 0.0)
    if is_exact(answer, expected):
        return Grade(True, True, *edits, 1.0, 1.0)
    folded_hit = fold(answer, folds) == fold(expected, folds)
    return Grade(False, folded_hit, *edits, anls(answer, expected), token_f1(answer, expected))
