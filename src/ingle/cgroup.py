"""What Linux's control groups leave to this process: containers and services are bounded by them, not by the machine.

A process is in one group of each hierarchy, and every group on the way up to the root of the mount may set a limit, so
the least of all counts. Version 2 has one hierarchy for all; in version 1 memory and processor time have one each.
Functions take the folder that stands for `/`, for tests. What cannot be read sets no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that the groups still grant; None where none of them sets a limit."""
    free = [room for folder in _folders("memory", root) if (room := _room_bytes(folder)) is not None]
    return min(free, default=None)


def num_cpus(root: Path = _ROOT) -> float | None:
    """How many processors' time the groups grant, such as 1.5; None where none of them sets a limit."""
    granted = [share for folder in _folders("cpu", root) if (share := _cpu_share(folder)) is not None]
    return min(granted, default=None)


def _room_bytes(folder: Path) -> int | None:
    """The group's limit less what it uses. Files that were read and lie in memory give way, so they are not use."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit = min((number for number in limits if number is not None), default=None)
    used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    prefix = "total_" if "total_active_file" in counts else ""  # version 1 counts the groups below apart
    files = sum(int(counts.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
    return max(limit - max(used - files, 0), 0)


def _cpu_share(folder: Path) -> float | None:
    in_one = _lines(folder / "cpu.max")
    apart = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    words = " ".join(in_one or apart).split()
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):  # max, or -1 in version 1
        return None
    quota, period = map(int, words)
    return quota / period


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, from its own upwards, in each hierarchy that has `controller`.

    Where the mount does not show this process's own group, as in some containers, what it shows is a group above.
    """
    for mount_root, mount_point, controllers in _mounts(root):
        for line in _lines(root / "proc/self/cgroup"):
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            if names == "" if controllers is None else controller in controllers.intersection(names.split(",")):
                top = root / mount_point.lstrip("/")
                own = PurePosixPath(path)
                inside = own.relative_to(mount_root) if own.is_relative_to(mount_root) else PurePosixPath()
                steps = [part for part in inside.parts if part != ".."]
                for depth in range(len(steps), -1, -1):
                    yield top.joinpath(*steps[:depth])


def _mounts(root: Path) -> Iterator[tuple[str, str, frozenset[str] | None]]:
    """Of each hierarchy: the group that is mounted, where, and its controllers; None for version 2, which has all."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, kind_and_options = line.partition(" - ")
        _, _, _, mount_root, mount_point, *_ = [*fields.split(" "), "", "", "", "", ""]
        kind, _, options = kind_and_options.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            controllers = frozenset(options.rpartition(" ")[2].split(","))
            yield _unescaped(mount_root), _unescaped(mount_point), None if kind == "cgroup2" else controllers


def _unescaped(path: str) -> str:
    """Blanks and backslashes are written as octal numbers there."""
    return path.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")


def _number(*files: Path) -> int | None:
    """The number in the first of the files that holds one: `max` is none."""
    for file in files:
        text = " ".join(_lines(file))
        if text.isdecimal():
            return int(text)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # not there, or not ours to read
        return []
