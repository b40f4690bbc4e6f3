"""Ending a run from outside: the first signal asks for it, a second one insists."""

import signal
import sys
import time
from types import TracebackType
from typing import NoReturn

from mistral_ft.data.workers import SIGNALS


class Stop:
    """While it is entered, a signal is noted instead of ending the process.

    Attributes:
        requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested and number != signal.SIGUSR1:
            insist()
        self.requested = True
        print(f"{signal.Signals(number).name}: saving after this step; again ends at once", file=sys.stderr, flush=True)


def insist() -> NoReturn:
    """End now."""
    raise KeyboardInterrupt("ended before it could save")


class Timer:
    """Says when so many minutes have passed, by a clock that nobody sets.

    Args:
        minutes: None never.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else minutes * 60
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.monotonic() - self.started >= self.seconds
