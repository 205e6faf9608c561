"""Memory, limits, disk, clock, and the port."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ingle import cgroup
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here, Question
from ingle.errors import ConfigError
from ingle.facts import size
from ingle.home import home

_GIB = 1 << 30
_LITTLE_MEMORY, _NO_MEMORY = 2 * _GIB, _GIB // 4
_LITTLE_DISK, _NO_DISK = 10 * _GIB, 128 << 20
_TRIED_BYTES = 1 << 20
_LEAST_SHM = _GIB
_LEAST_FILES, _GOOD_FILES = 256, 4096 + 64
"""Of descriptors: for a server that does anything, and for as many connections as it takes by default."""
_NOT_BEFORE, _NOT_AFTER = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, 0)), time.mktime((2100, 1, 1, 0, 0, 0, 0, 0, 0))
_SKEW_S, _TLS_SKEW_S = 120.0, 3600.0


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
    if refused in (errno.ENOSPC, errno.EDQUOT) or usage.free < _NO_DISK:
        over = ", and your quota is used up" if refused == errno.EDQUOT else ""
        report.fail(f"{text}: the disk is full{over}", elsewhere)
    elif inodes.f_files and not inodes.f_favail:
        report.fail(f"{text}, and no inode: it holds as many files as it can", elsewhere)
    elif refused is not None:
        report.fail(
            f"{name} cannot be written to: {os.strerror(refused)}", f"chown it to yourself (uid {os.getuid()}), or "
            "point INGLE_HOME to a folder of yours",
        )  # fmt: skip
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


# ---- clock, port


def check_clock(here: Here, report: Reporter) -> None:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if not _NOT_BEFORE < now < _NOT_AFTER:
        report.fail(f"says {shown}", "set it (`timedatectl set-ntp true`): no certificate holds at such a time")
        return
    told = [answer for answer in here.hubs() if answer.ahead_s is not None]
    if not told:
        report.ok(f"{shown}; no hub answered to compare with")
        return
    ahead_s = min((answer.ahead_s or 0.0 for answer in told), key=abs)
    direction = "ahead of" if ahead_s > 0 else "behind"
    text = f"{shown}, {abs(ahead_s):.0f} s {direction} {told[0].hub.name}'s"
    if abs(ahead_s) > _TLS_SKEW_S:
        report.fail(text, "set it (`timedatectl set-ntp true`): certificates and tokens fail at a wrong time")
    elif abs(ahead_s) > _SKEW_S:
        report.warn(text, "set it (`timedatectl set-ntp true`)")
    else:
        report.ok(f"{shown}, as {told[0].hub.name} has it")


def check_port(here: Here, report: Reporter) -> None:
    from ingle.server.listening import bind

    host, port = here.question.host, here.question.port
    try:
        with bind(host, port):
            pass
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            report.fail(error.what)
            return
        _report_taken(here.question, report)
        return
    report.ok(f"{host}:{port} is free" if port else "any that is free")


def _report_taken(question: Question, report: Reporter) -> None:
    from ingle.server.running import servers

    host, port = question.host, question.port
    own = next((server for server in servers() if server.port == port), None)
    if own is not None:
        report.warn(
            f"{host}:{port} is taken by a server of yours, of {own.models[0]} (pid {own.pid})",
            f"`ingle stop {port}` ends it; another one needs another --port",
        )
        return
    holder = _holder(port, question.root)
    by = f" by {holder}" if holder else " by another user's or container's process"
    advice = f"end it, or give another --port; `sudo ss -ltnp sport = :{port}` shows it"
    report.fail(f"{host}:{port} is taken{by}", advice)


def _holder(port: int, root: Path) -> str | None:
    """Who listens on a port, of the processes that this user may look into."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":  # listens
                    sockets.add(f"socket:[{fields[9]}]")
    for process in (root / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({command[:80]})"
    return None
