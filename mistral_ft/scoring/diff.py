"""What two answers share and what not, for people to look at."""

import re
from typing import TypeVar

from rapidfuzz.distance import Levenshtein

Text = TypeVar("Text", str, list[str])


def diff(expected: str, actual: str, by: str) -> list[tuple[str, str]]:
    """How the expected answer becomes the actual one: pieces (text there, text here), equal for what they share.

    Args:
        by: "words" compares words, stretches of white space, and signs; "characters" also the characters of stretches
            that stand for each other. Two answers of 100,000 characters take less than a second.
    """
    words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in (expected, actual)]
    pieces: list[tuple[str, str]] = []
    for a, b in _aligned(*words):
        there, here = "".join(a), "".join(b)
        pieces += [(there, here)] if by == "words" or there == here else _aligned(there, here)
    return pieces


def _aligned(a: Text, b: Text) -> list[tuple[Text, Text]]:
    """Stretches of two sequences that stand for each other, with the fewest edits."""
    return [
        (a[step.src_start : step.src_end], b[step.dest_start : step.dest_end]) for step in Levenshtein.opcodes(a, b)
    ]
