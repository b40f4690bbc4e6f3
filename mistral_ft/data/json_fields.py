"""JSON answers: their fields, each with a path that no other field has."""

import json
import re
from collections.abc import Iterator

from mistral_ft.files import Json

DEEPEST = 200  # objects and lists within each other: few enough for any Python to walk through and write again

_HALF = re.compile("[\ud800-\udfff]")
_MISREAD = re.compile(r"""^$|^\d+$|[.\s"[]""")  # in a path: what is empty, looks like a place in a list, or divides


def is_too_deep(text: str, data: Json) -> bool:
    """Whether JSON is nested more than `DEEPEST` times; most `text` shows at a glance that it is not."""
    if text.count("{") + text.count("[") <= DEEPEST:
        return False
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, dict | list) for value in level)


def has_half(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which JSON can spell, but no file takes and nobody can print."""
    return not text.isascii() and _HALF.search(text) is not None


def parse_answer(text: str | None) -> Json:
    """The JSON object or list that an answer is; None for any other text."""
    if not text or text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return None if is_too_deep(text, data) else data


def fields_of(text: str | None) -> dict[str, str] | None:
    """The fields of a JSON object or list, as {path: value as compact JSON}; None for any other text.

    A path is such as lines.0.price; a key that would be misread in it stands in quotes, as in JSON. Numbers that are
    equal, such as 4 and 4.0, have the same value.
    """
    data = parse_answer(text)
    return None if data is None else {path: _value(value) for path, value in flatten(data)}


def flatten(data: Json, path: str = "", places: bool = True) -> Iterator[tuple[str, Json]]:
    """(path, value) of every value that is no object or list with something in it.

    Args:
        path: what the paths begin with.
        places: whether the items of a list have paths of their own, or all the same one: lines[].price.
    """
    if not (isinstance(data, dict | list) and data):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from flatten(value, f"{path}.{field_name(key)}" if path else field_name(key), places)
    else:
        for place, value in enumerate(data):
            own = f"{path}.{place}" if path else str(place)
            yield from flatten(value, own if places else f"{path}[]", places)


def field_name(key: str) -> str:
    """A key as paths show it."""
    return key if key.isprintable() and not _MISREAD.search(key) else json.dumps(key)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # though Python reads NaN and Infinity


def _value(value: Json) -> str:
    value = value.strip() if isinstance(value, str) else value
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if has_half(text) else text
