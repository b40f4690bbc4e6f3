"""Safetensors checkpoints: which file holds which tensor, and where in it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in its file, and what it is.

    Attributes:
        start: its first byte in the file.
        size: in bytes.
        dtype: as safetensors names it, such as "BF16".
    """

    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint, without the tensors' values.

    Attributes:
        header: the file's first bytes, up to the tensors.
        size: of the file, in bytes.
        tensors: in the order of the file, by key.
    """

    path: Path
    header: bytes
    size: int
    tensors: dict[str, Span]

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read a file's header: 8 bytes of length, then JSON (https://github.com/huggingface/safetensors#format).

        Raises:
            UserError: if the file is broken.
        """
        with open_shard(path):  # the library checks that header and file fit together
            pass
        with open(path, "rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        tensors = {}
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            tensors[key] = Span(len(header) + start, end - start, entry["dtype"], tuple(entry["shape"]))
        return cls(path, header, path.stat().st_size, tensors)


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its tensors are maps of the file, not copies.

    Raises:
        UserError: if it is broken.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: broken file: {error}") from error


def read_checkpoint(folder: Path) -> list[Shard]:
    """The weight files of a model folder.

    Raises:
        UserError: if there are none, one is missing or broken, or the index names other tensors than they hold.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: has neither {INDEX} nor {WEIGHTS}")
        return [Shard.read(folder / WEIGHTS)]
    weight_map = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: broken: no weight_map")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {len(missing)} weight files are missing, such as {missing[0]}")
    shards = [Shard.read(folder / name) for name in names]
    for shard in shards:
        if shard.tensors.keys() != {key for key, name in weight_map.items() if name == shard.path.name}:
            raise UserError(f"{folder}: {INDEX} names other tensors for {shard.path.name} than it holds")
    return shards
