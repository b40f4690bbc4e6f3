"""How an entry point reads its arguments and ends: the one place where errors become a line on stderr."""

import argparse
import importlib.util
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from mistral_ft.distributed import first_to_fail, lost_another
from mistral_ft.errors import DISK_FAULTS, UserError
from mistral_ft.html import visible


class OneLineErrors:
    """Mix-in for argument parsers: a wrong argument is a `UserError` instead of pages of usage."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser, with errors of one line."""


def run_step(main: Callable[[], int | None], unix_only: bool = False) -> None:
    """Run an entry point and exit: 0 or what `main` returns, 2 on a user's mistake, 130 on Ctrl-C.

    A user's mistake (`UserError`, or the operating system refusing a file) ends in one line on stderr. Anything else
    is our bug and keeps its traceback. Of several processes, the first one that fails says so.

    Args:
        main: the step.
        unix_only: whether the step needs file locks or signals that Windows lacks. There it is refused.
    """
    # What a scheduler sends is cleaned up after like Ctrl-C.
    for name in ("SIGTERM", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        # OpenMP's threads wait for each other after every product, and do so busily. Where another program took a core,
        # that made training 10 times slower. Waiting busily for about 0.1 ms only, training is 4 % slower on an idle
        # machine (bench/busy_machine.py). To be set before torch is imported; PASSIVE is for other OpenMPs.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "6000"}
    for name in ("stdout", "stderr"):  # None if the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open
    # transformers imports it wherever it is installed, and on CPUs with AVX512-BF16 it warns of a kernel not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Who reads a log or a pipe sees each line when it is printed; a name that the terminal cannot show is no crash.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        if unix_only and importlib.util.find_spec("fcntl") is None:
            raise UserError("this step needs Linux, macOS or WSL: Windows lacks its file locks and signals")
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        # From a DataLoader worker comes its whole traceback; what follows the error's name is ours.
        code = _fail(re.sub(r".*\bmistral_ft\.errors\.\w+: ", "", str(error), flags=re.DOTALL), 2)
    except KeyboardInterrupt as stop:
        code = _fail(str(stop) or "interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) went away: give the interpreter a stdout that it can flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FAULTS:
            raise
        code = _fail(f"{error.filename or 'cannot write'}: {error.strerror}", 2)
    except Exception as error:
        if "No space left on device" in str(error):  # as safetensors and torch pass it on
            code = _fail("no space left on the disk", 2)
        elif lost_another(error):
            code = _fail("another process of this run has ended; is it killed, or out of memory?", 1)
        elif first_to_fail("a bug"):
            raise
        else:
            code = 1
    sys.exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt("terminated")


def _fail(text: str, code: int) -> int:
    if first_to_fail(text):
        text = " ".join(text.split())
        print(f"error: {visible(text, len(text))}", file=sys.stderr)  # of a record, it may hold anything
    return code
