"""Pages in host memory, which may outlast the process: the engine's is given memory that its parent holds too.

    [0, 4096)       head: what follows, whose it is, and how many slots were ever used
    rows            of each slot: whether it is whole, when it was last asked for, a checksum, and its content's name
    slots           a page each

A slot counts as whole only once all of it is written. A process that is killed in the midst of it leaves none that is
wrong, and the next one takes the others over.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from ingle.device.pages import Bytes
from ingle.engine.tiers import IDENTITY_BYTES, NAME_BYTES

_HEAD = struct.Struct(f"<8s{IDENTITY_BYTES}sQQ")
_HEAD_BYTES = mmap.PAGESIZE
_MAGIC = b"inglekv1"
_USED = np.dtype("<u8")
_ROW = np.dtype([("whole", "<u4"), ("crc", "<u4"), ("asked", "<u8"), ("name", f"V{NAME_BYTES}"), ("pad", "V15")])


class HostTier:
    """As many pages of one model as fit. The system hands out its memory when it is first touched."""

    def __init__(self, num_bytes: int, page_bytes: int, identity: bytes, memory: int | None = None) -> None:
        """`memory`: the descriptor of a file in memory, such as `os.memfd_create` makes; None for memory of this
        process alone. What a process before left there of the same model is taken over."""
        self.num_slots = slots_in(num_bytes, page_bytes)
        self.page_bytes = page_bytes
        rows_bytes = -(-self.num_slots * _ROW.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        total = _HEAD_BYTES + rows_bytes + self.num_slots * page_bytes
        head = _HEAD.pack(_MAGIC, identity, page_bytes, self.num_slots)
        inherits = memory is not None and _prepare(memory, head, total)
        self._memory = mmap.mmap(-1 if memory is None else memory, total)
        self._memory[: len(head)] = head
        whole = np.frombuffer(self._memory, np.uint8)
        self._used: npt.NDArray[np.uint64] = whole[len(head) :][: _USED.itemsize].view(_USED)
        self._rows = whole[_HEAD_BYTES:][: self.num_slots * _ROW.itemsize].view(_ROW)
        self._slots = whole[_HEAD_BYTES + rows_bytes :].reshape(self.num_slots, page_bytes)
        self._lock = threading.Lock()
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        """The one that nobody asked for the longest is the first."""
        self._free: list[int] = []
        self._clock = 1
        self.num_damaged = 0
        if inherits:
            self._inherit()
        self.num_inherited = len(self._slot_of)

    @property
    def num_bytes(self) -> int:
        """Of the pages that it holds."""
        return len(self._slot_of) * self.page_bytes

    def __contains__(self, name: object) -> bool:
        return name in self._slot_of

    def read(self, name: bytes, out: Bytes) -> bool:
        with self._lock:
            slot = self._slot_of.get(name)
            if slot is None:
                return False
            self._touch(name, slot)
            np.copyto(out, self._slots[slot])
            crc = int(self._rows["crc"][slot])
        if zlib.crc32(out.data) == crc:
            return True
        with self._lock:
            if self._slot_of.get(name) == slot:
                del self._slot_of[name]
                self._empty(slot)
                self.num_damaged += 1
        return False

    def write(self, name: bytes, page: Bytes) -> None:
        crc = zlib.crc32(page.data)
        with self._lock:
            if name in self._slot_of:
                return
            slot = self._next_slot()
            self._rows["whole"][slot] = 0
            np.copyto(self._slots[slot], page)
            self._rows["crc"][slot] = crc
            self._rows["name"][slot] = np.void(name)
            self._slot_of[name] = slot
            self._touch(name, slot)
            self._rows["whole"][slot] = 1  # last

    def touch(self, name: bytes) -> None:
        with self._lock:
            if (slot := self._slot_of.get(name)) is not None:
                self._touch(name, slot)

    def _next_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if (used := int(self._used[0])) < self.num_slots:
            self._used[0] = used + 1
            return used
        _, slot = self._slot_of.popitem(last=False)
        return slot

    def _touch(self, name: bytes, slot: int) -> None:
        self._slot_of.move_to_end(name)
        self._rows["asked"][slot] = self._clock
        self._clock += 1

    def _empty(self, slot: int) -> None:
        self._rows["whole"][slot] = 0
        self._free.append(slot)

    def _inherit(self) -> None:
        rows = self._rows[: min(int(self._used[0]), self.num_slots)]
        slots = np.flatnonzero(rows["whole"] == 1)
        for slot in slots[np.argsort(rows["asked"][slots], kind="stable")].tolist():
            name = rows["name"][slot].tobytes()
            if name in self._slot_of:
                self._empty(self._slot_of.pop(name))
            self._slot_of[name] = slot
        self._free += np.flatnonzero(rows["whole"] != 1).tolist()
        self._clock = int(rows["asked"].max(initial=0)) + 1


def slots_in(num_bytes: int, page_bytes: int) -> int:
    """Pages that so much memory holds, with what is known of each."""
    return max((num_bytes - 2 * _HEAD_BYTES) // (page_bytes + _ROW.itemsize), 0)


def _prepare(memory: int, head: bytes, num_bytes: int) -> bool:
    """Whether that file in memory holds what `head` describes; otherwise it is made new."""
    if os.fstat(memory).st_size == num_bytes and os.pread(memory, len(head), 0) == head:
        return True
    os.ftruncate(memory, 0)  # which gives back all of it
    os.ftruncate(memory, num_bytes)
    return False
