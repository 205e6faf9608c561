"""Files from a hub or a URL onto the disk: several at once, resumed where they were cut, checked before they count.

A file comes as `NAME.ingle-part` beside its place and is renamed when all of it is there and has the digest that the
hub says, so what bears its name is whole, whenever the process that brought it was killed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ingle.hub.disk import CHUNK_BYTES, check_space, delete, sync
from ingle.hub.http import RETRY_DELAYS_S, Body, Http, HubError, Refused, Unreachable, wait_before_retry
from ingle.hub.listing import Digest
from ingle.hub.progress import Progress
from ingle.hub.threads import side_by_side

PART = ".ingle-part"
_AT_ONCE = 4
_NOT_SATISFIABLE = 416
_SPARE_BYTES = 64 << 20
"""Of disk, beside the files: a full disk hurts others."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass
class Job:
    """A file to bring."""

    url: str
    path: Path
    """Where its bytes are to lie."""
    name: str
    """For people."""
    size: int | None = None
    digest: Digest | None = None
    etag: str | None = None
    """Of what lies in `part`, where nothing but the ETag says whether it is still the same file."""
    come: int = 0
    """Bytes that are here."""
    anew: bool = False
    """Whether what was here once proved to be of another file, so that all of it has come in this call."""

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + PART)


def download(
    http: Http, jobs: Sequence[Job], title: str, progress: Progress, cache_setting: str = "INGLE_HOME"
) -> None:
    """Brings all files that are not there yet.

    Raises `HubError` for what the hub does, `ModelError` for a disk without room, which the variable `cache_setting`
    names, and `OSError` for what else the disk does. What has come stays for the next time.
    """
    jobs = [job for job in jobs if not _is_here(job)]
    if not jobs:
        return
    missing = sum(max((job.size or 0) - _size(job.part), 0) for job in jobs)
    if missing:
        check_space(jobs[0].path.parent, missing + _SPARE_BYTES, title, cache_setting)
    stopped = threading.Event()
    for job in jobs:
        job.come = min(_size(job.part), job.size or 0)  # so that the bars begin there, and tell true speeds
    parts = [progress.part(job.name, job.size) for job in jobs] if len(jobs) > 1 else []
    progress.stage(title, sum(job.size or 0 for job in jobs))

    def watch() -> None:
        come = [job.come for job in jobs]
        for part, bytes_here in zip(parts, come, strict=False):
            part(bytes_here)
        progress.update(sum(come))

    watch()
    largest_first = sorted(jobs, key=lambda job: -(job.size or 0))
    work = [partial(_bring, http, job, stopped, progress.note) for job in largest_first]
    side_by_side(work, _AT_ONCE, stopped, watch=watch, hang_up=http.close)


def _is_here(job: Job) -> bool:
    return job.path.is_file() and (job.size is None or job.path.stat().st_size == job.size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bring(http: Http, job: Job, stopped: threading.Event, note: Callable[[str], None]) -> None:
    """One file, tried again where it was cut. What moves forward is tried as often as it needs."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    delays = iter(RETRY_DELAYS_S)
    while not stopped.is_set():
        before = job.come
        try:
            if _attempt(http, job, stopped):
                return
        except Refused as error:
            if error.status != _NOT_SATISFIABLE or not _size(job.part):
                raise
            delete(job.part)  # more of it is here than the server has: it is of another file
        except Unreachable as error:
            if job.come > before:
                delays = iter(RETRY_DELAYS_S)
            delay = next(delays, None)
            if delay is None or stopped.is_set():
                raise
            wait_before_retry(error, delay, note, stopped)


def _attempt(http: Http, job: Job, stopped: threading.Event) -> bool:
    """From where the last attempt ended. False where what had come proved to be of another file."""
    start, hashed = _begun(job)
    job.come = start
    if job.size is not None and start == job.size:
        job.part.touch()  # of an empty file nothing has come
        return _finish(job, hashed, http, resumed=start > 0)
    end = "" if job.size is None else job.size - 1  # ModelScope takes no open range of a small file
    byte_range = f"bytes={start}-{end}" if start else None
    with http.open(job.url, byte_range, if_range=job.etag if job.digest is None else None) as body:
        if body.start not in (0, start):
            raise HubError(f"{job.name}: the server sends other bytes than those asked for")
        if body.start != start:  # it sends all, from the beginning
            start, hashed = 0, _new_hash(job)
        _check_size(job, body, http)
        job.size, job.come = body.total if job.size is None else job.size, start
        _remember(job, body)
        with job.part.open("r+b" if start else "wb") as out:
            out.seek(start)
            for chunk in body.chunks():
                if stopped.is_set():
                    return True
                out.write(chunk)
                hashed.update(chunk)
                job.come += len(chunk)
                if job.size is not None and job.come > job.size:
                    break
    if job.size is not None and job.come < job.size:
        raise Unreachable(f"{job.name}: the connection ended after {job.come} of {job.size} bytes")
    return _finish(job, hashed, http, resumed=start > 0)


def _begun(job: Job) -> tuple[int, _Hash]:
    """How many bytes an earlier attempt left, and their hash."""
    hashed, start = _new_hash(job), _size(job.part)
    if job.digest is None:
        job.etag = _etag_of(job)
    useless = (job.size is not None and start > job.size) or (job.digest is None and job.etag is None)
    if not start or useless:
        return 0, hashed
    with job.part.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hashed.update(chunk)
    return start, hashed


def _new_hash(job: Job) -> _Hash:
    if job.digest is not None and job.digest.kind == "git":
        hashed = hashlib.sha1(usedforsecurity=False)
        hashed.update(b"blob %d\0" % (job.size or 0))
        return hashed
    return hashlib.sha256()


def _check_size(job: Job, body: Body, http: Http) -> None:
    if job.size is not None and body.total is not None and body.total != job.size:
        raise HubError(
            f"{job.name}: the hub says {job.size} bytes, and {body.host} sends {body.total}",
            alternative=f"a mirror that is behind or broken: {http.elsewhere}",
        )


def _finish(job: Job, hashed: _Hash, http: Http, *, resumed: bool) -> bool:
    if job.size is not None and job.come > job.size:
        delete(job.part)
        raise HubError(f"{job.name}: more than its {job.size} bytes came: the file is not what the hub lists")
    if job.digest is not None and hashed.hexdigest() != job.digest.value:
        delete(job.part)
        if resumed and not job.anew:  # the beginning may have been of another file: all over again
            job.anew, job.come = True, 0
            return False
        kind = "SHA-256" if job.digest.kind == "sha256" else "git's SHA-1"
        raise HubError(
            f"{job.name}: what came has {kind} {hashed.hexdigest()[:16]}…, and the hub says {job.digest.value[:16]}…",
            alternative=f"it was damaged on the way, by a mirror or a proxy: {http.elsewhere}",
        )
    sync(job.part)
    job.part.replace(job.path)
    sync(job.path.parent)
    delete(_etag_file(job))
    return True


def _etag_file(job: Job) -> Path:
    return job.path.with_name(f"{job.path.name}{PART}-etag")


def _etag_of(job: Job) -> str | None:
    try:
        return _etag_file(job).read_text()[:1000] or None
    except (OSError, UnicodeDecodeError):
        return None


def _remember(job: Job, body: Body) -> None:
    """What tells whether the bytes that come are those of the same file the next time."""
    if job.digest is None:
        if body.etag is None:
            delete(_etag_file(job))
        else:
            _etag_file(job).write_text(body.etag)
