"""Rows: what a data file holds before anyone asks what it means, as (number, JSON) one by one.

| source                                    | rows                                                          |
|-------------------------------------------|---------------------------------------------------------------|
| a.jsonl                                   | its lines, numbered from 1                                    |
| a.json                                    | the values of the one JSON array that it is                   |
| a.parquet, a.csv, a.tsv, a folder, org/name, org/name:test | the rows of a `datasets` set, as tables.py reads it |

Also what is read of JSON within a row, such as an answer, and the paths of fields, no two of which are alike.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import Json, JsonObject
from mistral_ft.folders import HUB_ID

TABLE_FILES = ("*.parquet", "*.arrow")  # which make a folder a table
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".arrow", ".gz", ".zip", *TABLE_SUFFIXES)  # of what is no hub id

DEEPEST = 200  # objects and lists within each other: few enough for any Python to walk through and write again

_HALF = re.compile("[\ud800-\udfff]")
_MISREAD = re.compile(r"""^$|^\d+$|[.\s"[]""")  # in a path: what is empty, looks like a place in a list, or divides
_PART = re.compile(r"""(?:^|\.)("(?:[^"\\]|\\.)*"(?=\.|$)|[^.]*)""")


def is_table(path: str | os.PathLike) -> bool:
    """Whether `datasets` reads a source: a parquet, CSV or TSV file, a folder or a hub id, with or without a split."""
    path = Path(path)
    if path.is_dir():
        return any(next(path.rglob(pattern), None) for pattern in TABLE_FILES)
    if path.exists():
        return path.suffix in TABLE_SUFFIXES
    name, colon, _ = str(path).rpartition(":")
    if colon and Path(name).is_dir():
        return is_table(name)
    return path.suffix not in FILE_SUFFIXES and re.fullmatch(rf"{HUB_ID}(:[\w.-]+)?", str(path)) is not None


class RowSource:
    """The rows of a source, to be counted and then read: a JSON array is loaded once for both.

    Iterated over, it gives (number from 1, JSON) of every row; nothing is parsed but what must be, to tell rows apart.

    Args:
        images_dir: the folder that references to images within a table are relative to.

    Raises:
        UserError: when it is counted or read, if the source cannot be read.
    """

    def __init__(self, path: str | os.PathLike, images_dir: Path):
        self.path, self.images_dir = path, images_dir
        self._array: list[Json] | None = None

    def count(self) -> int:
        """How many rows there are, blank lines among them, without reading them one by one."""
        if is_table(self.path):
            from mistral_ft.data.tables import open_table  # imports datasets, which takes a second

            return len(open_table(str(self.path)))
        with open_file(self.path) as file:
            if _is_array(file):
                self._array = _load_array(Path(self.path))
                return len(self._array)
            count, block = 0, b""
            while more := file.read(1 << 20):
                block = more
                count += block.count(b"\n")
        return count + (block[-1:] not in (b"", b"\n"))

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        if is_table(self.path):
            from mistral_ft.data.tables import read_table

            yield from read_table(str(self.path), self.images_dir)
            return
        with open_file(self.path) as file:
            if _is_array(file):
                array, self._array = self._array, None  # it takes memory no longer than it is read
                array = _load_array(Path(self.path)) if array is None else array
                yield from enumerate(map(_to_json, array), 1)
            else:
                yield from enumerate(file, 1)


def data_files(path: str | os.PathLike) -> list[Path]:
    """The files that hold a source's rows: what must be the same for the rows to be the same.

    Raises:
        UserError: if the source cannot be read.
    """
    if is_table(path) and not Path(path).is_file():
        from mistral_ft.data.tables import open_table

        return [Path(file["filename"]) for file in open_table(str(path)).cache_files]
    open_file(path).close()
    return [Path(path)]


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a data file to read its lines as bytes.

    Raises:
        UserError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a JSONL file in it, such as {path / 'train.jsonl'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return open(path, "rb")


def _is_array(file: BinaryIO) -> bool:
    """Whether a file is one JSON array, by its first character; a byte order mark and blank lines aside.

    A "[" that is closed on its own line begins a JSONL file whose first row is wrong.
    """
    first = next(filter(None, (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)), b"")
    second = next(filter(None, map(bytes.strip, file)), b"")
    file.seek(0)
    return first.startswith(b"[") and not (first.endswith(b"]") and second)


def _load_array(path: Path) -> list[Json]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {_explain(text, error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: nested too deeply, or with numbers too long, to be read") from None


def _nothing(constant: str) -> None:
    """What NaN and Infinity are read as: no JSON has them, but pandas writes them for a value that is missing."""


def finite(text: str) -> float:
    """A number that can be written again: Python reads those from 1.8e308 on as Infinity, which is no JSON."""
    if math.isinf(number := float(text)):
        raise UserError(f"holds the number {text[:20]}, which is too large to be read: the largest is 1.8e308")
    return number


_decode = json.JSONDecoder(parse_constant=_nothing, parse_float=finite).decode  # json.loads would make one for each row


def _to_json(value: Json) -> bytes:
    return json.dumps(value).encode()


def read_objects(source: RowSource, errors: list[RecordError]) -> Iterator[tuple[int, JsonObject]]:
    """Yield (number, object) for every row that is not blank; rows that are no JSON object go to `errors`.

    Raises:
        UserError: if the source cannot be read.
    """
    for number, raw in source:
        try:
            data = parse_line(raw, first=number == 1)
        except ValueError as error:
            errors.append(RecordError(source.path, number, str(error)))
        else:
            if data is not None:
                yield number, data


def parse_line(raw: bytes, first: bool = False) -> JsonObject | None:
    """The JSON object of one line of a JSONL file, or None if the line is blank.

    Args:
        first: whether it is the file's first line, which may start with a byte order mark.

    Raises:
        ValueError: what is wrong, in one line, without the place.
    """
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
        if not text.strip():
            return None
        data = _decode(text)
        # JSON can spell half a surrogate pair, which is no text: no tokenizer encodes it and no file takes it.
        half = r"\ud" in text.lower() and has_half(json.dumps(data, ensure_ascii=False))
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("not UTF-8 text but UTF-16; save the file as UTF-8") from None
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(_explain(text, error)) from None
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except UserError:
        raise
    except ValueError:  # Python's limit against numbers that take minutes to read
        raise ValueError("holds a number of more than 4300 digits") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {kind_of(data)}")
    if is_too_deep(text, data):
        raise ValueError("nested too deeply to be read")
    if half:
        raise ValueError("holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text")
    return data


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """One line about broken JSON that says what to mend, where the usual cause can be told."""

    def place(position: int) -> str:
        line = text.count("\n", 0, position)
        column = f"column {position - text.rfind(chr(10), 0, position)}"
        return f"line {line + 1}, {column}" if "\n" in text.strip() else column

    if text.startswith("\ufeff"):
        return "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig)"
    if text.strip() in ("[", "{"):
        return "not one JSON object per line: write each record on a line of its own, with no list around them"
    if text.startswith(("//", "/*", "#"), error.pos):
        return f"a comment at {place(error.pos)}: JSON allows none, remove it"
    for comma in re.finditer(r",\s*[}\]]", text):
        # Python 3.13 points at the comma, older ones at what follows it.
        if comma.start() <= error.pos < comma.end():
            return f"trailing comma at {place(comma.start())}: JSON allows none, remove it"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated string"):
        return f"the line ends in the middle of the record ({place(len(text.rstrip()) - 1)}): is the file cut off?"
    return f"not JSON: {error.msg.removesuffix(' at')} at {place(error.pos)}"


def look_up(row: JsonObject, field: str) -> Json:
    """A field's value, by a path as `flatten` has it, such as a.b, unless the row has a field of just that name."""
    value: Json = row
    for name in [field] if field in row else keys_of(field):
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
