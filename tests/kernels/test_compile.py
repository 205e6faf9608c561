"""How the CPU's kernels come to be compiled, and that an engine runs and says why where they cannot be."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle import facts
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import ConfigError
from ingle.kernels.cpu import compile, library, targets
from ingle.kernels.cpu.targets import TARGETS, Target
from tests.support import greedy, random_prompt, save_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of ingle's, for a process that has started no kernels yet."""
    monkeypatch.setenv("INGLE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "_loaded", None)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def built() -> Path:
    """A library of this machine's own compiler."""
    try:
        return compile.library()
    except compile.CompileError as error:
        pytest.skip(str(error))


def compiler(folder: Path, script: str, *, for_objects: str | None = None) -> str:
    """A program that takes a compiler's arguments; $out is the file that it should write.

    With `for_objects`, `script` is run only to link.
    """
    program = folder / "compiler"
    apart = "" if for_objects is None else f'case "$*" in *" -c "*) {for_objects}; exit;; esac\n'
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\nfor out; do :; done\n{apart}{script}\n')
    program.chmod(0o755)
    return str(program)


# ---- where they cannot be had


def runs_on_pytorch(checkpoint: Path, why: str) -> None:
    config = EngineConfig.of(str(checkpoint), device="cpu", kv_cache_memory="8MiB")
    engine, info = build_engine(config, checkpoint)
    assert not library.started()
    assert len(greedy(engine, random_prompt(0, 20), 8)) == 8
    assert "; kernels: PyTorch's;" in facts.started(info, {})
    assert any("PyTorch's operators run in place of ingle's" in notice and why in notice for notice in info.notices)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo 'matrix.cpp:7: error: no such thing' >&2; exit 1",
            "did not build them: matrix.cpp:7: error: no such thing",
        ),
        ("exit 0", "did not build them: it wrote no library"),
        ("echo nonsense > $out", "they do not load: "),
        ("kill -9 $$", "did not build them: it was ended by SIGKILL"),
    ],
)
def test_a_broken_compiler(
    script: str, why: str, home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    runs_on_pytorch(checkpoint, why)
    assert not list((home / "kernels").glob("tmp*"))


def test_no_compiler(home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    runs_on_pytorch(checkpoint, "there is no C++ compiler (c++, g++, clang++) to build them with")


def test_a_library_of_other_structures(
    home: Path, built: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Layer(ctypes.Structure):
        _fields_ = (*library.Layer._fields_, ("more", ctypes.c_int64))

    others = tuple(Layer if structure is library.Layer else structure for structure in library._STRUCTURES)
    monkeypatch.setattr(compile, "library", lambda report: built)
    monkeypatch.setattr(library, "_STRUCTURES", others)
    runs_on_pytorch(checkpoint, "its structure Layer has")


def test_a_home_that_cannot_be_written(
    home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo nonsense > $out"))
    home.write_text("a file, where a folder should be")
    runs_on_pytorch(checkpoint, f"they cannot be kept in {home / 'kernels'}: Not a directory")


def test_a_folder_that_others_may_write_to(
    home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo nonsense > $out"))
    (home / "kernels").mkdir(parents=True)
    (home / "kernels").chmod(0o777)
    runs_on_pytorch(checkpoint, f"{home / 'kernels'} belongs to another user, or others may write to it")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="is about x86-64")
def test_a_processor_that_is_too_old(home: Path) -> None:
    with pytest.raises(compile.CompileError, match="lacks AVX2, FMA or F16C"):
        compile.built(Target("x86-64-v2", "x86_64", ("-march=x86-64-v2",), frozenset()))


# ---- those that come with a package


@pytest.fixture
def package(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Brings kernels for every target of x86-64. There is no compiler, and the processor is a Zen 3."""
    monkeypatch.setattr(compile, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(targets, "features", lambda: TARGETS["x86-64-v3"].features)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.delenv("INGLE_CPU_TARGET", raising=False)
    compile.PREBUILT.mkdir()
    for target in TARGETS.values():
        if target.machine == "x86_64":
            compile.prebuilt_file(target).write_text(target.name)
    return compile.PREBUILT


def test_the_fastest_that_the_processor_executes(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile.library().read_text() == "x86-64-v3"
    monkeypatch.setattr(targets, "features", lambda: TARGETS["x86-64-v4+vnni"].features)
    assert compile.library().read_text() == "x86-64-v4+vnni"
    compile.library().unlink()  # the package's compiler did not know the flag
    assert compile.library().read_text() == "x86-64-v4"


def test_a_target_that_is_asked_for(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "features", lambda: TARGETS["x86-64-v4+vnni"].features)
    assert compile.library("x86-64-v3").read_text() == "x86-64-v3"
    monkeypatch.setenv("INGLE_CPU_TARGET", "x86-64-v4")
    assert compile.library().read_text() == "x86-64-v4"
    monkeypatch.setenv("INGLE_CPU_TARGET", "native")
    with pytest.raises(compile.CompileError, match="there is no C\\+\\+ compiler"):
        compile.library()


def test_those_of_other_sources_or_for_other_processors_are_not_taken(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(compile, "SOURCES", tmp_path / "csrc")
        compile.SOURCES.mkdir()
        (compile.SOURCES / "kernels.cpp").write_text("int changed;")
        with pytest.raises(compile.CompileError, match="there is no C\\+\\+ compiler"):
            compile.library()
    monkeypatch.setattr(targets, "features", lambda: frozenset({"sse4_2", "avx"}))
    with pytest.raises(compile.CompileError, match="there is no C\\+\\+ compiler"):
        compile.library()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x86-64-v9", "INGLE_CPU_TARGET=x86-64-v9: there is no such target; there are native, x86-64-v3, "),
        ("x86-64-v3+avxvnni", "this processor does not execute it, as it lacks avx_vnni; unset it"),
        ("armv8-a", "this processor does not execute it, as it lacks asimd, fp; unset it"),
    ],
)
def test_a_target_that_cannot_be_had(
    name: str, why: str, package: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for one does not want others, nor PyTorch's operators."""
    monkeypatch.setenv("INGLE_CPU_TARGET", name)
    with pytest.raises(ConfigError, match=re.escape(why)):
        build_engine(EngineConfig.of(str(checkpoint), device="cpu", kv_cache_memory="8MiB"), checkpoint)


# ---- the file that is kept


def test_half_a_library_is_built_anew(home: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CXX", compiler(tmp_path, f"echo built >> {tmp_path}/log; cp {built} $out", for_objects=": > $out")
    )
    file = compile.library()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:5000] + b"?" + whole[5001:]):
        file.write_bytes(damaged)
        assert compile.library() == file
        assert file.read_bytes() == whole
    assert library.start(1) is None
    assert (tmp_path / "log").read_text() == 4 * "built\n"


def test_two_engines_that_start_at_once(
    home: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compiles, for which the other waits."""
    slow = f"echo built >> {tmp_path}/log; head -c 9000 {built} > $out; sleep 3; tail -c +9001 {built} >> $out"
    monkeypatch.setenv("CXX", compiler(tmp_path, slow, for_objects="echo $$ > $out"))
    script = "from ingle.kernels.cpu import library; print(library.start(1), library.instructions())"
    engines = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {engine.communicate(timeout=60)[0] for engine in engines}
    assert len(said) == 1 and said.pop().startswith("None ")
    assert (tmp_path / "log").read_text() == "built\n"
    assert [file.suffix for file in (home / "kernels").iterdir()] == [".so"]


def test_one_that_never_gets_done_is_waited_for_no_longer(
    home: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, f"cp {built} $out", for_objects=": > $out"))
    monkeypatch.setattr(compile, "_TIMEOUT_S", 2)
    told: list[str] = []
    (home / "kernels").mkdir(mode=0o700, parents=True)
    with locked_by_another(home / "kernels"):
        assert compile.library(report=told.append).is_file()
    assert told[0] == "waiting for another process, which compiles the CPU's kernels"


@contextlib.contextmanager
def locked_by_another(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


# ---- sources at the same time


def test_a_compilation_tells_how_far_it_is(
    home: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "_REPORT_S", 0.05)
    monkeypatch.setattr(compile.os, "cpu_count", lambda: 3)
    count = f"ls {tmp_path}/run.* | wc -l >> {tmp_path}/log; sleep 0.1; rm {tmp_path}/run.$$; : > $out"
    monkeypatch.setenv("CXX", compiler(tmp_path, f"cp {built} $out", for_objects=f": > {tmp_path}/run.$$; {count}"))
    told: list[str] = []
    assert compile.library(report=told.append).is_file()
    num_sources = len(list(compile.SOURCES.glob("*.cpp")))
    done = [int(re.search(rf": (\d+) of {num_sources} files", line)[1]) for line in told]  # type: ignore[index]
    assert len(done) >= 2 and done == sorted(done) and done[-1] > 0
    at_once = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert len(at_once) == num_sources and max(at_once) == 3


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_wait_ends_the_compilers(
    end: type[BaseException], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "", for_objects=f"sleep 60 & echo $! >> {tmp_path}/pids; wait"))
    monkeypatch.setattr(compile, "_REPORT_S", 0.3)

    def report(line: str) -> None:
        raise end

    with pytest.raises(end):
        compile.library(report=report)
    assert not list((home / "kernels").iterdir())
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == os.cpu_count()
    for pid in pids:
        until_gone(Path("/proc", pid))


def until_gone(process: Path) -> None:
    """Whoever adopts it may still have to reap it."""
    for _ in range(500):
        try:
            if ") Z " in (process / "stat").read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)
    raise AssertionError(f"{process} is still there")


def test_a_source_that_fails_ends_the_others(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = 'case "$*" in *matrix.cpp*) echo "matrix.cpp:7: error: no such thing" >&2; exit 1;; *) sleep 60;; esac'
    monkeypatch.setattr(compile.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("CXX", compiler(tmp_path, "", for_objects=fails))
    began = time.monotonic()
    with pytest.raises(compile.CompileError, match=r"matrix\.cpp:7: error: no such thing"):
        compile.library()
    assert time.monotonic() - began < 30


def test_a_compiler_that_hangs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_TIMEOUT_S", 0.2)
    monkeypatch.setenv("CXX", compiler(tmp_path, "", for_objects="sleep 60"))
    with pytest.raises(compile.CompileError, match=r"it took over 0\.2 s"):
        compile.library()
