"""JSON within a row, such as an answer: what is read of it, and the paths of its fields, no two of which are alike."""

import contextlib
import json
import math
import re
from collections.abc import Iterator

from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject

DEEPEST = 200  # objects and lists within each other: few enough for any Python to walk through and write again

_HALF = re.compile("[\ud800-\udfff]")
_MISREAD = re.compile(r"""^$|^\d+$|[.\s"[]""")  # in a path: what is empty, looks like a place in a list, or divides
_PART = re.compile(r"""(?:^|\.)("(?:[^"\\]|\\.)*"(?=\.|$)|[^.]*)""")


def finite(text: str) -> float:
    """A number that can be written again: Python reads those from 1.8e308 on as Infinity, which is no JSON."""
    if math.isinf(number := float(text)):
        raise UserError(f"holds the number {text[:20]}, which is too large to be read: the largest is 1.8e308")
    return number


def look_up(row: JsonObject, field: str) -> Json:
    """A field's value; None if there is none.

    Args:
        field: a path as `flatten` has it, such as a.b, unless the row has a field of just that name. Text on the way
            that is JSON is read, and items of lists have numbers from 0.
    """
    value: Json = row
    for name in [field] if field in row else keys_of(field):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = read_json(value)
        if isinstance(value, list) and name.isdecimal():
            value = dict(enumerate(value)).get(int(name))
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def kind_of(value: Json) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "nothing", bool: "true/false", dict: "an object", list: "a list", str: "a string"}
    if isinstance(value, list) and not value:
        return "an empty list"
    if isinstance(value, str) and not value:
        return "an empty string"
    return names.get(type(value), f"the number {value}")


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


def read_json(text: str, halves: bool = True) -> Json:
    """The JSON that a text of a row is.

    Args:
        halves: whether it may hold half a surrogate pair, which tools and their arguments may not: they become text.

    Raises:
        ValueError: what is wrong, in one line; NaN and Infinity, which Python reads, are none.
    """
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    if is_too_deep(text, data):
        raise ValueError("nested too deeply to be read")
    if not halves and r"\ud" in text.lower() and has_half(json.dumps(data, ensure_ascii=False)):
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) is no text")
    return data


def parse_answer(text: str | None) -> Json:
    """The JSON object or list that an answer is; None for any other text."""
    try:
        return read_json(text) if text and text.lstrip()[:1] in ("{", "[") else None
    except ValueError:
        return None


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


def keys_of(path: str) -> list[str]:
    """The keys that a path leads through; what no path has is taken as it stands, such as all between two dots."""
    return [_key(part) for part in _PART.findall(path)]


def _key(part: str) -> str:
    try:
        return json.loads(part) if part.startswith('"') else part
    except ValueError:
        return part


def written_key(key: str) -> str:
    """A key as files hold it: one with half a surrogate pair, which none takes, as paths show it."""
    return field_name(key) if has_half(key) else key


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _value(value: Json) -> str:
    value = value.strip() if isinstance(value, str) else value
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if has_half(text) else text
