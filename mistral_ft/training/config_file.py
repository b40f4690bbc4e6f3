"""A run's settings as a file: flags without their dashes, in YAML or, if its name ends with .json, in JSON."""

import difflib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mistral_ft.errors import UserError
from mistral_ft.files import atomic_write


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The settings of a file, by name; those that are null, which stands for the default, are left out.

    Raises:
        UserError: if it is missing, broken, or holds something other than names and values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of settings") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: broken: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{path}: expected names and values, such as lora_rank: 16")
    return {name: value for name, value in settings.items() if value is not None}


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they would stand on the command line, whose parser then checks the values of both."""
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def nearest(name: str, known: Collection[str]) -> str:
    """' (did you mean …?)' for a name that is none of those known, or nothing if none is like it."""
    found = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    return f" (did you mean {found[0]}?)" if found else ""


def write_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as YAML that `read_config` reads."""
    with atomic_write(path) as file:
        file.write("# python -m train --config this file repeats the run; flags on the command line win over it.\n")
        yaml.safe_dump(dict(settings), file, sort_keys=False, allow_unicode=True)
