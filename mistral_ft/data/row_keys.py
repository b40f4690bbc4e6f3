"""What tells one row from another."""

import hashlib
import json
from typing import NamedTuple

from mistral_ft.data.predictions import PREDICTED
from mistral_ft.files import Json, JsonObject

_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make an encoder for every row


def stable_hash(value: Json) -> int:
    """64 bits of a JSON value's hash, the same in every process."""
    return _hash(_encode(value).encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


class RowKey(NamedTuple):
    """Hashes of a row, as in `scoring.Pairing`."""

    key: int
    identity: int
    expected: int


def key_of(row: JsonObject) -> RowKey:
    """What a row is known by."""
    name, prompt, expected = row.get("id"), row.get("messages"), row.get("expected")
    key = stable_hash(["prompt", prompt] if name is None else ["id", name])
    if name is prompt is None:  # known by its fields, without those that predict adds
        identity = stable_hash({field: value for field, value in row.items() if field not in PREDICTED})
    else:
        identity = stable_hash([name, prompt])
    return RowKey(key, identity, stable_hash(expected.strip() if isinstance(expected, str) else expected))
