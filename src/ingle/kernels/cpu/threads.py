"""How many threads compute, and on which processors."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def default_count() -> int:
    """A thread for each physical core that this process may use: two on one core would share its arithmetic units."""
    return max(1, len(_one_per_core()))


def places(count: int) -> list[int] | None:
    """The processor for each of `count` threads; None where they are better left to the system.

    Threads stay in place only when each has a core to itself: with more threads than cores, the system shares better.
    """
    cpus = _one_per_core()
    return cpus[:count] if _can_pin() and count <= len(cpus) else None


def _can_pin() -> bool:
    return hasattr(os, "sched_setaffinity")


@functools.cache
def _one_per_core() -> list[int]:
    """The first processor of each core, of those that this process may use.

    Asked once: a thread that computes is kept on its processor from then on, and would be told of that one only.
    """
    if not _can_pin():
        return list(range(os.cpu_count() or 1))
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.setdefault(siblings.read_text() if siblings.is_file() else str(cpu), cpu)
    return list(cores.values())
