"""Memory, limits and disk."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ingle import cgroup
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here
from ingle.facts import size
from ingle.home import home

_GIB = 1 << 30
_LITTLE_MEMORY, _NO_MEMORY = 2 * _GIB, _GIB // 4
_LITTLE_DISK, _NO_DISK = 10 * _GIB, 128 << 20
_TRIED_BYTES = 1 << 20
_LEAST_SHM = _GIB
_LEAST_FILES, _GOOD_FILES = 256, 4096 + 64
"""Of descriptors: for a server that does anything, and for as many connections as it takes by default."""


def check_memory(here: Here, report: Reporter) -> None:
    from ingle.engine.memory import free_host_bytes

    root = here.question.root
    free, total = free_host_bytes(), _memory_total(root)
    if free is None:
        report.ok("how much is free is not told here")
        return
    of = "" if total is None else f" of {size(total)}"
    granted = cgroup.free_memory_bytes(root)
    by = "" if granted is None or granted > free else ": a control group (container, service) grants no more"
    text = f"{size(free)}{of} free{by}"
    if free < _NO_MEMORY:
        report.fail(text, "end other programs, or give the container more: no model starts in this")
    elif free < _LITTLE_MEMORY:
        report.warn(text, "`ingle plan MODEL` says what a model takes")
    else:
        report.ok(text)


def _memory_total(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) << 10
    return None


def check_limits(here: Here, report: Reporter) -> None:
    root, said = here.question.root, []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    files = "unlimited" if most == float("inf") else str(hard)
    if most < _LEAST_FILES:
        report.fail(f"{files} open files (ulimit -n) are too few for a server", "ulimit -n 65536; systemd: LimitNOFILE")
    elif most < _GOOD_FILES:
        report.warn(
            f"{files} open files (ulimit -n) hold fewer connections than a server takes by default",
            "ulimit -n 65536; systemd: LimitNOFILE; or give --max-connections",
        )
    else:
        said.append(
            f"open files {files}" + (f" (a server raises {soft} to what it needs)" if soft < _GOOD_FILES else "")
        )
    for name, kind in (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA)):
        allowed, _ = resource.getrlimit(kind)
        if allowed != resource.RLIM_INFINITY:
            report.warn(f"ulimit {name} allows a process {size(allowed)}", f"ulimit {name} unlimited")
    _report_shared_memory(here, report, said)
    granted, there = cgroup.num_cpus(root), _num_cpus()
    if granted is not None and granted < 1:
        report.warn(f"a control group grants {granted:g} processors' time", "give the container or service more")
    elif granted is not None and granted < there:
        said.append(f"{granted:g} of {there} processors granted by a control group")
    else:
        said.append(f"{there} processors")
    if said:
        report.ok(", ".join(said))


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report_shared_memory(here: Here, report: Reporter, said: list[str]) -> None:
    """NCCL and PyTorch's worker processes hand data over there; Docker gives 64 MiB."""
    shared = here.question.root / "dev/shm"
    try:
        total = shutil.disk_usage(shared).total
    except OSError:
        return
    if total < _LEAST_SHM and len(here.gpus().cards) > 1:
        report.warn(
            f"/dev/shm has {size(total)}: several GPUs hand data over there",
            "docker run --ipc=host or --shm-size=8g; Kubernetes: an emptyDir of medium Memory",
        )
    else:
        said.append(f"/dev/shm {size(total)}")


# ---- disk


def check_disk(here: Here, report: Reporter) -> None:
    for what, folder in _stores():
        _report_folder(what, folder, report)


def _stores() -> Iterator[tuple[str, Path]]:
    """Where models lie: ingle's home, and the cache of Hugging Face's hub where that is on another disk."""
    own = home()
    yield "the store", own
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    shared = Path(cache)
    with contextlib.suppress(RuntimeError):  # a user without a home
        shared = shared.expanduser()
    with contextlib.suppress(OSError):
        if _existing(shared).stat().st_dev != _existing(own).stat().st_dev:
            yield "the hub's cache", shared


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _report_folder(what: str, folder: Path, report: Reporter) -> None:
    name = f"{what}, {folder}"
    elsewhere = "make room (`ingle list`, `ingle rm NAME`), or point INGLE_HOME and HF_HOME to another disk"
    try:
        there = _existing(folder)
        usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    except OSError as error:
        report.fail(f"{name}: {error.strerror}", "point INGLE_HOME to a folder of yours")
        return
    if not there.is_dir():
        report.fail(f"{name}: {there} is not a folder", "move it away, or point INGLE_HOME elsewhere")
        return
    text = f"{name}: {size(usage.free)} of {size(usage.total)} free"
    refused = _why_not_writable(folder, there)
    if refused in (errno.ENOSPC, errno.EDQUOT):
        full = "your quota is used up" if refused == errno.EDQUOT else "the disk is full"
        report.fail(f"{text}: {full}", elsewhere)
    elif refused is None and usage.total > 0 and usage.free < _NO_DISK:
        report.fail(f"{text}: the disk is full, no model fits", elsewhere)
    elif inodes.f_files and not inodes.f_favail:
        report.fail(f"{text}, and no inode: it holds as many files as it can", elsewhere)
    elif refused is not None or not usage.total:
        report.fail(
            f"{name} cannot be written to: {os.strerror(refused or errno.EROFS)}",
            f"chown it to yourself (uid {os.getuid()}), or point INGLE_HOME to a folder of yours",
        )
    elif usage.free < _LITTLE_DISK:
        report.warn(f"{text}: not much for models", elsewhere)
    else:
        report.ok(f"{text}, writable")


def _why_not_writable(folder: Path, there: Path) -> int | None:
    """The system's error number. A folder that is not there yet is not made for this."""
    if there != folder.absolute():
        return None if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
    except OSError as error:
        return error.errno
    return None
