"""Files that appear whole or not at all, and their fingerprints."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mistral_ft.errors import DISK_FAULTS, UserError

Json = Any  # a value that JSON has
JsonObject = dict[str, Json]


def check_target(path: str | os.PathLike) -> Path:
    """The path, if a file can be written there as far as one can see.

    Raises:
        UserError: if it is a folder, or its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder to write {path.name} into")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'device or a pipe'}; give a file")
    return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success fsync it and rename it to `path`, on failure remove it."""
    path = check_target(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # mkstemp makes files that only their owner can read; give them what open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_new_folder(path: str | os.PathLike) -> Path:
    """The path, links resolved, if a folder can be made there.

    Raises:
        UserError: if there is something other than an empty folder, or a disk is mounted there.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; give a new one")
    if path.is_mount():
        raise UserError(f"{path}: is where a disk is mounted and cannot be replaced; give a folder in it")
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a temporary folder beside `path`; on success fsync its files and rename it to `path`, on failure remove it.

    What a killed process left of an earlier try is removed first.

    Raises:
        UserError: if `path` is there and no empty folder, or the disk takes no more.
    """
    path = check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with _lock(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        with _lock(temporary):
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    settle(file)
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = error if isinstance(error, OSError) and error.errno in DISK_FAULTS else None
        if full and Path(full.filename or temporary).is_relative_to(temporary):
            raise UserError(f"{path}: cannot be written, nothing was kept: {full.strerror}") from error
        raise


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which the system lets go when the process dies; False if it cannot be had.

    That is so while another process holds it, and on disks of other machines that know no such locks.
    """
    import fcntl  # not on Windows, where score and others need only the rest of this module

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def check_free_space(folder: str | os.PathLike, size: int) -> None:
    """Raises UserError if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{Path(folder).parent}: {size / 1e9:.1f} GB are needed there, but its disk has {free / 1e9:.1f} GB free"
        )


def settle(path: str | os.PathLike) -> None:
    """Give a file the permissions open() would have given (safetensors writes for its owner alone) and fsync it."""
    os.chmod(path, 0o666 & ~_umask())
    fsync_path(path)


def fsync_path(path: str | os.PathLike) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # Windows opens no folders, nor does Linux those that may only be written
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, data: Json) -> None:
    """Write `data` as indented JSON, atomically; bytes of file names that are no UTF-8 become JSON's escapes."""
    with atomic_write(path, "wb") as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_json(path: str | os.PathLike) -> Json:
    """Read one JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_settings(path: str | os.PathLike) -> JsonObject:
    """Read a JSON object that a user's folder must hold, such as a config.json.

    Raises:
        UserError: if it is missing or broken.
    """
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: broken: holds no JSON object")
    return data


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
