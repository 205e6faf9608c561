"""Installs ingle from this source tree into a virtual environment, in a few lines of output. `make` calls it.

    python3 tools/install.py run|dev [--venv .venv] [--torch cpu|cu126|...]

`run`: what `ingle serve` needs here. Without an NVIDIA GPU a model of ingle's families runs without PyTorch and
transformers, which are most of what is downloaded: they are left out. `dev`: everything, for tests and lint too.

The CPU's kernels are compiled meanwhile, since the processor has time while packages come. uv installs where it is
found, from the sources that pip is told to use; else pip does. What they print goes to a log in the environment, and
is shown when they fail. Of the standard library alone.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PYTORCH_BUILDS = "https://download.pytorch.org/whl/"
NOT_ON_A_CPU = ("torch", "transformers")
"""What ingle's own CPU device runs without."""
NVIDIA = ("/dev/nvidiactl", "/dev/nvmap", "/usr/lib/wsl/lib/libcuda.so.1")
"""What NVIDIA's driver brings; nvmap is Jetson's, the last one that of Windows' subsystem."""
UV_NAMES = {"index-url": "UV_INDEX_URL", "extra-index-url": "UV_EXTRA_INDEX_URL", "find-links": "UV_FIND_LINKS"}
"""Where packages come from, as pip and as uv name it."""

TICK_S = 2.0
POLL_S = 0.05
TAIL_LINES = 30

COMPILE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
from ingle.kernels.cpu import compile
try:
    compile.library()
except Exception as error:
    sys.exit(str(error))
"""


class Failed(Exception):
    """What did not work, in a line."""


# ---- what is printed


class Phase:
    """One line for what is going on: redrawn with its seconds in a terminal, else dots that follow each other."""

    def __init__(self, title: str) -> None:
        self._title, self._detail = title, ""
        self._begun = self._told = time.monotonic()
        self._redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Phase:
        self._write(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._detail = "" if kind is None else "failed"
        self._write(f"{self._line()}\n" if self._redraws else f" {self._seconds()} s {self._detail}".rstrip() + "\n")

    def wait_for(self, process: subprocess.Popen[Any], log: Path | None = None) -> None:
        while process.poll() is None:
            time.sleep(POLL_S)
            if time.monotonic() - self._told >= (0.5 if self._redraws else TICK_S):
                self._told = time.monotonic()
                self._detail = "" if log is None else newest(log)
                self._write(self._line() if self._redraws else ".")

    def _line(self) -> str:
        width = max(20, shutil.get_terminal_size().columns - 1)
        return "\r\x1b[K" + f"{self._title} {self._seconds()} s{self._detail and ': ' + self._detail}"[:width]

    def _seconds(self) -> int:
        return round(time.monotonic() - self._begun)

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)


# ---- what is run


def watch(title: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs `command`, its output in `log`; raises `Failed` with the end of it. Whatever ends the wait ends it too."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with Phase(title) as phase, log.open("ab") as said:
        begin = said.tell()
        said.write(f"$ {' '.join(command)}\n".encode())
        said.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=variables
        )
        try:
            phase.wait_for(process, log)
        finally:
            end(process)
        if process.returncode != 0:
            lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            raise Failed("\n".join([*lines[-TAIL_LINES:], f"exit code {process.returncode}"]))


def end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


def newest(log: Path) -> str:
    """What pip says that it does, in few words."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        match = re.match(r"\s*(Downloading \S+|Collecting [\w.-]+|Installing collected packages)( \(.*?\))?", line)
        if match is not None:
            words = match[1].split()
            return " ".join(
                (words[0].lower(), words[1].rpartition("/")[2], *words[2:], (match[2] or "").strip())
            ).strip()
    return ""


class Kernels:
    """The compilation of the CPU's kernels, beside everything else."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        self._said = ""
        self._process = subprocess.Popen(
            ["nice", "-n", "5", sys.executable, "-S", "-c", COMPILE]
            if shutil.which("nice")
            else [sys.executable, "-S", "-c", COMPILE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def are_there(self) -> bool:
        """Waits for them; without them, says why, once."""
        if self._process.poll() is None:
            with Phase("compiling the CPU's kernels") as phase:
                phase.wait_for(self._process)
        if self._process.returncode != 0 and not self._said:
            self._said = (self._process.communicate()[1].splitlines() or ["the compiler was ended"])[-1]
            print(f"no kernels of ingle's own, so PyTorch's operators: {self._said}")
        return self._process.returncode == 0

    def stop(self) -> None:
        end(self._process)


# ---- what is installed


class Environment:
    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, str(folder / "bin" / "python")
        self.log = folder / "install.log"
        self._uv = shutil.which("uv")

    def make(self) -> None:
        """One that works is kept, as of an earlier version."""
        check = "import sys, pip; sys.exit(sys.version_info < (3, 10))"
        works = (
            Path(self.python).exists()
            and not subprocess.run([self.python, "-c", check], capture_output=True).returncode
        )
        if not works:
            command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
            with tempfile.TemporaryDirectory() as scratch:
                watch(
                    f"making {self.folder.name} with Python {platform.python_version()}", command, Path(scratch, "log")
                )
        self.log.write_bytes(b"")

    def install(self, title: str, *arguments: str) -> None:
        if self._uv is not None:
            by_uv = (self._uv, "pip", "install", "--python", self.python, *arguments)
            try:
                return watch(f"{title} by uv", by_uv, self.log, self._sources())
            except Failed as failure:
                print(f"uv did not install them, pip tries: {str(failure).splitlines()[-2]}")
                self._uv = None
        by_pip = (self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile")
        try:
            watch(title, [*by_pip, "--progress-bar=off", *arguments], self.log)
        except Failed as failure:
            raise Failed(f"{failure}; the whole log: {self.log}") from None

    def _sources(self) -> dict[str, str]:
        """For uv, pip's indexes and folders where it is not told its own: a mirror that pip.conf names holds too."""
        listed = subprocess.run([self.python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
        found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip chooses among indexes
        for section in ("global", "install", ":env:"):  # the last one outranks
            for option, value in re.findall(rf"^{section}\.([a-z-]+)=(.*)$", listed, re.M):
                if option in UV_NAMES:
                    found[UV_NAMES[option]] = " ".join(str(ast.literal_eval(value)).split())
        if "UV_FIND_LINKS" in found:
            found["UV_FIND_LINKS"] = found["UV_FIND_LINKS"].replace(" ", ",")
        return {name: value for name, value in found.items() if name not in os.environ}

    def requirements(self) -> list[str]:
        """What the installed ingle needs, without its extras."""
        script = "import importlib.metadata as m; print(*m.requires('ingle'), sep='\\n')"
        listed = subprocess.run([self.python, "-c", script], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if "extra ==" not in line]

    def has(self, package: str) -> bool:
        script = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        return subprocess.run([self.python, "-c", script], capture_output=True).returncode == 0


def install_to_run(venv: Environment, torch: Callable[[], None], kernels: Kernels) -> None:
    venv.install("installing ingle", "--no-deps", "-e", ".")
    needed = venv.requirements()
    if not any(Path(file).exists() for file in NVIDIA):
        light = [each for each in needed if not each.startswith(NOT_ON_A_CPU)]
        venv.install(f"installing {len(light)} packages and what they need", "-c", str(CONSTRAINTS), *light)
        if kernels.are_there():
            if not venv.has("torch"):
                print("without PyTorch: there is no NVIDIA GPU here, and a CPU does without; `make setup` installs it")
            return
    torch()
    venv.install("installing PyTorch and all other packages", "-c", str(CONSTRAINTS), *needed)
    kernels.are_there()


def install_to_develop(venv: Environment, torch: Callable[[], None], kernels: Kernels) -> None:
    torch()
    venv.install("installing PyTorch and all packages of development", "-c", str(CONSTRAINTS), "torch", "-e", ".[dev]")
    kernels.are_there()


def main() -> int:
    parser = argparse.ArgumentParser(description="Installs ingle from this source tree.")
    parser.add_argument("what", choices=("run", "dev"))
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument(
        "--torch", default="", help="a build of PyTorch's own index: cpu, cu126, cu130, ...; else PyPI's"
    )
    given = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9.]*", given.torch):
        parser.error(f"--torch {given.torch}: give the last word of an address below {PYTORCH_BUILDS}, such as cu126")
    begun = time.monotonic()
    venv = Environment(given.venv.absolute())

    def torch() -> None:
        if given.torch:
            index = ("-c", str(CONSTRAINTS), "--index-url", PYTORCH_BUILDS + given.torch)
            venv.install(f"installing PyTorch's {given.torch} build", *index, "torch")

    kernels = Kernels()
    try:
        venv.make()
        {"run": install_to_run, "dev": install_to_develop}[given.what](venv, torch, kernels)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        kernels.stop()
    print(f"installed in {round(time.monotonic() - begun)} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
