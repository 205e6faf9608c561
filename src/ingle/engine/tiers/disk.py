"""Pages on a disk: a file each, in a folder of the model's.

    DIR/<identity>/<first byte of the name>/<name>.kv

A file is written under another name and then renamed, so one that is there was once whole. It is believed only if it is
ours, a plain file of the right size, and what its head says of it is true: model, name, and a hash of all. Whatever is
wrong with it, it is taken away, and costs a line in the log.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ingle.device.pages import Bytes
from ingle.engine.tiers import IDENTITY_BYTES, NAME_BYTES
from ingle.errors import ConfigError, printable

logger = logging.getLogger("ingle")

_MAGIC = b"ingle kv 1\n"
_HASH_BYTES = 32
HEAD_BYTES = len(_MAGIC) + IDENTITY_BYTES + NAME_BYTES + _HASH_BYTES
_BLOCK_BYTES = 4096
"""A file takes whole ones of the disk."""
_FREE_BYTES = 512 << 20
"""Left to others on the disk."""
_PAUSE_S = 60.0
"""For which nothing is written after that failed, or lines of the log are held back."""
_OTHERS_SHARE = 32
"""Once such a share of the limit is written, a look at what other processes wrote."""
_LEFT_OVER_S = 600.0
"""After which a file that nobody finished is taken away."""
_IDENTITY = re.compile(f"[0-9a-f]{{{2 * IDENTITY_BYTES}}}")
_FIRST = re.compile("[0-9a-f]{2}")
_NAME = f"[0-9a-f]{{{2 * NAME_BYTES}}}"
_FILE = re.compile(rf"({_NAME})\.kv|\.{_NAME}\.\d+\.\d+\.part")
"""One that is whole, or one that is not yet."""


class DiskTier:
    """Up to so many bytes of files, those of other models included: of all of them the least recently used goes first.

    Any number of processes may share a folder; together they may exceed the limit by little for a while.
    """

    def __init__(self, folder: Path, max_bytes: int, page_bytes: int, identity: bytes) -> None:
        """Raises `ConfigError` for a folder that cannot be used, or that others may write to."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._page_bytes = page_bytes
        self._identity = identity
        self._lock = threading.Lock()
        self._files: OrderedDict[bytes, int] = OrderedDict()
        """Bytes of each, by identity and name; the least recently used is the first."""
        self.num_bytes = 0
        """Of all files."""
        self.num_damaged = 0
        self._num_written = 0
        """Bytes since the folder was last looked through."""
        self._paused_until_s = 0.0
        self._silent_until_s = 0.0
        self._parts = itertools.count()
        _make_private(folder)
        self._look_through()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, bytes) and self._identity + name in self._files

    def read(self, name: bytes, out: Bytes) -> bool:
        path = self._path(self._identity + name)
        try:
            fault = self._read(path, name, out)
        except FileNotFoundError:  # another process needed room
            self._drop(name)
            return False
        except OSError as error:
            fault = error.strerror or str(error)
        if fault is not None:
            self._drop(name)
            self._discard(path, fault)
            return False
        self.touch(name)
        return True

    def touch(self, name: bytes) -> None:
        key = self._identity + name
        with contextlib.suppress(OSError):
            os.utime(self._path(key), follow_symlinks=False)
        with self._lock, contextlib.suppress(KeyError):
            self._files.move_to_end(key)

    def _read(self, path: Path, name: bytes, out: Bytes) -> str | None:
        """What is wrong with the file, if anything is."""
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                return "it is no plain file"
            if found.st_uid != os.geteuid():
                return "it belongs to another user"
            if found.st_size != HEAD_BYTES + self._page_bytes:
                return f"it has {found.st_size} bytes in place of {HEAD_BYTES + self._page_bytes}"
            head = bytearray(HEAD_BYTES)
            if os.preadv(file, [head, out.data], 0) != found.st_size:
                return "it cannot be read to its end"
        finally:
            os.close(file)
        return None if head == self._head(name, out) else "its checksum, or its name in it, is not right"

    def write(self, name: bytes, page: Bytes) -> None:
        key = self._identity + name
        if key in self._files or time.monotonic() < self._paused_until_s:
            return
        path, size = self._path(key), _on_disk(HEAD_BYTES + self._page_bytes)
        part = path.with_name(f".{name.hex()}.{os.getpid()}.{next(self._parts)}.part")
        try:
            self._make_room(size)
            self._write(part, path, [self._head(name, page), page.data])
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._pause(error)
            return
        with self._lock:
            if key not in self._files:
                self.num_bytes += size
                self._num_written += size
            self._files[key] = size

    @staticmethod
    def _write(part: Path, path: Path, parts: list[bytes | memoryview]) -> None:
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.writev(file, parts) != sum(map(len, parts)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
        part.replace(path)

    def _make_room(self, size: int) -> None:
        """Raises `OSError` where the disk has none."""
        if self._num_written > self._max_bytes // _OTHERS_SHARE:
            self._look_through()
        while self.num_bytes + size > self._max_bytes and self._files:
            self._evict()
        free = os.statvfs(self._folder)
        if free.f_bavail * free.f_frsize < _FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _evict(self) -> None:
        with self._lock:
            if not self._files:  # another thread was here
                return
            key, size = self._files.popitem(last=False)
            self.num_bytes -= size
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.unlink()
        if key[:IDENTITY_BYTES] != self._identity:  # a model that is not served any more leaves nothing behind
            with contextlib.suppress(OSError):
                path.parent.rmdir()
                path.parent.parent.rmdir()

    def _pause(self, error: OSError) -> None:
        """A full disk is no reason to answer nobody."""
        self._paused_until_s = time.monotonic() + _PAUSE_S
        logger.warning(
            "--disk-cache %s: %s; nothing is written there for %.0f s",
            printable(str(self._folder)), error.strerror or error, _PAUSE_S,
        )  # fmt: skip

    def _drop(self, name: bytes) -> None:
        with self._lock:
            self.num_bytes -= self._files.pop(self._identity + name, 0)

    def _discard(self, path: Path, fault: str) -> None:
        self.num_damaged += 1
        with contextlib.suppress(OSError):
            path.unlink()
        if time.monotonic() >= self._silent_until_s:
            self._silent_until_s = time.monotonic() + _PAUSE_S
            logger.warning(
                "--disk-cache: %s is not used: %s (the %d. such file; more of them are counted in silence for %.0f s)",
                printable(str(path)), fault, self.num_damaged, _PAUSE_S,
            )  # fmt: skip

    def _head(self, name: bytes, page: Bytes) -> bytes:
        digest = hashlib.blake2b(_MAGIC + self._identity + name, digest_size=_HASH_BYTES)
        digest.update(page.data)
        return _MAGIC + self._identity + name + digest.digest()

    def _path(self, key: bytes) -> Path:
        name = key[IDENTITY_BYTES:].hex()
        return self._folder / key[:IDENTITY_BYTES].hex() / name[:2] / f"{name}.kv"

    def _look_through(self) -> None:
        """Which files there are, by the time of their last use. Other files than ours are left alone."""
        found = sorted(_files_in(self._folder))
        with self._lock:
            self._files = OrderedDict((key, size) for _, key, size in found)
            self.num_bytes = sum(self._files.values())
            self._num_written = 0


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _files_in(folder: Path) -> Iterator[tuple[int, bytes, int]]:
    """When each was last used, identity and name, and the bytes that it takes."""
    for model in _entries(folder, _IDENTITY):
        for first in _entries(Path(model.path), _FIRST):
            for entry in _entries(Path(first.path), _FILE):
                with contextlib.suppress(OSError):
                    found, name = entry.stat(follow_symlinks=False), entry.name.removesuffix(".kv")
                    if name.startswith("."):
                        if time.time() - found.st_mtime > _LEFT_OVER_S:
                            Path(entry.path).unlink()
                    elif name.startswith(first.name):
                        yield found.st_mtime_ns, bytes.fromhex(model.name + name), _on_disk(found.st_size)


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if pattern.fullmatch(entry.name) and not entry.is_symlink()]
    return []


def _make_private(folder: Path) -> None:
    shown = printable(str(folder))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"--disk-cache {shown}: {error.strerror}", alternative="give a folder of yours") from None
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"--disk-cache {shown}: others may write to it, and so to what is read from it",
            alternative="give a folder of yours, or take their right to write with chmod go-w",
        )
