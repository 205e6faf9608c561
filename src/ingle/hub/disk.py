"""What models need of a disk: locks, digests, room, and its refusals in one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ingle import facts
from ingle.errors import ModelError

CHUNK_BYTES = 1 << 20
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class NotAllowed(ModelError):
    """What is another user's, or on a disk that can only be read."""


@contextmanager
def disk_errors(doing: str, setting: str = "INGLE_HOME") -> Iterator[None]:
    """Turn the system's refusal into a `ModelError` that says what could not be done, and where.

    `setting` is the variable that says where the folder is.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise ModelError(
                f"cannot {doing}: the disk is full ({error.strerror}): {more_room(setting)}; what has come stays"
            ) from error
        where = f": {error.filename}" if error.filename is not None else ""
        message = f"cannot {doing}: {error.strerror or error}{where}"
        if error.errno in _NOT_ALLOWED:
            instead = f"get the right to it, or point {setting} to a folder of your own"
            raise NotAllowed(message, alternative=instead) from error
        raise ModelError(message) from error


def more_room(setting: str) -> str:
    return f"make room, or point {setting} to another disk"


def check_space(folder: Path, need: int, doing: str, setting: str = "INGLE_HOME") -> None:
    """Raises `ModelError` where the disk of a folder, which need not exist, has no room for `need` bytes."""
    while not folder.exists():
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a file system that does not say
        return
    if free < need:
        raise ModelError(
            f"{doing} needs {facts.decimal_size(need)} of disk space, {folder} has {facts.decimal_size(free)} free",
            alternative=more_room(setting),
        )


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the right to change what the file at `path` stands for; yields its descriptor. Calls `on_wait` before it
    waits for another, which may raise instead.

    A child process that inherits the descriptor holds the lock too, until both have gone. The file stays: deleting it
    would let a third process lock a new file of that name while a second one holds the old. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield descriptor
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Whatever it is, if it is there; what a link points to is not ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hashed.update(chunk)
    return hashed.hexdigest()
