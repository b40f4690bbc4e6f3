"""Tables: parquet, CSV and TSV files, `datasets` folders and hub ids as rows, with the images in them as references.

`datasets` keeps a table in its cache as Arrow files that are mapped into memory, so that a row is there at once and
a set may be larger than RAM. An image in a row, bytes or path, becomes the reference `<source>#row=12&column=image`
(`&item=0` where the column holds lists), counted from 0, which `pages.py` opens.
"""

import base64
import datetime
import glob
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import datasets
import huggingface_hub
import pyarrow as pa

from mistral_ft.data.foreign.file_kinds import HEAD, to_utf8, what_else
from mistral_ft.data.references import IN_TABLE
from mistral_ft.errors import UserError
from mistral_ft.files import Json

ROWS_AT_ONCE = 64


@lru_cache(8)
def open_table(source: str) -> datasets.Dataset:
    """The `datasets.Dataset` of a parquet, CSV or TSV file, a folder or a hub id; of these with ":split" or without.

    Raises:
        UserError: if it cannot be read, in one line.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said here
    huggingface_hub.utils.logging.set_verbosity_error()
    path, split = source, None
    if not Path(source).exists() and ":" in source:
        path, _, split = source.rpartition(":")
    if Path(path).is_file():
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if reason := what_else(head, path, rows=not path.endswith(".parquet")):
            raise UserError(f"{source}: {reason}")
    try:
        if Path(path).is_file():
            read = datasets.Dataset.from_parquet if path.endswith(".parquet") else datasets.Dataset.from_csv
            found = read(glob.escape(path), **({"sep": "\t"} if path.endswith(".tsv") else {}))
        elif (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path)
    except Exception as error:  # of many kinds, from Arrow's, the hub's and the file system's
        reason = (str(error) or repr(error)).splitlines()[0][:300]
        if not Path(path).exists():
            raise UserError(f"{source}: no such file or folder, and no data set of the hub: {reason}") from None
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(f"{source}: not UTF-8 text; {to_utf8(path)}") from None
        raise UserError(f"{source}: cannot be read as a table: {reason}") from None
    if isinstance(found, datasets.DatasetDict):
        split = split or ("train" if "train" in found else next(iter(found)))
        if split not in found:
            raise UserError(f"{source}: no such split; there is {', '.join(found)}")
        found = found[split]
    elif split:
        raise UserError(f"{source}: the set has no splits; leave out :{split}")
    return found.with_format("arrow")


def read_table(source: str, images_dir: Path) -> Iterator[tuple[int, bytes]]:
    """(Number from 1, JSON) of every row; fields without a value are left out, as tables have every field in all rows.

    Args:
        images_dir: the folder that references to a local table's images are relative to.

    Raises:
        UserError: if the table cannot be read, or a value is none that JSON has.
    """
    table, start = open_table(source), 0
    is_local = Path(source).exists() or Path(source.rpartition(":")[0]).is_dir()
    name = os.path.relpath(source, images_dir) if is_local else source
    for batch in table.iter(batch_size=ROWS_AT_ONCE):
        columns = {
            field: _references(name, field, start, column) if _holds_bytes(column.type) else column.to_pylist()
            for field, column in zip(batch.column_names, batch.columns, strict=True)
        }
        for k in range(batch.num_rows):
            row = {field: values[k] for field, values in columns.items()}
            try:
                yield start + k + 1, json.dumps(_as_json(row)).encode()
            except RecursionError:
                raise UserError(f"{source}:{start + k + 1}: nested too deeply to be read") from None
        start += batch.num_rows


def open_image_bytes(reference: str) -> IO[bytes]:
    """The bytes of an image in a table; where it has a path, of that file, which must be below the table's folder.

    Raises:
        ValueError: if there is no such image, in one line; OSError: if the file cannot be read.
    """
    place = IN_TABLE.fullmatch(reference)
    assert place is not None  # `references.table_of` has found one
    try:
        value = open_table(place["table"])[int(place["row"])][place["column"]][0].as_py()
        value = value if place["item"] is None else value[int(place["item"])]
    except UserError as error:
        raise ValueError(str(error)) from None
    except (IndexError, KeyError, TypeError):
        raise ValueError("the table has no such image") from None
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if not isinstance(value, str):
        raise ValueError("the table has nothing there")
    folder = Path(place["table"]).parent.resolve()
    path = (folder / value).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"the table has the path {value[:200]} there, which is not below its folder")
    return open(path, "rb")


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column has images: bytes, the struct of bytes and path that `datasets` writes, or lists of these."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _references(name: str, field: str, start: int, column: pa.ChunkedArray) -> list[Json]:
    """A reference, or a list of them, for each row of a column of images; None where there is none."""
    valid = column.is_valid().to_pylist()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return [f"{name}#row={start + k}&column={field}" if there else None for k, there in enumerate(valid)]
    lengths = pa.compute.list_value_length(column).to_pylist()
    return [
        None if length is None else [f"{name}#row={start + k}&column={field}&item={item}" for item in range(length)]
        for k, length in enumerate(lengths)
    ]


def _as_json(value: Any) -> Json:
    """A table's value as JSON: without nulls and numbers that are none, dates as ISO text, bytes in base64."""
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items() if not _is_missing(inner)}
    if isinstance(value, list | tuple):
        return [None if _is_missing(inner) else _as_json(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float) else str(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
