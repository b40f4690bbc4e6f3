"""Rows: what a data file holds before anyone asks what it means, as (number, JSON) one by one.

| source                                    | rows                                                          |
|-------------------------------------------|---------------------------------------------------------------|
| a.jsonl                                   | its lines, numbered from 1                                    |
| a.json                                    | the values of the one JSON array that it is, or of its `data`  |
| a.parquet, a.csv, a.tsv, a folder, org/name, org/name:test | the rows of a `datasets` set, as tables.py reads it |
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mistral_ft.data.foreign.file_kinds import HEAD, to_utf8, what_else
from mistral_ft.data.json_fields import finite, has_half, is_too_deep, kind_of
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import Json, JsonObject
from mistral_ft.folders import HUB_ID

TABLE_FILES = ("*.parquet", "*.arrow")  # which make a folder a table
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".arrow", ".gz", ".zip", *TABLE_SUFFIXES)  # of what is no hub id


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
            if _is_whole(file):
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
            if _is_whole(file):
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
        UserError: if there is no such file, or it is one of another kind.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a JSONL file in it, such as {path / 'train.jsonl'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        if reason := what_else(file.read(HEAD), path, rows=not is_table(path)):
            raise UserError(f"{path}: {reason}")
    return open(path, "rb")


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file is one JSON array, by its first character, or in a .json file one object with rows in `data`; a
    byte order mark and blank lines aside.

    A "[" that is closed on its own line begins a JSONL file whose first row is wrong.
    """
    first = next(filter(None, (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)), b"")
    second = next(filter(None, map(bytes.strip, file)), b"")
    file.seek(0)
    if first.startswith(b"{") and str(file.name).endswith(".json") and not (first.endswith(b"}") and second):
        whole = file.read()
        file.seek(0)
        try:
            found = json.loads(whole)
        except (ValueError, RecursionError):
            return False
        return bool(second) or (isinstance(found.get("data"), list) and not {"messages", "text"} & found.keys())
    return first.startswith(b"[") and not (first.endswith(b"]") and second)


def _load_array(path: Path) -> list[Json]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: {error.reason} at byte {error.start + 1}"
        raise UserError(f"{path}: {reason}; {to_utf8(path)}") from None
    try:
        rows = _decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {_explain(text, error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: nested too deeply, or with numbers too long, to be read") from None
    if isinstance(rows, dict) and not isinstance(rows.get("data"), list):
        hint = f": python -m reformat_data {path} OUT" if path.name == "dataset_info.json" else "; write a list of rows"
        raise UserError(f"{path}: is one JSON object, without rows in `data`{hint}")
    return rows["data"] if isinstance(rows, dict) else rows


def _nothing(constant: str) -> None:
    """What NaN and Infinity are read as: no JSON has them, but pandas writes them for a value that is missing."""


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
            data = parse_line(raw, first=number == 1, path=source.path)
        except ValueError as error:
            errors.append(RecordError(source.path, number, str(error)))
        else:
            if data is not None:
                yield number, data


def parse_line(
    raw: bytes, first: bool = False, path: str | os.PathLike = "", repeated: list[str] | None = None
) -> JsonObject | None:
    """The JSON object of one line of a JSONL file, or None if the line is blank.

    Args:
        first: whether it is the file's first line, which may start with a byte order mark.
        path: the file, for the command that mends it.
        repeated: where to put keys that stand twice in one object, of which only the last is read; None looks for none.

    Raises:
        ValueError: what is wrong, in one line, without the place.
    """
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
        if not text.strip():
            return None
        data = _decode(text) if repeated is None else _decode_noting(repeated, text)
        # JSON can spell half a surrogate pair, which is no text: no tokenizer encodes it and no file takes it.
        half = r"\ud" in text.lower() and has_half(json.dumps(data, ensure_ascii=False))
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("not UTF-8 text but UTF-16; save the file as UTF-8") from None
        hint = f"; {to_utf8(path)}" if path else ""
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}{hint}") from None
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


def _decode_noting(repeated: list[str], text: str) -> Json:
    hook = functools.partial(_as_object, repeated)
    return json.loads(text, parse_constant=_nothing, parse_float=finite, object_pairs_hook=hook)


def _as_object(repeated: list[str], pairs: list[tuple[str, Json]]) -> JsonObject:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        repeated += [name for name in data if names.count(name) > 1]
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
    zeros = (
        "; NUL bytes are what a download or copy leaves that broke off: fetch the file again" if "\0" in text else ""
    )
    return f"not JSON: {error.msg.removesuffix(' at')} at {place(error.pos)}{zeros}"
