"""Compiles the C++ kernels in `csrc/` for this machine, once, with the system's compiler.

The library takes a few seconds to build and is kept in ingle's home, under a name that its sources, the compiler and
the processor decide. A machine without a compiler runs PyTorch's operators instead. The file ends with a digest of
what stands before: were the half of a library loaded, the processor's first step beyond it would end the process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

from ingle.hub.store import default_root

SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300
_DIGEST_BYTES = 16


class CompileError(Exception):
    """Why there is no library, in a line for people."""


def library(tuning: str | None = None) -> Path:
    """The compiled library, built now if this is the first time. Raises `CompileError`.

    tuning: the compiler's flag for another processor than this one; for tests.
    """
    compiler = _compiler()
    flags = flags_for(tuning)
    folder = default_root() / "kernels"
    file = folder / f"cpu-{_fingerprint(compiler, flags)}.so"
    try:
        _make_private(folder)
        if not _is_whole(file):
            _build(compiler, flags, file)
    except OSError as error:
        raise CompileError(f"they cannot be kept in {folder}: {error.strerror or error}") from error
    return file


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise CompileError(f"there is no C++ compiler ({wanted or ', '.join(_COMPILERS)}) to build them with")


def flags_for(tuning: str | None) -> list[str]:
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64", "aarch64", "arm64") or os.name != "posix":
        raise CompileError(f"they are not written for {platform.system()} on {machine}")
    native = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    return [tuning or native, "-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w"]


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """Names what the library was made from and for, so that a home on a shared disk serves unlike machines."""
    digest = hashlib.blake2b(digest_size=12)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(" ".join([_run(compiler, ["--version"]), compiler, *flags]).encode() + _processor())
    return digest.hexdigest()


def _processor() -> bytes:
    """The instruction sets that Linux lists; elsewhere the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_bytes().splitlines():
            if line.startswith((b"flags", b"Features")):
                return line
    return platform.processor().encode()


def _make_private(folder: Path) -> None:
    """Makes a folder whose files nobody else could have put there: what lies in it is loaded as code."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompileError(f"{folder} belongs to another user, or others may write to it")


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    contents = file.read_bytes()
    return contents[-_DIGEST_BYTES:] == _digest(contents[:-_DIGEST_BYTES])


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=_DIGEST_BYTES).digest()


def _build(compiler: str, flags: list[str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / "library.so"
        _run(compiler, [*flags, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)], scratch)
        if not made.is_file():
            raise CompileError(f"{compiler} did not build them: it wrote no library")
        contents = made.read_bytes()
        made.write_bytes(contents + _digest(contents))
        made.replace(file)  # whole or not at all, also when two engines start at once


def _run(compiler: str, arguments: list[str], scratch: str | None = None) -> str:
    """What it prints. Its own temporary files go to `scratch`. Whatever ends the wait ends all that it has started."""
    environment = os.environ if scratch is None else {**os.environ, "TMPDIR": scratch}
    try:
        with subprocess.Popen(
            [compiler, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                printed, said = process.communicate(timeout=_TIMEOUT_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # a compiler is a driver and what it has started
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler} did not build them: {error}") from error
    if process.returncode != 0:
        lines = said.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise CompileError(f"{compiler} did not build them: {first[:300] or f'exit code {process.returncode}'}")
    return printed
