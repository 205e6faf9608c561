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
