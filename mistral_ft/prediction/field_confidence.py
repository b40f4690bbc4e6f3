"""Where the values of a JSON answer stand in its text, and how sure the model was of each."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from mistral_ft.data.json_fields import written_key

SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, place: int) -> int:
    match = SPACE.match(text, place)
    assert match is not None  # no space matches too
    return match.end()


def value_spans(text: str) -> dict[str, tuple[int, int]]:
    """(start, end) of each top-level value of a JSON object in its text; {} for any other text."""
    decoder, spans = json.JSONDecoder(), {}

    def skip(place: int, wanted: str = "") -> int:
        place = _skip_space(text, place)
        if not text.startswith(wanted, place):
            raise ValueError(f"no {wanted!r} at {place}")
        return _skip_space(text, place + len(wanted))

    try:
        place = skip(0, "{")
        while not text.startswith("}", place):
            key, place = decoder.raw_decode(text, place)
            start = skip(place, ":")
            _, end = decoder.raw_decode(text, start)
            if not isinstance(key, str):
                return {}
            spans[key] = (start, end)
            place = skip(end)
            if not text.startswith("}", place):
                place = skip(place, ",")
                if text.startswith("}", place):
                    return {}  # a trailing comma
        return spans if skip(place, "}") == len(text) else {}
    except (ValueError, RecursionError):
        return {}


def field_confidences(text: str, ends: Sequence[int], log_probs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Mean and least log-probability of the tokens that overlap each top-level value of a JSON answer.

    Args:
        ends: where each of the answer's tokens ends in the text.
        log_probs: of these tokens.

    Returns:
        {"mean", "min"} by key, as `written_key` writes it.
    """
    tokens = list(zip([0, *ends], ends, log_probs, strict=False))
    found = {}
    for key, (start, end) in value_spans(text).items():
        own = [prob for first, last, prob in tokens if first < end and last > start]
        if own:
            found[written_key(key)] = {
                "mean": round(sum(own) / len(own), 4),
                "min": round(min(own), 4),
            }
    return found


def token_ends(pieces: Sequence[str]) -> list[int]:
    """Where each token ends, given the text up to and with each; a token may end within a character."""
    return list(itertools.accumulate((len(piece) for piece in pieces), max))
