"""Finds the C++ kernels in `csrc/` compiled for this processor, or compiles them.

A wheel brings them compiled for several targets (`prebuild`), and the best that the processor executes is taken. Where
there are none, as in a source tree, the system's compiler builds them once, for this very processor, in some seconds;
they are kept in ingle's home, under a name that their sources, the compiler and the processor decide. A machine without
a compiler runs PyTorch's operators instead. The kept file ends with a digest of what stands before: were the half of a
library loaded, the processor's first step beyond it would end the process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ingle.errors import ConfigError
from ingle.home import home
from ingle.kernels.cpu import targets
from ingle.kernels.cpu.targets import TARGETS, Target

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread", "-w")
PREBUILT = Path(__file__).parent / "prebuilt"
_STANDALONE = ("-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-s")
"""A library that is carried to other machines brings the C++ library and keeps it to itself. GCC's own, which unwinds
the stack, is on every one of them; linked in, it would ask for a glibc as new as that of the machine that builds."""
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300
_DIGEST_BYTES = 16


class CompileError(Exception):
    """Why there is no library, in a line for people."""


def library(target: str | None = None) -> Path:
    """The compiled library, built now if there is none yet. Raises `CompileError`.

    target: the name of one of `TARGETS`, or `native`, in place of what is best here, as $INGLE_CPU_TARGET is too; for
    tests and benchmarks. Raises `ConfigError` for one that there is not, or that this processor does not execute.
    """
    wanted = target or os.environ.get("INGLE_CPU_TARGET")
    if wanted:
        chosen = _named(wanted)
        file = prebuilt_file(chosen)
        return file if file.is_file() else built(chosen)
    for fitting in targets.suitable(targets.features()) if PREBUILT.is_dir() else ():
        if (file := prebuilt_file(fitting)).is_file():
            return file
    return built(targets.native())


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
    digest.update(" ".join((*target.flags, *FLAGS)).encode())
    return PREBUILT / f"{target.name}-{digest.hexdigest()}.so"


def prebuild(folder: Path) -> list[str]:
    """Compiles into `folder` what a package for this machine's architecture brings.

    Returns why some targets are not among it, a line each. Raises `CompileError` without a compiler, and on systems
    that no package is made for.
    """
    chosen = [target for target in TARGETS.values() if target.machine == targets.machine()]
    if sys.platform != "linux" or not chosen:
        raise CompileError(f"they are built in advance for Linux, not for {platform.system()} on {targets.machine()}")
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)

    def build(target: Target) -> str | None:
        made = folder / prebuilt_file(target).name
        try:
            _compile(compiler, [*target.flags, *FLAGS, *_STANDALONE], made)
        except CompileError as error:
            return f"{target.name}: {error}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [failure for failure in pool.map(build, chosen) if failure is not None]


# ---- those that are compiled here


def built(target: Target) -> Path:
    """The library as this machine's compiler builds it, kept in ingle's home. Raises `CompileError`."""
    if targets.machine() not in {each.machine for each in TARGETS.values()} or os.name != "posix":
        raise CompileError(f"they are not written for {platform.system()} on {targets.machine()}")
    compiler = _compiler()
    flags = [*target.flags, *FLAGS]
    folder = home() / "kernels"
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


def _sources_digest() -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """Names what the library was made from and for, so that a home on a shared disk serves unlike machines."""
    digest = _sources_digest()
    digest.update(" ".join([_run(compiler, ["--version"]), compiler, *flags, *_processor()]).encode())
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
        _compile(compiler, flags, made)
        contents = made.read_bytes()
        made.write_bytes(contents + _digest(contents))
        made.replace(file)  # whole or not at all, also when two engines start at once


def _compile(compiler: str, flags: list[str], made: Path) -> None:
    """The compiler's own temporary files lie beside what it makes."""
    _run(compiler, [*flags, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)], str(made.parent))
    if not made.is_file():
        raise CompileError(f"{compiler} did not build them: it wrote no library")


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
