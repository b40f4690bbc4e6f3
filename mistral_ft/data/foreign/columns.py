"""Columns by name: fields of a row, texts made of them, and answers that are no single text."""

import re
from collections import Counter

from mistral_ft.data.conversation import to_json
from mistral_ft.data.json_fields import kind_of, look_up
from mistral_ft.data.row_keys import right_answers
from mistral_ft.files import Json, JsonObject

FIELD = re.compile(r"\{([\w.]+)\}")


def value_of(row: JsonObject, column: str) -> Json:
    """What a column of a row holds; None if there is none.

    Args:
        column: a field as `look_up` takes it, or a text with fields in it, `scans/{a.b}.png`.

    Raises:
        ValueError: if a field of a text is missing or is neither a string nor a number.
    """
    return FIELD.sub(lambda found: _spelled(row, found[1]), column) if FIELD.search(column) else look_up(row, column)


def _spelled(row: JsonObject, column: str) -> str:
    value = look_up(row, column)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"no `{column}`" if value is None else f"`{column}` must be a string or a number")
    return str(value)


def answer_of(value: Json, column: str) -> str | list[str]:
    """An answer, or the right ones of a list, each once and the one that stands there most often first.

    Raises:
        ValueError: if it is neither, in one line.
    """
    if value is None:
        raise ValueError(f"no `{column}`")
    if isinstance(value, dict) and value:
        raise ValueError(
            f"`{column}` is an object; name a field of it: --map answer={column}.{next(iter(value))}; or --map "
            f"json={column} for all of it as JSON"
        )
    if isinstance(value, list) and right_answers({column: value}, column):
        return [answer for answer, _ in Counter(value).most_common()]
    if not isinstance(value, str):
        raise ValueError(f"`{column}` must be a string, got {to_json(value)[:40]}")
    return value


def json_of(value: Json, column: str) -> str | list[str]:
    """An object or a list as JSON; of Donut's `gt_parses`, of which each is right, a list of them.

    Raises:
        ValueError: if it is neither, in one line.
    """
    if not isinstance(value, dict | list) or not value:
        kind = f"`{column}` must be an object or a list, got {kind_of(value)}; a text is mapped to `answer`"
        raise ValueError(f"no `{column}`" if value is None else kind)
    if isinstance(value, list) and column.endswith("gt_parses"):
        return list(map(to_json, value))
    return to_json(value)
