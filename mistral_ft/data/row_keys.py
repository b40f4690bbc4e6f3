"""What tells one row from another."""

import hashlib
import json
from typing import Any

from mistral_ft.data.predictions import PREDICTED

_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make an encoder for every row


def stable_hash(value: Any) -> int:
    """64 bits of a JSON value's hash, the same in every process."""
    return _hash(_encode(value).encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def key_of(row: dict[str, Any]) -> tuple[int, int, int]:
    """(key, identity, expected) of a row: hashes as in `scoring.Pairing`."""
    name, prompt, expected = row.get("id"), row.get("messages"), row.get("expected")
    key = stable_hash(["prompt", prompt] if name is None else ["id", name])
    if name is prompt is None:  # known by its fields, without those that predict adds
        identity = stable_hash({field: value for field, value in row.items() if field not in PREDICTED})
    else:
        identity = stable_hash([name, prompt])
    return key, identity, stable_hash(expected.strip() if isinstance(expected, str) else expected)
