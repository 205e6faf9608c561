"""Messages of one process to several others, through memory that they share: written once, read by each at its pace.

The memory has no name: it is handed down as a file descriptor, and is gone with the last process that has it.

A message is written in pieces, each behind its number and length. The number of the last piece is also the word that
readers wait on (futex(2)); before they sleep they look at it for a moment. How far each reader is, it says itself, and
the writer overwrites nothing that one of them has not read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable

CAPACITY = 16 << 20
_LINE = 64
"""Bytes between words that different processes write."""
_SPIN_S = 50e-6
"""For which a reader looks before it sleeps: about what waking up takes."""
_POLL_S = 200e-6
_MORE = 1 << 31
"""Of a piece's length: others of the message follow."""
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_WAIT, _WAKE, _ALL = 0, 1, 0x7FFFFFFF


def shared_memory(num_readers: int, capacity: int = CAPACITY) -> int:
    """The descriptor of memory for a ring. Whoever has it closes it."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("ingle ranks", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, _start_of_data(num_readers) + capacity)
    return file


def _start_of_data(num_readers: int) -> int:
    return mmap.PAGESIZE * -(-_LINE * (1 + num_readers) // mmap.PAGESIZE)


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Ring:
    """Both ends."""

    def __init__(self, file: int, num_readers: int) -> None:
        self._memory = mmap.mmap(file, 0)
        self._bytes = memoryview(self._memory)
        start = _start_of_data(num_readers)
        self._data = self._bytes[start:]
        self._capacity = len(self._data)
        self._published = self._bytes[:4].cast("I")
        """The number of the last piece."""
        self._read = [self._bytes[at : at + 8].cast("Q") for at in range(_LINE, _LINE * (1 + num_readers), _LINE)]
        """Of each reader, the bytes that it has read."""
        self._word = ctypes.c_uint32.from_buffer(self._memory)
        number = _FUTEX.get(platform.machine()) if sys.platform == "linux" else None
        self._futex: Callable[..., int] | None = None
        if number is not None:
            call, address = ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_void_p(ctypes.addressof(self._word))
            self._futex = lambda *arguments: call(number, address, *arguments)

    def _write_at(self, position: int, data: memoryview | bytes) -> None:
        at = position % self._capacity
        first = min(len(data), self._capacity - at)
        self._data[at : at + first] = data[:first]
        self._data[: len(data) - first] = data[first:]

    def _read_at(self, position: int, count: int) -> bytes:
        at = position % self._capacity
        first = min(count, self._capacity - at)
        return bytes(self._data[at : at + first]) + bytes(self._data[: count - first])


class Writer(_Ring):
    def __init__(self, file: int, num_readers: int) -> None:
        super().__init__(file, num_readers)
        self._position = 0
        self._number = 0

    def send(self, message: bytes, alive: Callable[[], None] = lambda: None) -> None:
        """Waits while a reader is too far behind; what `alive` raises meanwhile ends that."""
        most, left = self._capacity // 4, memoryview(message)
        while True:
            piece, left = left[:most], left[most:]
            self._send_piece(piece, bool(left), alive)
            if not left:
                return

    def _send_piece(self, piece: memoryview, more: bool, alive: Callable[[], None]) -> None:
        size = 8 + len(piece)
        while self._position + size - min(read[0] for read in self._read) > self._capacity:
            alive()
            time.sleep(_POLL_S)
        self._number = self._number + 1 & 0xFFFFFFFF
        length = len(piece) | (_MORE if more else 0)
        self._write_at(self._position, length.to_bytes(4, "little") + self._number.to_bytes(4, "little"))
        self._write_at(self._position + 8, piece)
        self._position += size
        self._published[0] = self._number  # last: a reader that sees it finds the rest
        if self._futex is not None:
            self._futex(_WAKE, _ALL, None)


class Reader(_Ring):
    def __init__(self, file: int, num_readers: int, index: int) -> None:
        super().__init__(file, num_readers)
        self._own = self._read[index]
        self._position = 0
        self._number = 0

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None when none begins within that time. Raises `ValueError` for memory that was damaged."""
        if not self._wait(timeout_s):
            return None
        pieces, more = [], True
        while more:
            while not self._wait(1.0):
                pass  # the writer is amid the message: if it dies, so does this process
            header = self._read_at(self._position, 8)
            length, number = int.from_bytes(header[:4], "little"), int.from_bytes(header[4:], "little")
            self._number = self._number + 1 & 0xFFFFFFFF
            if number != self._number:
                raise ValueError(f"piece {number} of the ring stands where piece {self._number} should")
            more, length = bool(length & _MORE), length & ~_MORE
            pieces.append(self._read_at(self._position + 8, length))
            self._position += 8 + length
            self._own[0] = self._position
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wait(self, timeout_s: float) -> bool:
        """Until there is a piece that was not read."""
        seen, begun_s = self._number, time.perf_counter()
        while self._published[0] == seen:
            spent_s = time.perf_counter() - begun_s
            if spent_s >= timeout_s:
                return False
            if spent_s < _SPIN_S:
                continue
            if self._futex is None:
                time.sleep(_POLL_S)
            else:
                left_s = timeout_s - spent_s
                until = _Timespec(int(left_s), int(left_s % 1 * 1e9))
                self._futex(_WAIT, seen, ctypes.byref(until))
        return True
