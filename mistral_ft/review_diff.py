"""What two answers share and what not, for people to look at."""

import re

from rapidfuzz.distance import Levenshtein

MOST_CELLS = 10**9  # of the table that a comparison needs, in bits: 125 MB


def diff(expected: str, actual: str, by: str) -> list[tuple[str, str]]:
    """How the expected answer becomes the actual one: pieces (text there, text here), equal for what they share.

    Args:
        by: "words" compares words, white space and signs; "characters" also the characters of words that stand for
            each other. Answers that are too long for that are cut in the middle, at the ends of what they share.
    """
    words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in (expected, actual)]
    pieces: list[tuple[str, str]] = []
    for a, b in _aligned(*words):
        whole, part = "".join(a), "".join(b)
        if by == "words" or not a or not b or a == b:
            pieces.append((whole, part))
        else:
            pieces += _aligned(whole, part)
    return pieces


def _aligned(a, b):
    """Pairs of stretches of two sequences: equal ones, and between them those that differ."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    middle_a, middle_b = a[start : len(a) - end], b[start : len(b) - end]
    pairs = [(a[:start], b[:start])]
    if len(middle_a) * len(middle_b) <= MOST_CELLS:
        pairs += (
            (middle_a[step.src_start : step.src_end], middle_b[step.dest_start : step.dest_end])
            for step in Levenshtein.opcodes(middle_a, middle_b)
        )
    else:
        pairs.append((middle_a, middle_b))
    pairs.append((a[len(a) - end :], b[len(b) - end :]))
    return [(x, y) for x, y in pairs if x or y]
