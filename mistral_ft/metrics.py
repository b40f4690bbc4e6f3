"""How right an answer is, row by row. Nothing here needs torch or numpy.

Text is compared after NFC and with the white space around it taken off; what else is folded is said at each metric.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

FOLDS = ("nfc", "case", "space")


def is_exact(actual: str, expected: str) -> bool:
    """Equal, white space around both aside: the encoder strips answers, so no model can write what was around them."""
    return actual.strip() == expected.strip()


def answer_of(row: dict[str, Any]) -> str | None:
    """A predicted row's answer; None for one with an `error` or without `actual`."""
    actual = row.get("actual")
    return actual if "error" not in row and isinstance(actual, str) else None


def is_hit(row: dict[str, Any]) -> bool:
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


def edit_counts(actual: str, expected: str) -> tuple[int, int, int, int]:
    """(character edits, expected characters, word edits, expected words): what CER and WER are sums of.

    Edits are insertions, deletions and substitutions (Levenshtein). Words are split at white space.
    """
    from rapidfuzz.distance import Levenshtein

    actual, expected = unicodedata.normalize("NFC", actual).strip(), unicodedata.normalize("NFC", expected).strip()
    if actual == expected:
        return 0, len(expected), 0, len(expected.split())
    words = expected.split()
    return (
        Levenshtein.distance(actual, expected),
        len(expected),
        Levenshtein.distance(actual.split(), words),
        len(words),
    )


def anls(actual: str, expected: str, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer, as DocVQA scores it.

    1 - NL if NL < threshold, else 0, where NL is the edit distance over the longer length; capitals do not count.
    Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """
    from rapidfuzz.distance import Levenshtein

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
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def parse_object(text: str | None) -> dict[str, Any] | None:
    """The JSON object that a text is, or None."""
    if not text or not text.lstrip().startswith("{"):
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def flatten(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a JSON value as (path, value), such as ("lines.0.price", "4.5"); values as compact JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None or not data:
        value = data.strip() if isinstance(data, str) else data
        yield path, json.dumps(value, ensure_ascii=False)
        return
    for key, value in items:
        yield from flatten(value, f"{path}.{key}" if path else str(key))
