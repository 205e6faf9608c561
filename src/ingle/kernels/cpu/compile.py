"""Finds the C++ kernels in `csrc/` compiled for this processor, or compiles them.

A wheel brings them compiled for several targets (`prebuild`), and the best that the processor executes is taken. Where
there are none, as in a source tree, the system's compiler builds them once, for this very processor, in some seconds;
they are kept in ingle's home, under a name that their sources, the compiler and the processor decide. A machine without
a compiler runs PyTorch's operators instead. The kept file ends with a digest of what stands before: were the half of a
library loaded, the processor's first step beyond it would end the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ingle.errors import ConfigError
from ingle.home import home
from ingle.kernels.cpu import targets
from ingle.kernels.cpu.targets import TARGETS, Target

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread", "-w")
_LINK = ("-shared",)
PREBUILT = Path(__file__).parent / "prebuilt"
_STANDALONE = ("-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-s")
"""A library that is carried to other machines brings the C++ library and keeps it to itself. GCC's own, which unwinds
the stack, is on every one of them; linked in, it would ask for a glibc as new as that of the machine that builds."""
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 600
"""Of the whole: on a slow core the longest source took over a minute."""
_REPORT_S = 2.5
"""Seconds between two lines about a compilation."""
_POLL_S = 0.01
_WAIT_S = 0.1
_DIGEST_BYTES = 16
Report = Callable[[str], None]
"""Is told how far it is, in words for people."""


class CompileError(Exception):
    """Why there is no library, in a line for people."""


def library(target: str | None = None, report: Report | None = None) -> Path:
    """The compiled library, built now if there is none yet; `report` hears how far it is. Raises `CompileError`.

    target: the name of one of `TARGETS`, or `native`, in place of what is best here, as $INGLE_CPU_TARGET is too; for
    tests and benchmarks. Raises `ConfigError` for one that there is not, or that this processor does not execute.
    """
    wanted = target or os.environ.get("INGLE_CPU_TARGET")
    if wanted:
        chosen = _named(wanted)
        file = prebuilt_file(chosen)
        return file if file.is_file() else built(chosen, report)
    for fitting in targets.suitable(targets.features()) if PREBUILT.is_dir() else ():
        if (file := prebuilt_file(fitting)).is_file():
            return file
    return built(targets.native(), report)


def is_ready() -> bool:
    """Whether `library` finds it compiled. Raises `CompileError` and `ConfigError` as that does."""
    wanted = os.environ.get("INGLE_CPU_TARGET")
    chosen = _named(wanted) if wanted else targets.native()
    fitting = [chosen] if wanted else targets.suitable(targets.features())
    return any(prebuilt_file(each).is_file() for each in fitting) or _is_whole(_kept_file(_own_build(chosen)))


def _named(name: str) -> Target:
    if name == "native":
        return targets.native()
    if name not in TARGETS:
        raise ConfigError(f"INGLE_CPU_TARGET={name}: there is no such target; there are native, {', '.join(TARGETS)}")
    missing = sorted(TARGETS[name].features - targets.features())
    if missing:
        raise ConfigError(
            f"INGLE_CPU_TARGET={name}: this processor does not execute it, as it lacks {', '.join(missing)}; unset it, "
            "or give native"
        )
    return TARGETS[name]


# ---- those that come with the package


def prebuilt_file(target: Target) -> Path:
    """Where they are if the package has them; the name tells those of other sources or flags."""
    digest = _sources_digest()
    digest.update(" ".join((*target.flags, *FLAGS, *_LINK)).encode())
    return PREBUILT / f"{target.name}-{digest.hexdigest()}.so"


def prebuild(folder: Path) -> list[str]:
    """Compiles into `folder` what a package for this machine's architecture brings.

    Returns why some targets are not among it, a line each. Raises `CompileError` without a compiler, and on systems
    that no package is made for.
    """
    chosen = [target for target in TARGETS.values() if target.machine == targets.machine()]
    if sys.platform != "linux" or not chosen:
        raise CompileError(f"they are built in advance for Linux, not for {platform.system()} on {targets.machine()}")
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)

    def build(target: Target) -> str | None:
        made = folder / prebuilt_file(target).name
        try:
            _compile(_Build(compiler, (*target.flags, *FLAGS), (*_LINK, *_STANDALONE)), made)
        except CompileError as error:
            return f"{target.name}: {error}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [failure for failure in pool.map(build, chosen) if failure is not None]


# ---- those that are compiled here


def built(target: Target, report: Report | None = None) -> Path:
    """The library as this machine's compiler builds it, kept in ingle's home. Raises `CompileError`."""
    build = _own_build(target, report)
    file = _kept_file(build)
    try:
        _make_private(file.parent)
        if not _is_whole(file):
            with _alone(file.parent, report):
                if not _is_whole(file):
                    _build(build, file)
    except OSError as error:
        raise CompileError(f"they cannot be kept in {file.parent}: {error.strerror or error}") from error
    return file


def _own_build(target: Target, report: Report | None = None) -> _Build:
    """By this machine's compiler, for itself. Raises `CompileError`."""
    if targets.machine() not in {each.machine for each in TARGETS.values()} or os.name != "posix":
        raise CompileError(f"they are not written for {platform.system()} on {targets.machine()}")
    return _Build(find_compiler(), (*target.flags, *FLAGS), _LINK, os.cpu_count() or 1, report)


def _kept_file(build: _Build) -> Path:
    return home() / "kernels" / f"cpu-{_fingerprint(build)}.so"


def find_compiler() -> str:
    """$CXX, or the first of the usual ones that is on the path. Raises `CompileError`."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise CompileError(f"there is no C++ compiler ({wanted or ', '.join(_COMPILERS)}) to build them with")


def _sources_digest() -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest


def _fingerprint(build: _Build) -> str:
    """Names what the library was made from and for, so that a home on a shared disk serves unlike machines."""
    digest = _sources_digest()
    (version,) = _run(build.compiler, [["--version"]])
    digest.update(" ".join([version, build.compiler, *build.flags, *build.link_flags, *_processor()]).encode())
    return digest.hexdigest()


def _processor() -> list[str]:
    """The instruction sets that Linux lists; elsewhere the processor's name."""
    return sorted(targets.features()) or [platform.processor()]


def _make_private(folder: Path) -> None:
    """Makes a folder whose files nobody else could have put there: what lies in it is loaded as code."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompileError(f"{folder} belongs to another user, or others may write to it")


@contextlib.contextmanager
def _alone(folder: Path, report: Report | None) -> Iterator[None]:
    """Engines that start at once would take each other's processors. Whoever stopped meanwhile holds up nobody for
    ever, and where a file system has no locks nobody waits.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    started, told = time.monotonic(), -math.inf
    try:
        while (now := time.monotonic()) - started < _TIMEOUT_S:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if report is not None and now - told >= _REPORT_S:
                    report("waiting for another process, which compiles the CPU's kernels")
                    told = now
                time.sleep(_WAIT_S)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(descriptor)


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    contents = file.read_bytes()
    return contents[-_DIGEST_BYTES:] == _digest(contents[:-_DIGEST_BYTES])


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=_DIGEST_BYTES).digest()


def _build(build: _Build, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / "library.so"
        _compile(build, made)
        contents = made.read_bytes()
        made.write_bytes(contents + _digest(contents))
        made.replace(file)  # whole or not at all


@dataclass(frozen=True)
class _Build:
    """How a library is made of `SOURCES`."""

    compiler: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    jobs: int = 1
    """How many sources are compiled at the same time."""
    report: Report | None = None


def _compile(build: _Build, made: Path) -> None:
    """The compiler's own files lie beside what it makes, and are gone afterwards."""
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: source.stat().st_size, reverse=True)  # what takes long
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        objects = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
        commands = [[*build.flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        _run(build.compiler, commands, scratch, build.jobs, build.report)
        _run(build.compiler, [[*build.flags, *build.link_flags, *objects, "-o", str(made)]], scratch)
    if not made.is_file():
        raise CompileError(f"{build.compiler} did not build them: it wrote no library")


def _run(
    compiler: str, commands: list[list[str]], scratch: str | None = None, jobs: int = 1, report: Report | None = None
) -> list[str]:
    """What each prints, as many running at a time as there are `jobs`. The compiler's own temporary files go to
    `scratch`. Whatever ends the wait, a failed one too, ends all that was started.
    """
    started = told = time.monotonic()
    waiting, running, printed = deque(enumerate(commands)), dict[int, _Running](), [""] * len(commands)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, arguments = waiting.popleft()
                running[index] = _Running(compiler, arguments, scratch)
            for index in [index for index, each in running.items() if each.has_ended()]:
                printed[index] = running.pop(index).printed()
            now = time.monotonic()
            if now - started > _TIMEOUT_S:
                raise CompileError(f"{compiler} did not build them: it took over {_TIMEOUT_S} s")
            if report is not None and now - told >= _REPORT_S:
                done = len(commands) - len(waiting) - len(running)
                report(f"compiling the CPU's kernels, once on a machine: {done} of {len(commands)} files")
                told = now
            time.sleep(_POLL_S)
    except OSError as error:
        raise CompileError(f"{compiler} did not build them: {error}") from error
    finally:
        for each in running.values():
            each.kill()
    return printed


_SIGNALLED = 128
_GUARD = """
exec 3<&0 </dev/null
"$@" 3<&- & work=$!
{ read -r line <&3; kill -9 0; } & watch=$!
exec 3<&-
wait $work; code=$?
kill -9 $watch
exit $code
"""
"""Runs a command, and ends it with all that it has started when standard input ends: whoever holds its other end was
killed, and could end nothing."""


class _Running:
    """A compiler that was started. What it says goes to files, so that nobody has to read while it runs."""

    def __init__(self, compiler: str, arguments: list[str], scratch: str | None) -> None:
        environment = os.environ if scratch is None else {**os.environ, "TMPDIR": scratch}
        self._compiler = compiler
        self._stdout = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        self._stderr = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "sh", compiler, *arguments],
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
        )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def printed(self) -> str:
        """Of one that has ended. Raises `CompileError` if it failed."""
        self._process.communicate()  # closes what the guard reads
        code = self._process.returncode
        if code != 0:
            lines = _text(self._stderr).splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "")
            if code - _SIGNALLED in {*signal.Signals}:  # as shells tell it
                first = f"it was ended by {signal.Signals(code - _SIGNALLED).name}"
            raise CompileError(f"{self._compiler} did not build them: {first[:300] or f'exit code {code}'}")
        return _text(self._stdout)

    def kill(self) -> None:
        """It, and what it has started: a compiler is a driver."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")
