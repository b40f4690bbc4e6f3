"""The predictions file: rows appear as they are finished, a stopped run goes on, the file appears in one piece.

While predict runs, finished rows are appended to <name>.jsonl.partial, batch by batch. Its first line holds the
settings and the batch plan; every other line is {"index": row number, "row": finished row}. A restart with the same
settings keeps the batches that are whole and does the others again: an answer can depend, in the last bits, on what
else is in its batch, so only whole batches make the end the same as that of a run that was never stopped.
"""

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject, atomic_write, check_target

PREDICTED = ("actual", "thinking", "confidence", "finish_reason", "error")  # the fields that predict adds to a record


def partial_of(path: str | os.PathLike) -> Path:
    """Where finished rows are until the file is."""
    return Path(f"{path}.partial")


def find_predictions(path: str | os.PathLike) -> Path:
    """The file itself, or as long as there is only its unfinished one, that."""
    partial = partial_of(path)
    return partial if not Path(path).exists() and partial.exists() else Path(path)


def row_in(path: Path, line: JsonObject | None) -> JsonObject | None:
    """The row that a line of a file holds, as `find_predictions` found it; None if it holds none.

    The first line of an unfinished one holds its settings.
    """
    row = line.get("row") if line and path.suffix == ".partial" else line
    return row if isinstance(row, dict) else None


class Predictions:
    """Rows on their way into a predictions file.

    Args:
        path: the file to make.
        settings: what decides the answers; it must be the same for a run to be continued.
        plan: row numbers of each batch, in the order of work.
        overwrite: start again instead of continuing.

    Attributes:
        done: finished rows by number.

    Raises:
        UserError: if a partial file with other settings is there.
    """

    def __init__(
        self, path: str | os.PathLike, settings: JsonObject, plan: Sequence[Sequence[int]], overwrite: bool = False
    ):
        self.path = check_target(path)
        self.partial = partial_of(path)
        self.plan = [list(batch) for batch in plan]
        self.done: dict[int, JsonObject] = {}
        self._settings = settings
        self._file: IO[str] | None = None
        if self.partial.exists() and not overwrite:
            self._read()

    @property
    def batches_left(self) -> list[list[int]]:
        """Batches of the plan that are not finished."""
        return [batch for batch in self.plan if batch[0] not in self.done]

    def add(self, batch: dict[int, JsonObject]) -> None:
        """Put one finished batch on the disk: rows by number, in the order of the plan."""
        assert list(batch) in self.plan
        if self._file is None:
            self._file = self._open()
        for index, row in batch.items():
            self._file.write(json.dumps({"index": index, "row": row}, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done |= batch

    def finish(self) -> None:
        """Write the file, rows in the order of the data, and remove the partial one."""
        if self._file:
            self._file.close()
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(self.done[i], ensure_ascii=False) + "\n" for i in sorted(self.done))
        self.partial.unlink(missing_ok=True)

    def _open(self) -> IO[str]:
        """The partial file, cut behind its last whole batch, or a new one."""
        if not self.done:
            with atomic_write(self.partial) as file:
                file.write(json.dumps({"settings": self._settings, "plan": self.plan}, ensure_ascii=False) + "\n")
        else:
            os.truncate(self.partial, self._end)
        return open(self.partial, "a", encoding="utf-8")

    def _read(self) -> None:
        """Take over the whole batches of the partial file, and note where the last of them ends."""
        with open(self.partial, "rb") as file:
            found, wanted = _parse(file.readline()), self._settings
            first = _parse(file.readline())
            if found is None or first is None:
                return  # nothing was finished
            if not isinstance(found.get("settings"), dict) or found["settings"].keys() != wanted.keys():
                raise UserError(f"{self.partial}: not readable as an unfinished run; --overwrite starts again")
            changed = [name for name, value in wanted.items() if found["settings"][name] != value]
            if changed:
                raise UserError(
                    f"{self.partial} is an unfinished run with another {', '.join(changed)}; --overwrite starts again"
                )
            # How many rows a batch has may depend on the GPU's free memory; a run is continued with its own batches.
            if sorted(chain(*found["plan"])) != sorted(chain(*self.plan)):
                raise UserError(f"{self.partial} is an unfinished run with other batches; --overwrite starts again")
            self.plan = found["plan"]
            file.seek(0)
            file.readline()
            for batch in self.plan:
                rows = [row for _ in batch if (row := _parse(file.readline()))]
                if [row["index"] for row in rows] != batch:
                    break
                self.done |= {row["index"]: row["row"] for row in rows}
                self._end = file.tell()


def _parse(line: bytes) -> JsonObject | None:
    """A line of the partial file; None if the run died while it was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
