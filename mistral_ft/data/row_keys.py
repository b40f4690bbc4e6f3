"""What tells one row from another: its key, its identity, its right answers and its name."""

import hashlib
import json

from mistral_ft.data.json_fields import kind_of
from mistral_ft.data.predictions import PREDICTED
from mistral_ft.files import Json, JsonObject

_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make an encoder for every row


def hash_bytes(data: bytes) -> int:
    """64 bits of a hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def hash_json(value: Json) -> int:
    """64 bits of a JSON value's hash."""
    return hash_bytes(_encode(value).encode())


def key_of(row: JsonObject) -> int:
    """What pairs rows of two files: a hash of the row's id, or where it has none of its prompt or plain text."""
    if row.get("id") is not None:
        return hash_json(["id", row["id"]])
    return hash_json(["prompt", row["messages"] if "messages" in row else row.get("text")])


def identity_of(row: JsonObject) -> int:
    """A hash of id and prompt together: equal only if it is the same row of the same data.

    A row that has neither is known by its fields, without those that predict adds.
    """
    name, prompt = row.get("id"), row.get("messages")
    if name is prompt is None:
        return hash_json({field: value for field, value in row.items() if field not in PREDICTED})
    return hash_json([name, prompt])


def right_answers(row: JsonObject, field: str = "expected") -> list[str]:
    """The right answers of a row, each once, the one to learn first; none for a row that has none.

    This is how `expected` is read, which is a string, or a list of strings where several answers are right.

    Raises:
        ValueError: if the field is neither, in one line.
    """
    value = row.get(field)
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    if value == []:
        raise ValueError(f"`{field}` is an empty list; name at least one right answer in it, or leave it out")
    for number, answer in enumerate(value, 1) if isinstance(value, list) else [(0, value)]:
        if not isinstance(answer, str):
            name = f"answer {number} in `{field}`" if number else f"`{field}`"
            raise ValueError(f"{name} must be a string, got {kind_of(answer)}; put JSON answers in quotes")
    return list(dict.fromkeys(value))


def expected_of(row: JsonObject) -> int:
    """A hash of the right answers in their order, whatever they are; a list of one is the same as its string."""
    try:
        answers = list(dict.fromkeys(map(str.strip, right_answers(row))))
    except ValueError:
        return hash_json(row.get("expected"))
    return hash_json(answers if len(answers) > 1 else next(iter(answers), None))


def row_name(identity: int, before: int) -> str:
    """A row's name in a review log, which stays the same while the file is written, finished and sorted.

    Args:
        identity: of `identity_of`.
        before: how many rows of the same identity stand before it in the file.
    """
    return f"{identity & (1 << 64) - 1:016x}" + (f"-{before}" if before else "")


def identity_in(name: str) -> int:
    """The identity in a row's name."""
    return int.from_bytes(bytes.fromhex(name.split("-")[0]), "big", signed=True)
