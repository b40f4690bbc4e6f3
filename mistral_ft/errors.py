"""Errors a user can mend, and the one place where they become a line on stderr."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(ValueError):
    """A mistake the user can mend. Its text is one line that says what is wrong and how to mend it."""


class RecordError(UserError):
    """One bad record.

    Args:
        path: the JSONL file.
        line: line number in it, from 1.
        reason: what is wrong and what is expected instead.
    """

    def __init__(self, path: str | os.PathLike, line: int, reason: str):
        super().__init__(f"{path}:{line}: {reason}")
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
    others = [str(e.line) for e in errors[1:]]
    if others:
        more = ", …" if len(others) > shown else ""
        text += f" (and {len(others)} more bad rows, on lines {', '.join(others[:shown])}{more})"
    raise UserError(text)


class OneLineErrors:
    """Mix-in for argument parsers: a wrong argument is a `UserError` instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser, with errors of one line."""


def run_step(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit: 0 or what `main` returns, 2 on a user's mistake, 130 on Ctrl-C.

    A user's mistake (`UserError`, or the operating system refusing a file) ends in one line on stderr. Anything else
    is our bug and keeps its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) went away: give the interpreter a stdout that it can flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.filename is None:
            raise
        code = _fail(f"{error.filename}: {error.strerror}", 2)
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
