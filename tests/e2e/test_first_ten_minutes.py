"""`docs/first-ten-minutes.md`, typed once more."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ingle.home import home

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-ten-minutes.md").read_text(encoding="utf-8")
_ANY = "…"
_STAGES = re.compile("^ingle: (starting|reading|readying|choosing|loading|allocating) .*\n", re.MULTILINE)
"""What a load says that takes more than some seconds, as on a busy machine."""
_MOST_S, _LONGEST_SILENCE_S = 120.0, 3.0
"""Of `make run` on a machine that has nothing of it."""


@dataclass
class Typed:
    command: str
    kind: str
    lines: list[str] = field(default_factory=list)

    def assert_said(self, said: str) -> None:
        """Spaces aside: a table's columns are as wide as what stands in them."""
        said, wanted = (re.sub(" +", " ", text).replace(" \n", "\n") for text in (said, "\n".join(self.lines)))
        lines = (".*?".join(map(re.escape, line.split(_ANY))) + "\n" for line in wanted.split("\n"))
        pattern = "".join("(?:.*\n)*?" if line == ".*?\n" else line for line in lines)
        assert re.fullmatch(pattern, said if said.endswith("\n") else f"{said}\n"), f"{said}\nis not\n{wanted}"


def page() -> list[Typed]:
    typed: list[Typed] = []
    for kind, block in re.findall(r"^```console ?(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                typed.append(Typed(line[2:], kind))
            else:
                typed[-1].lines.append(line)
    return typed


@pytest.fixture
def environment(smollm2_gguf: Path, tmp_path: Path) -> dict[str, str]:
    """A home that has the default model and the compiled kernels, and `ingle` and `python` on the path."""
    if (home() / "kernels").is_dir():
        shutil.copytree(home() / "kernels", tmp_path / "home" / "kernels")
    shutil.copytree(smollm2_gguf.parent, tmp_path / "home" / "models" / smollm2_gguf.parent.name)
    (tmp_path / "bin").mkdir()
    for name, words in (("ingle", '-m ingle "$@"'), ("python", '"$@"')):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}\n')
        script.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("INGLE_")},
        "INGLE_HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "COLUMNS": "100",
    }


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_all_of_it_but_make(environment: dict[str, str], tmp_path: Path) -> None:
    port = str(free_port())
    servers = []
    try:
        for typed in page():
            if typed.kind == "make":
                continue
            typed.lines = [line.replace("8000", port) for line in typed.lines]
            command = typed.command.replace("8000", port)
            if typed.kind == "server":
                with _running(command, environment) as server:
                    servers.append(server)
                    typed.assert_said("".join(_until(server, typed.lines[-1])))
            else:
                options = {"shell": True, "env": environment, "cwd": tmp_path, "text": True, "timeout": 100}
                done = subprocess.run(command, stdout=-1, stderr=-2, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
                typed.assert_said(_STAGES.sub("", done.stdout))
        assert servers[0].wait(20) == 0
    finally:
        for server in servers:
            server.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def _running(command: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        f"exec {command}", shell=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    except BaseException:
        process.kill()
        raise


def _until(process: subprocess.Popen[str], last: str) -> Iterator[str]:
    """The lines up to one like the last."""
    assert process.stdout is not None
    pattern = re.compile(".*?".join(map(re.escape, last.split(_ANY))))
    for line in process.stdout:
        yield line
        if pattern.fullmatch(line.rstrip("\n")):
            return


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_make_run_on_a_machine_that_has_nothing_of_it(tmp_path: Path) -> None:
    typed = next(typed for typed in page() if typed.kind == "make")
    port = str(free_port())
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    without = ("INGLE_", "MAKE", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    environment |= {"INGLE_HOME": str(tmp_path / "home"), "PIP_CACHE_DIR": str(tmp_path / "pip")}
    command = f"make -C '{tmp_path / 'clone'}' --no-print-directory run PORT={port}"
    typed.lines = [line.replace("8000", port) for line in typed.lines]
    started = told = time.monotonic()
    longest, said = 0.0, ""
    with _running(command, environment) as process:
        assert process.stdout is not None
        try:
            while "base URL" not in said and (part := os.read(process.stdout.fileno(), 1 << 16)):
                longest, told = max(longest, time.monotonic() - told), time.monotonic()
                said += part.decode()
            seconds = time.monotonic() - started
        finally:
            subprocess.run(["pkill", "-INT", "-f", f"ingle serve smollm2:135m --port {port}"], check=False)
            process.wait(20)
    print(f"{seconds:.1f} s, silent for {longest:.1f} s at most")
    typed.assert_said(said)
    assert seconds <= _MOST_S and longest <= _LONGEST_SILENCE_S
