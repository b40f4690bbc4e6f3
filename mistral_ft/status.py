"""What a run is doing, in a file beside it that scripts and pages can poll: output/<name>/status.json.

    {"state": "training", "step": 120, "steps": 300, "epoch": 1.2, "loss": 0.31, "tokens_per_second": 2210.0,
     "seconds_left": 340, "pid": 4711, "host": "box", "updated": "2026-01-31T12:00:00+00:00"}

`state` is preparing, training, evaluating, saving, done, failed (then `error` says why) or stopped (by Ctrl-C or a
signal, with a checkpoint to go on from). A process that is killed can write nothing more: `read_status` tells that by
`pid`, on the `host` where it ran, and returns the state dead. Elsewhere, go by `updated`: a run writes at every step,
but at most every two seconds.
"""

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from mistral_ft.distributed import rank
from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject, read_settings, write_json

STATUS_FILE, PLOT_FILE = "status.json", "loss.svg"
RUNNING = ("preparing", "training", "evaluating", "saving")
ENDED = ("done", "failed", "stopped", "dead")
SECONDS = 2.0  # between two writes in one state


class Status:
    """Writes the status of a run; of several processes the first one does.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self.path = folder / STATUS_FILE
        self.fields: JsonObject = {"state": None}
        self.written = -math.inf

    def update(self, state: str, **fields: Json) -> None:
        """Take over what is known now, but for NaN and Infinity; written at once if the state is another."""
        now, changed = time.monotonic(), state != self.fields["state"]
        known = (self.fields | {"state": state, **fields}).items()
        self.fields = {k: v for k, v in known if not isinstance(v, float) or math.isfinite(v)}
        if rank() or not (changed or now - self.written >= SECONDS):
            return
        self.written = now
        who = {"pid": os.getpid(), "host": platform.node()}
        updated = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(self.path, self.fields | who | {"updated": updated})

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """On leaving, write how the run ended: done, stopped or failed."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError, UserError):  # a full disk: what went wrong is said anyway
                state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                self.update(state, error=" ".join(str(error).split()) or type(error).__name__)
            raise
        self.update("done", seconds_left=0)


def read_status(folder: str | os.PathLike) -> JsonObject:
    """A run's status, its state `dead` if the process that wrote it is no more.

    Raises:
        UserError: if there is none, or it is broken.
    """
    path = Path(folder) / STATUS_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; is {folder} the folder of a run?")
    status = read_settings(path)
    if status.get("state") not in (*RUNNING, *ENDED) or not isinstance(status.get("updated"), str):
        raise UserError(f"{path}: broken: does not say what the run does")
    here = status.get("host") == platform.node()
    if status["state"] in RUNNING and here and not _alive(status.get("pid")):
        status["state"] = "dead"
    return status


def _alive(pid: Json) -> bool:
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
