"""Columns by name: fields, fields within fields, texts with fields in them; and answers that are no single text."""

import re
from collections import Counter

from mistral_ft.data.conversation import parsed, to_json
from mistral_ft.files import Json, JsonObject

FIELD = re.compile(r"\{([\w.]+)\}")


def value_of(row: JsonObject, column: str) -> Json:
    """What a column of a row holds; None if there is none.

    Args:
        column: a field; `a.b` for one within another, where text that is JSON is read, and items of lists have numbers
            from 0; or a text with fields in it, `scans/{a.b}.png`.

    Raises:
        ValueError: if a field of a text is missing or is neither a string nor a number.
    """
    if FIELD.search(column):
        return FIELD.sub(lambda found: _spelled(row, found[1]), column)
    if column in row:
        return row[column]
    value: Json = row
    for name in column.split("."):
        value = parsed(value) if isinstance(value, str) else value
        if isinstance(value, list) and name.isdecimal():
            value = dict(enumerate(value)).get(int(name))
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def _spelled(row: JsonObject, column: str) -> str:
    value = value_of(row, column)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"no `{column}`" if value is None else f"`{column}` must be a string or a number")
    return str(value)


def fields_of(column: str) -> set[str]:
    """The fields of a row that a column is made of."""
    return {name.partition(".")[0] for name in FIELD.findall(column) or [column]}


def json_answer(answer: Json, name: str) -> str:
    """An answer that is an object or a list of objects as JSON; raises ValueError for any other list."""
    if isinstance(answer, list) and not all(isinstance(item, dict) for item in answer):
        raise ValueError(f"`{name}` is a list: if these are several right answers, --map answers={name}")
    return to_json(answer)


def answers_of(value: Json, name: str) -> str | list[str]:
    """Several right answers, the one that most people gave first; of one only itself.

    Raises:
        ValueError: if they are no list of strings or objects, which become JSON.
    """
    value = parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"no `{name}`" if not value else f"`{name}` must be a list of right answers")
    found = [item.get("answer", item) if isinstance(item, dict) else item for item in value]  # VQA: of each person
    texts = [to_json(item) if isinstance(item, dict) else item for item in found]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a list of right answers, each a string or an object")
    ordered = [text for text, _ in Counter(texts).most_common()]
    return ordered if len(ordered) > 1 else ordered[0]
