"""How many threads compute."""

from __future__ import annotations

import os
from pathlib import Path

from ingle import cgroup

_CPUS = Path("/sys/devices/system/cpu")


def default_count() -> int:
    """A thread for each physical core that this process may use: two on one core would share its arithmetic units.

    Not more than the whole processors whose time its control groups grant: when that is used up, all of them are
    stopped until the next period, most of a tenth of a second.
    """
    granted = cgroup.num_cpus()
    cores = _num_cores()
    return cores if granted is None else max(min(cores, int(granted)), 1)


def _num_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)
