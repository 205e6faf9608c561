"""The server's log: written by a thread of its own, so that nothing waits for whoever reads it."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from datetime import datetime, timezone

import msgspec

from ingle.config.monitoring import LogFormat
from ingle.server.errors import current_request_id
from ingle.server.request_log import RequestRecord

_MAX_LINES = 10_000
"""That wait to be written. What comes then is dropped, and counted."""
_FLUSH_S = 1.0
LINE, TIME = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
"""What stands in a line of text, for `logging.Formatter`."""


class JsonLines(logging.Formatter):
    """A JSON object for each line, with the fields of a request's record where it tells of one."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        told: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        request: RequestRecord | None = getattr(record, "record", None)
        if request is None:
            told["message"] = record.getMessage()
            if (request_id := current_request_id.get()) != "-":
                told["id"] = request_id
        else:
            told |= request.fields()
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(_clean(told)).decode()


def _clean(told: dict[str, object]) -> dict[str, object]:
    """Without halves of characters, which JSON cannot say."""
    return {
        name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for name, value in told.items()
    }


def formatter(kind: LogFormat) -> logging.Formatter:
    return JsonLines() if kind == "json" else logging.Formatter(LINE, TIME)


class BackgroundLog(logging.Handler):
    """Writes lines to a file descriptor, such as stderr's. A pipe that nobody empties, or a full disk, stops nobody.

    It writes past Python's own stream, whose lock a blocked writer would hold against the end of the process.
    """

    def __init__(self, fd: int, max_lines: int = _MAX_LINES) -> None:
        super().__init__()
        self._fd = fd
        self._max_lines = max_lines
        self._lines: deque[bytes] = deque()
        self._num_dropped = 0
        self._num_failed = 0
        """Lines that could not be written since something last could."""
        self._is_torn = False
        """Whether the last that was written is half a line."""
        self._is_writing = False
        self._changed = threading.Condition(threading.Lock())
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception as error:  # not to the stream itself, which may block
            line = f"a line of {record.name} could not be written: {error!r}\n".encode(errors="backslashreplace")
        with self._changed:
            if len(self._lines) < self._max_lines:
                self._lines.append(line)
                self._changed.notify_all()
            else:
                self._num_dropped += 1

    def flush(self) -> None:
        """Waits until all is written, for a second at most."""
        deadline = time.monotonic() + _FLUSH_S
        with self._changed:
            while self._lines or self._is_writing:
                if not self._changed.wait(deadline - time.monotonic()):
                    return

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                self._is_writing = True
                data = b"".join(self._lines)
                self._lines.clear()
                num_dropped, self._num_dropped = self._num_dropped, 0
            if num_dropped:
                data += self._note(f"{num_dropped} lines were dropped here: the log was not read in time")
            self._write_after_gap(data)

    def _note(self, text: str) -> bytes:
        """A line of the log's own."""
        return self.format(logging.LogRecord("ingle", logging.WARNING, "", 0, text, None, None)).encode() + b"\n"

    def _write_after_gap(self, data: bytes) -> None:
        """Says first how much is missing, if anything is. A disk may have room again."""
        gap = b"\n" if self._is_torn else b""
        if self._num_failed:
            gap += self._note(f"{self._num_failed} lines are missing here: they could not be written")
        whole = gap + data
        num_written = self._write(memoryview(whole))
        if num_written > len(gap):
            self._num_failed = 0
        if num_written:
            self._is_torn = whole[num_written - 1 : num_written] != b"\n"
        self._num_failed += whole[max(num_written, len(gap)) :].count(b"\n")

    def _write(self, data: memoryview) -> int:
        """The number of bytes that went out, which is less than all where nobody will read it, or the disk is full."""
        num_written = 0
        while num_written < len(data):
            try:
                num_written += os.write(self._fd, data[num_written:])
            except BlockingIOError:  # the terminal, or another process that shares the pipe, has made it so
                select.select([], [self._fd], [])
            except OSError:  # the log has no other place to say so
                break
        return num_written
