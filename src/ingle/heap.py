"""The C library's heap, which keeps what was freed for the next allocation unless it is asked not to."""

from __future__ import annotations

import ctypes
import sys


def give_back_memory() -> None:
    """Returns free memory to the system, where the C library is glibc. Takes milliseconds, without Python's lock."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def num_bytes_in_use() -> int:
    """Of what was allocated and not freed; 0 where the C library is not glibc."""
    if sys.platform != "linux" or (info := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        return 0
    info.restype = _MallocInfo
    now = info()
    return int(now.uordblks + now.hblkhd)


class _MallocInfo(ctypes.Structure):
    """As malloc.h has it."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]
