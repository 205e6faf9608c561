"""Parts of files that lie on a hub, several at a time, into files of the true size that are holes but for these parts.

A hub is not trusted: how much is taken is bounded for each file and for all together, whatever it says of sizes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ingle import facts
from ingle.hub.http import RETRY_DELAYS_S, Http, HubError, NotConnected, Unreachable, wait_before_retry
from ingle.hub.threads import side_by_side

MAX_FILE_BYTES = 1 << 42
"""No file of a model is larger, and file systems and address spaces take holes of this size."""
MAX_TAKEN_BYTES = 512 << 20
"""Of all files together."""
_AT_ONCE = 32
_SKIPPED_BYTES = 64 << 20
"""That may be read for nothing where a server sends files from their beginning only."""
_QUIET_S = 2.0


@dataclass
class Hollow:
    """A file on a hub, and its stand-in here."""

    url: str
    path: Path
    name: str
    """For people."""
    size: int | None = None
    """Bytes; None until the first part of it came, where nobody says before."""

    def write(self, start: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(data)


@dataclass
class Pieces:
    """Reads them. `note` is told why it takes long."""

    http: Http
    note: Callable[[str], None]
    taken: int = 0
    """Bytes, of all files."""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def take(self, file: Hollow, start: int, size: int) -> bytes:
        """So many bytes of a file, fewer at its end, which are written into its stand-in too.

        Raises `HubError`.
        """
        if file.size is not None:
            size = max(min(size, file.size - start), 0)
        if not size and file.size is not None:
            self._open(file, file.size)
            return b""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                data = self._attempt(file, start, size)
                break
            except NotConnected:
                raise
            except Unreachable as error:
                if delay is None or self._stopped.is_set():
                    raise
                wait_before_retry(error, delay, self.note, self._stopped)
        file.write(start, data)
        return data

    def whole(self, file: Hollow, max_bytes: int) -> bytes:
        """All of a small file. Raises `HubError` for a larger one."""
        if file.size is not None and file.size > max_bytes:
            raise HubError(f"{file.name} has {file.size} bytes, more than the {max_bytes} that are taken of it")
        data = self.take(file, 0, max_bytes if file.size is None else file.size)
        if file.size is not None and file.size > len(data):
            raise HubError(f"{file.name} has {file.size} bytes, more than the {max_bytes} that are taken of it")
        return data

    def side_by_side(self, work: Sequence[Callable[[], None]], what: str) -> None:
        """Does all of it, in threads. Raises the first error."""
        told_s, wait_s = time.monotonic(), _QUIET_S

        def watch() -> None:
            nonlocal told_s, wait_s
            if time.monotonic() - told_s > wait_s:
                told_s, wait_s = time.monotonic(), 2 * wait_s
                self.note(f"{what}: {facts.decimal_size(self.taken)} so far")

        side_by_side(work, _AT_ONCE, self._stopped, watch=watch, hang_up=self.http.close)

    def _attempt(self, file: Hollow, start: int, size: int) -> bytes:
        byte_range = None if (start, size) == (0, file.size) else f"bytes={start}-{start + size - 1}"
        with self.http.open(file.url, byte_range) as body:
            self._check(file, body.total)
            skip = start - body.start
            if skip < 0 or skip > _SKIPPED_BYTES:
                raise HubError(f"{body.host} sends {file.name} only as a whole: `ingle pull` brings it")
            assert file.size is not None
            most = skip + min(size, file.size - start)
            self._count(most, file)
            read = bytearray()
            for chunk in body.chunks():
                read += chunk
                if len(read) >= most:
                    break
        if len(read) < most:
            raise Unreachable(f"{file.name}: the connection ended after {len(read)} of {most} bytes")
        return bytes(read[skip:most])

    def _check(self, file: Hollow, total: int | None) -> None:
        """Of its size, by what is sent of it."""
        if file.size is None and total is None:
            raise HubError(f"{file.name}: the server does not say how large it is")
        if file.size is not None and total is not None and total != file.size:
            raise HubError(
                f"{file.name}: the hub says {file.size} bytes, and the server {total}",
                alternative=f"a mirror that is behind or broken: {self.http.elsewhere}",
            )
        size = total if file.size is None else file.size
        assert size is not None
        self._open(file, size)

    def _open(self, file: Hollow, size: int) -> None:
        """Its stand-in, all hole at first."""
        if not 0 <= size <= MAX_FILE_BYTES:
            raise HubError(f"{file.name}: {size} bytes are more than any file of a model has")
        if file.size != size or not file.path.exists():
            file.path.parent.mkdir(parents=True, exist_ok=True)
            with file.path.open("wb") as out:
                out.truncate(size)
            file.size = size

    def _count(self, size: int, file: Hollow) -> None:
        with self._counting:
            self.taken += size
            if self.taken > MAX_TAKEN_BYTES:
                raise HubError(f"{file.name}: what describes the model is larger than {MAX_TAKEN_BYTES >> 20} MiB")
