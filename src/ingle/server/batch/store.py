"""Files and batches on disk: what is there is all there is, so that a server that starts anew goes on with it.

    files/<id>.json  files/<id>.data                 what is said of a file, and the file
    batches/<id>/batch.json                          a batch; written by the worker alone, once it has begun
    batches/<id>/cancel                              somebody wants it to end
    batches/<id>/input.jsonl                         the input file, which lives on here if it is deleted
    batches/<id>/output.jsonl  errors.jsonl          what has become of lines so far

Names of files come from here, never from a client: an id is looked at before it becomes one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ingle.errors import RequestError
from ingle.limits import LimitsConfig
from ingle.server.batch.records import ENDED, Batch, File, KeptFile, StoredBatch

MAX_FILES, MAX_BATCHES = 10_000, 1_000
KEEP_S = 30 * 86_400
"""For how long a file is kept unless its upload says otherwise, and a batch after its end."""
_FILE_ID, _BATCH_ID = re.compile(r"file-[0-9a-f]{32}"), re.compile(r"batch_[0-9a-f]{32}")
_RecordT = TypeVar("_RecordT", bound=msgspec.Struct)


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


def no_file(file_id: str) -> RequestError:
    return RequestError(f"There is no file {file_id!r:.80}.", param="file_id", code="not_found", status=404)


def no_batch(batch_id: str) -> RequestError:
    return RequestError(f"There is no batch {batch_id!r:.80}.", param="batch_id", code="not_found", status=404)


class Store:
    """Blocking, but for what only looks at one record; safe to use from any thread."""

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        now: Callable[[], float] = time.time,
        limits: LimitsConfig = LimitsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.root = root
        self.limits = limits
        """Of one file, and of the lines of one batch."""
        self.max_bytes = max_bytes
        self.now = now
        self._lock = threading.Lock()
        self._num_coming = 0
        """Bytes of uploads that are on their way."""

    # ---- files

    def files(self) -> list[KeptFile]:
        """All that have not expired, the oldest first."""
        found = (self._read(path, KeptFile) for path in self._folder("files").glob("file-*.json"))
        now = self.now()
        kept = [file for file in found if file is not None and (file.expires_at is None or file.expires_at > now)]
        return sorted(kept, key=lambda file: (file.created_at, file.id))

    def file(self, file_id: str) -> KeptFile:
        """Raises `RequestError` (404)."""
        file = self._read(self._folder("files") / f"{file_id}.json", KeptFile) if _FILE_ID.fullmatch(file_id) else None
        if file is None or (file.expires_at is not None and file.expires_at <= self.now()):
            raise no_file(file_id)
        return file

    def content(self, file_id: str) -> Path:
        """Raises `RequestError` (404)."""
        return self._folder("files") / f"{self.file(file_id).id}.data"

    def delete(self, file_id: str) -> None:
        """Raises `RequestError` (404)."""
        self._drop(self.file(file_id).id)

    def _drop(self, file_id: str) -> None:
        for suffix in (".json", ".data"):
            (self._folder("files") / f"{file_id}{suffix}").unlink(missing_ok=True)

    def incoming(self, owner: str = "") -> Incoming:
        """For a file that arrives piece by piece. Raises `RequestError` where there are too many."""
        folder = self._make("files")
        if len(list(folder.glob("file-*.json"))) >= MAX_FILES:
            raise RequestError(
                f"The server keeps {MAX_FILES} files already: delete some.", status=413, code="storage_full"
            )
        return Incoming(self, folder / f"{new_file_id()}.part", self._num_stored(), owner)

    def reserve(self, num_bytes: int, num_stored: int) -> None:
        """Raises `RequestError` where that is more than there is room for beside what is stored."""
        with self._lock:
            if num_stored + self._num_coming + num_bytes > self.max_bytes:
                raise RequestError(
                    f"The server keeps up to {self.max_bytes} bytes of files, and this is more: delete some.",
                    status=413,
                    code="storage_full",
                )
            self._num_coming += num_bytes

    def release(self, num_bytes: int) -> None:
        """What was reserved is stored, or not wanted any more."""
        with self._lock:
            self._num_coming -= num_bytes

    def _num_stored(self) -> int:
        total = 0
        for pattern in ("files/*.data", "batches/*/*.jsonl"):
            for path in self.root.glob(pattern):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size
        return total

    def keep(self, file: KeptFile, content: Path) -> None:
        """Takes over the content, or does so again where that was cut off. What is said of it comes last: without that
        there is no file."""
        data = self._make("files") / f"{file.id}.data"
        is_new = _link(content, data)
        try:
            self._write(self._folder("files") / f"{file.id}.json", file)
        except OSError:
            if is_new:
                data.unlink(missing_ok=True)
            raise
        content.unlink()

    # ---- batches

    def batches(self) -> list[StoredBatch]:
        """The oldest first."""
        found = (self._read(path, StoredBatch) for path in self._folder("batches").glob("batch_*/batch.json"))
        return sorted((each for each in found if each is not None), key=lambda s: (s.batch.created_at, s.batch.id))

    def batch(self, batch_id: str) -> Batch:
        """As it is shown. Raises `RequestError` (404)."""
        return self.shown(self.stored_batch(batch_id))

    def stored_batch(self, batch_id: str) -> StoredBatch:
        """Raises `RequestError` (404)."""
        path = self.batch_folder(batch_id) / "batch.json" if _BATCH_ID.fullmatch(batch_id) else None
        stored = None if path is None else self._read(path, StoredBatch)
        if stored is None:
            raise no_batch(batch_id)
        return stored

    def shown(self, stored: StoredBatch) -> Batch:
        batch, asked_at = stored.batch, self.cancel_asked_at(stored.batch.id)
        if asked_at is not None and batch.status not in ENDED:
            batch.status, batch.cancelling_at = "cancelling", asked_at
        return batch

    def batch_folder(self, batch_id: str) -> Path:
        return self._folder("batches") / batch_id

    def add_batch(self, stored: StoredBatch) -> None:
        """Raises `RequestError` where its input is gone, or there are too many."""
        if len(self.batches()) >= MAX_BATCHES:
            raise RequestError(f"The server keeps {MAX_BATCHES} batches already.", code="too_many_batches", status=429)
        folder, content = self.batch_folder(stored.batch.id), self.content(stored.batch.input_file_id)
        folder.mkdir(parents=True)
        _link(content, folder / "input.jsonl")
        self.save(stored)

    def save(self, stored: StoredBatch) -> None:
        self._write(self.batch_folder(stored.batch.id) / "batch.json", stored)

    def ask_to_cancel(self, batch_id: str) -> Batch:
        """Raises `RequestError` for one that is not there, or has ended."""
        batch = self.batch(batch_id)
        if batch.status in ENDED:
            raise RequestError(f"The batch {batch_id} has ended: it is {batch.status}.", code="batch_ended")
        (self.batch_folder(batch.id) / "cancel").touch(exist_ok=True)
        return self.batch(batch_id)

    def cancel_asked_at(self, batch_id: str) -> int | None:
        try:
            return int((self.batch_folder(batch_id) / "cancel").stat().st_mtime)
        except OSError:
            return None

    def sweep(self) -> None:
        """Removes what has expired, and what uploads and deletions left behind that were cut off."""
        now = self.now()
        for path in self._folder("files").glob("file-*.json"):
            file = self._read(path, KeptFile)
            if file is not None and file.expires_at is not None and file.expires_at <= now:
                self._drop(file.id)
        for path in (*self._folder("files").glob("file-*.part"), *self._folder("files").glob("file-*.data")):
            with contextlib.suppress(OSError):
                if not path.with_suffix(".json").exists() and path.stat().st_mtime < now - 86_400:
                    path.unlink()
        for stored in self.batches():
            if stored.batch.status in ENDED and stored.batch.created_at + KEEP_S < now:
                shutil.rmtree(self.batch_folder(stored.batch.id), ignore_errors=True)

    # ---- records

    def _folder(self, name: str) -> Path:
        return self.root / name

    def _make(self, name: str) -> Path:
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    @staticmethod
    def _read(path: Path, kind: type[_RecordT]) -> _RecordT | None:
        """None for one that is gone, or was damaged."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError):
            return None

    @staticmethod
    def _write(path: Path, record: msgspec.Struct) -> None:
        """Whole, or not at all."""
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with new.open("xb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _link(content: Path, other: Path) -> bool:
    """The same content by another name. Whether there was none of it before."""
    try:
        os.link(content, other)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            shutil.copyfile(content, other)
        except BaseException:
            other.unlink(missing_ok=True)
            raise
    return True


class Incoming:
    """A file on its way: kept if it is told to be, else gone at the end of the context."""

    def __init__(self, store: Store, path: Path, num_stored: int, owner: str) -> None:
        self._store, self._path, self._num_stored, self._owner = store, path, num_stored, owner
        self._file = path.open("xb")
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """Raises `RequestError` where it grows beyond what there is room for."""
        limits = self._store.limits
        if self.num_bytes + len(data) > limits.max_file_bytes:
            raise RequestError(
                f"The file is larger than {limits.max_file_bytes} bytes{limits.by('max_file_bytes')}.",
                code="file_too_large",
                status=413,
            )
        self._store.reserve(len(data), self._num_stored)
        self.num_bytes += len(data)
        self._file.write(data)

    def keep(self, filename: str, purpose: str, keep_s: int) -> File:
        self._file.flush()
        os.fsync(self._file.fileno())
        now = int(self._store.now())
        file = KeptFile(id=self._path.stem, bytes=self.num_bytes, created_at=now, expires_at=now + keep_s,
                        filename=filename, purpose=purpose, owner=self._owner)  # fmt: skip
        self._store.keep(file, self._path)
        return file.shown()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *error: object) -> None:
        self._store.release(self.num_bytes)
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the rest of what did not fit on the disk
            self._file.close()
