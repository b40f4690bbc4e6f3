"""Worker processes that read pages: batches reach the main process, or it says in one line why they do not."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from mistral_ft.data.collators import Batch
from mistral_ft.errors import UserError

KILLED = "a process that reads pages was killed; is the machine short of memory?"
_watched: set[BaseProcess] = set()

# Ctrl-C, and what schedulers send ahead of taking the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class WorkerLost(UserError):
    """A worker process has ended before its work."""


class Sending:
    """A collator whose batches leave a worker process also where /dev/shm has no room for them.

    torch sends tensors through it. In most containers it has 64 MB: a worker that finds no room would print a traceback
    and drop the batch, and the main process would wait for it for ever.

    Args:
        collate: makes a batch.
    """

    def __init__(self, collate: Callable[[Any], Batch]):
        self.collate = collate

    def __call__(self, examples: Any) -> "Batch | InFile":
        batch = self.collate(examples)
        if get_worker_info() is None:
            return batch
        try:
            for tensor in vars(batch).values():
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    tensor.share_memory_()
        except RuntimeError:
            return InFile(batch)
        return batch


class InFile:
    """A batch in a temporary file; where it is received, it is read and the file is removed."""

    def __init__(self, batch: Batch):
        with tempfile.NamedTemporaryFile(prefix="mistral_ft-", delete=False) as file:
            torch.save(vars(batch), file)
        self.path = file.name

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (self.path,)


def _take(path: str) -> Batch:
    try:
        return Batch(**torch.load(path, weights_only=True))
    finally:
        os.unlink(path)


def usable_workers(wanted: int) -> int:
    """The number of workers to start: none where the system has no room for what they share, which is said."""
    try:
        # Queues and events are made of semaphores, and those are files in /dev/shm.
        locks = [multiprocessing.Lock() for _ in range(16 * wanted)]
    except OSError as error:
        print(f"Reading pages without worker processes, which have no room in /dev/shm: {error.strerror}")
        return 0
    del locks
    return wanted


def start_worker(number: int) -> None:
    """Set up a DataLoader's worker.

    A signal to all processes at once must not take the next step's pages away; and a batch that cannot be sent must
    not be waited for, so the worker ends with it.
    """
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """SIGTERM is obeyed if the parent sent it, which ends its workers so."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _check(number: int = 0, frame: object = None) -> None:
    """Raises WorkerLost if a worker has ended otherwise than by itself."""
    for worker in list(_watched):
        if worker.exitcode is not None:
            _watched.discard(worker)
            if worker.exitcode:
                _watched.clear()
                raise WorkerLost(KILLED)


@contextlib.contextmanager
def waiting_for_workers() -> Iterator[None]:
    """Wait for a batch of workers that run.

    Raises:
        WorkerLost: as soon as one has ended. torch's own handler would raise wherever the main process is just then,
            such as in the middle of an optimizer step.
    """
    _watched.update(multiprocessing.active_children())
    signal.signal(signal.SIGCHLD, _check)
    try:
        _check()
        yield
    except RuntimeError as error:  # torch looks after its workers at every error, ours included
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerLost(KILLED) from None
    except (OSError, EOFError):  # of a pipe to a worker that is about to be seen to have ended
        for _ in range(20):
            _check()
            time.sleep(0.05)
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def batches(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches.

    Raises:
        WorkerLost: if a worker has ended.
    """
    iterator = iter(loader)
    while True:
        with waiting_for_workers():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
