"""Errors a user can mend, and the one place where they become a line on stderr."""

import errno
import os
from collections.abc import Sequence

# The operating system's ways to say that a disk takes no more.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


class UserError(ValueError):
    """A mistake the user can mend. Its text is one line that says what is wrong and how to mend it."""


class RecordError(UserError):
    """One bad record.

    Args:
        path: the JSONL file.
        line: line number in it, from 1.
        reason: what is wrong and what is expected instead.
    """

    def __init__(self, path: str | os.PathLike, line: int = 0, reason: str = ""):
        # A DataLoader worker's error is built again from its text alone, in the main process.
        super().__init__(f"{path}:{line}: {reason}" if reason else str(path))
        self.path = str(path)
        self.line = line
        self.reason = reason


def raise_all(errors: Sequence[RecordError], shown: int = 20) -> None:
    """Raise the first of `errors` in full, with the line numbers of the others; nothing if there are none.

    Raises:
        UserError: if `errors` is not empty.
    """
    if not errors:
        return
    text = str(errors[0])
    others = [str(e.line) if e.path == errors[0].path else f"{e.path}:{e.line}" for e in errors[1:]]
    if others:
        more = ", …" if len(others) > shown else ""
        text += f" (and {len(others)} more bad rows, on lines {', '.join(others[:shown])}{more})"
    raise UserError(text)
