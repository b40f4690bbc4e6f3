"""Checkpoints that are whole or not there: written aside, proven by a manifest, and older ones removed only then."""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mistral_ft.distributed import from_first, gather, rank
from mistral_ft.errors import DISK_FAULTS, UserError
from mistral_ft.files import fsync_path, read_json, settle, sha256_file, write_json

MANIFEST = "manifest.json"  # sizes and hashes of a checkpoint's files; written last
# What Trainer writes beside it and nothing reads: its arguments, as a pickle.
NEEDLESS = ("training_args.bin",)
# How safetensors and torch pass on that the disk takes no more; torch has no error number.
DISK_WORDS = ("No space left on device", "iostream error", "inline_container", "PytorchStreamWriter")


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a folder checkpoint-<step>, -1 for other names."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def newest_first(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, by step; clocks and the files' times have no say."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if every one has the size and hash of the manifest."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        for name, (size, digest) in files.items():
            path = checkpoint / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if sha256_file(path) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint of a run whose files are all as they were written; those passed over are named."""
    for checkpoint in newest_first(folder):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint
        print(f"warning: {checkpoint}: passed over, {problem}", file=sys.stderr)
    return None


def check_room(folder: Path, size: int) -> None:
    """Raises UserError if the disk has no room for checkpoints of `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        # Rounded so that what is needed never looks like what is there.
        raise UserError(
            f"{folder}: checkpoints need {math.ceil(size / 1e6):,} MB, but the disk has {int(free / 1e6):,} MB free; "
            "make room, or lower --save_total_limit"
        )


@contextlib.contextmanager
def writing(run: Path, step: int, size: int, due: bool) -> Iterator[Path]:
    """Write the checkpoint of a step: yields a hidden folder in which every process puts files into checkpoint-<step>/.

    Then the first process adds the manifest, flushes all to the disk, and gives the checkpoint its name. The earlier
    checkpoints are untouched: see `remove_old`.

    Args:
        size: bytes to expect.
        due: whether the run's arguments ask for it; else it is there for the best step, or because the run was stopped.

    Raises:
        UserError: if the disk takes no more.
    """
    staging, final = run / f".checkpoint-{step}.tmp", run / f"checkpoint-{step}"
    inner = staging / final.name

    def prepare() -> None:
        for left in run.glob(".checkpoint-*.tmp"):
            shutil.rmtree(left)
        check_room(run, size)
        inner.mkdir(parents=True)

    try:
        from_first(prepare)
        yield staging
        gather(None)  # all have written
        from_first(lambda: _complete(inner, final, step, due))  # nobody goes on, or ends, before it is safe
    except BaseException as error:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        refused = isinstance(error, OSError) and error.errno in DISK_FAULTS
        if refused or any(words in str(error) for words in DISK_WORDS):
            raise UserError(f"{final}: cannot be written, the checkpoints before it are kept: {error}") from error
        raise
    if rank() == 0:
        shutil.rmtree(staging)


def remove_old(run: Path, step: int, keep: int | None, best: int | None, origin: int | None) -> None:
    """Remove what the checkpoint of a step, now that it is safe, has made superfluous.

    Those that the run's arguments asked for stay, all or `keep` of them; of the others the step's own, the best step's
    and the one that the run was continued from.

    Args:
        keep: how many may stay, the best not counted if it is not among the newest; None: all of these.
        best: the step whose adapter is the best; None: that is not wanted.
        origin: the step that the run was continued from.
    """
    # Later ones are from before the run was continued at an earlier one: it replaces them when it gets there.
    made = [checkpoint for checkpoint in newest_first(run) if step_of(checkpoint) <= step]
    staying = [checkpoint for checkpoint in made if step_of(checkpoint) in (step, best, origin) or _is_due(checkpoint)]
    for old in made:
        if old not in staying[: keep or None] and step_of(old) != best:
            _remove(old)


def remove_all_unless_due(run: Path) -> None:
    """Remove the checkpoints of a run that is over, if its arguments asked for none of them."""
    if not any(map(_is_due, newest_first(run))):
        for checkpoint in newest_first(run):
            _remove(checkpoint)


def _is_due(checkpoint: Path) -> bool:
    """Whether a run's arguments asked for a checkpoint; who cannot tell leaves it."""
    try:
        return read_json(checkpoint / MANIFEST).get("due", True)
    except (OSError, ValueError, AttributeError):
        return True


def _complete(inner: Path, final: Path, step: int, due: bool) -> None:
    for name in NEEDLESS:
        (inner / name).unlink(missing_ok=True)
    files = {}
    for path in sorted(inner.iterdir()):
        settle(path)
        files[path.name] = (path.stat().st_size, sha256_file(path))
    write_json(inner / MANIFEST, {"step": step, "due": due, "files": files})
    fsync_path(inner)
    if final.exists():  # a broken one, which a run that was continued from an earlier one has passed over
        _remove(final)
    os.replace(inner, final)
    fsync_path(final.parent)


def _remove(checkpoint: Path) -> None:
    """Take the name away first: who is killed in the middle leaves no half of a checkpoint under it."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)
