"""A process that is nothing without the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Has this process get a signal when the thread that started it ends, and ends at once where that was before.

    Linux alone does so. The parent's id is handed down: where it is process 1, as in a container, so is who adopts
    orphans. 0 for a thread that ends before its process does.
    """
    if not parent:
        return
    signal_of_parents_death(number)
    if os.getppid() != parent:
        sys.exit(1)


def signal_of_parents_death(number: signal.Signals) -> None:
    """Linux sends it when the parent dies; elsewhere the closed channel ends this process at its next message."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
