"""Runs of training, as the review page shows them: read only, from the folder that the server was given."""

import math
import os
import platform
import stat
from datetime import datetime, timezone
from pathlib import Path

from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject
from mistral_ft.status import PLOT_FILE, RUNNING, STATUS_FILE, read_status

RECENT_SECONDS = 3600  # that an ended run is shown
MOST_READ, MOST_SHOWN = 100, 4  # runs, those with the newest files first
MOST_BYTES = {STATUS_FILE: 64 << 10, PLOT_FILE: 16 << 20}
LONGEST_ERROR = 300  # characters
LARGEST_NUMBER = 1e15  # JavaScript has larger ones in part, and nothing that is counted gets there


def recent_runs(folder: Path) -> list[JsonObject]:
    """The runs of a folder that are at work, or had news within the last hour.

    Files that are broken, half written or too large, and links that lead out of the folder, are passed over.

    Returns:
        Of each its `name`, `state` (as in `status`, `dead` if its process is gone), whether there is a `plot`, `age`:
        the seconds since it had news, and `step`, `steps`, `loss`, `eval_loss`, `seconds_left` and `error`, each None
        if it is not known.
    """
    try:
        names = [name for name in os.listdir(folder) if name.isprintable()]
    except OSError:  # it is gone
        return []
    newest = sorted(names, key=lambda name: _time(folder / name / STATUS_FILE), reverse=True)[:MOST_READ]
    found = []
    for name in newest:
        if _file(folder, name, STATUS_FILE) and (run := _describe(folder / name, name)):
            found.append(run | {"plot": _file(folder, name, PLOT_FILE) is not None})
    return sorted(found, key=lambda run: (run["state"] not in RUNNING, run["age"]))[:MOST_SHOWN]


def read_plot(folder: Path, name: str) -> bytes:
    """The plot of a run that `recent_runs` shows.

    Raises:
        ValueError: if there is none.
    """
    # The name comes from a request: it is looked up, and never made a path.
    for run in recent_runs(folder):
        if run["name"] == name and (file := _file(folder, run["name"], PLOT_FILE)):
            return file.read_bytes()
    raise ValueError("this run has no plot")


def _file(folder: Path, run: str, name: str) -> Path | None:
    """A run's file, unless it is none, lies outside of the folder through a link, or is too large."""
    try:
        root = folder.resolve()
        file = (root / run / name).resolve(strict=True)
        found = file.stat()
    except (OSError, RuntimeError):  # there is none; links in a circle
        return None
    fits = stat.S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES[name]
    return file if fits and file.is_relative_to(root) else None


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return -math.inf


def _describe(folder: Path, name: str) -> JsonObject | None:
    try:
        status = read_status(folder)
        age = (datetime.now(timezone.utc) - datetime.fromisoformat(status["updated"])).total_seconds()
    except (UserError, OSError, RecursionError, ValueError, TypeError):  # TypeError: a time without its zone
        return None
    here = status.get("host") == platform.node()
    state, error = status["state"], status.get("error")
    if age > RECENT_SECONDS and not (state in RUNNING and here):
        return None
    numbers = {field: _number(status.get(field)) for field in ("step", "steps", "loss", "eval_loss", "seconds_left")}
    error = error[:LONGEST_ERROR].encode("utf-8", "replace").decode() if isinstance(error, str) else None
    return {"name": name, "state": state, "age": max(0, round(age)), **numbers, "error": error}


def _number(value: Json) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
    return value if good else None
