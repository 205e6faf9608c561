"""This machine's systemd: where its files lie, whether it runs, and what it is told."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ConfigError, EngineError, printable
from ingle.service import quoting
from ingle.service.unit import MARKER

ROOT = Path("/")
"""Tests have another."""
_PATIENCE_S = 90.0
_MAX_UNIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Manager:
    """That of the system, or that of the user who asks."""

    own: bool = False

    @property
    def units(self) -> Path:
        return _config_home() / "systemd/user" if self.own else ROOT / "etc/systemd/system"

    def unit(self, name: str) -> Path:
        return self.units / f"{name}.service"

    def variables(self, name: str) -> Path:
        """The file of a service's keys."""
        return (_config_home() if self.own else ROOT / "etc") / "ingle" / f"{name}.env"

    @property
    def systemctl(self) -> list[str]:
        return ["systemctl", "--user"] if self.own else ["systemctl"]

    def logs(self, name: str) -> str:
        return f"journalctl {'--user ' if self.own else ''}-u {name} -f"

    def check(self) -> None:
        """Raises `EngineError` where there is no systemd."""
        if shutil.which("systemctl") is None or not (ROOT / "run/systemd/system").is_dir():
            raise EngineError(f"systemd does not run this machine: {_instead()}")

    def tell(self, *words: str) -> None:
        """Raises `EngineError` with what systemctl says of it."""
        done = self.ask(*words)
        if done.returncode:
            said = " ".join(printable(done.stderr or done.stdout, keep="\n").split())
            raise EngineError(f"`{' '.join([*self.systemctl, *words])}` failed: {said or f'code {done.returncode}'}")

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Raises `EngineError` when there is no answer."""
        command = [*self.systemctl, "--no-pager", *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"`{' '.join(command)}` has not answered for {_PATIENCE_S:.0f} s") from None

    def state(self, name: str) -> str:
        """Such as active, activating, inactive, failed."""
        return self.ask("is-active", f"{name}.service").stdout.strip() or "unknown"

    def fragment(self, name: str) -> Path | None:
        """The file of a unit of that name, wherever systemd found one."""
        path = self.ask("show", "--property=FragmentPath", "--value", f"{name}.service").stdout.strip()
        return Path(path) if path else None

    def restarts(self, name: str) -> int:
        """How often it had to be started anew since it was installed or last told to start."""
        said = self.ask("show", "--property=NRestarts", "--value", f"{name}.service").stdout.strip()
        return int(said) if said.isdecimal() else 0

    def log(self, name: str) -> list[str]:
        """Its last lines, none where the journal cannot be read."""
        whose = ["--user", "--user-unit"] if self.own else ["--unit"]
        command = ["journalctl", *whose, f"{name}.service", "--no-pager", "--quiet", "--output=cat", "--lines=50"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
        except (OSError, subprocess.TimeoutExpired):
            return []
        return done.stdout.splitlines()


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()


def _instead() -> str:
    """What to do where systemd does not run."""
    if sys.platform == "darwin":
        return "on macOS launchd keeps programs running; `ingle serve` runs in any terminal"
    version = ROOT / "proc/version"
    with contextlib.suppress(OSError):
        if "microsoft" in version.read_text().lower():
            return "under WSL, write systemd=true below [boot] in /etc/wsl.conf and run `wsl --shutdown` in Windows"
    if any((ROOT / name).exists() for name in (".dockerenv", "run/.containerenv")):
        return "in a container, let its engine restart `ingle serve`, as `docker run --restart on-failure` does"
    return "start `ingle serve` by what starts programs here; `ingle service print` writes a unit for elsewhere"


def read_own(path: Path) -> str | None:
    """The text of a unit that ingle wrote; None where there is none. Raises `ConfigError` for anybody else's."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_UNIT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not text.startswith(MARKER):
        raise ConfigError(f"{path} was not written by ingle, so it is left alone: give another --name")
    return text


def write(path: Path, text: str, mode: int) -> None:
    """All of it or nothing. Raises `ConfigError`."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        number, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner alone
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), mode)
            Path(part).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(part).unlink()
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def write_variables(path: Path, variables: dict[str, str]) -> list[str]:
    """Gives these their values in a file for its owner alone, in which all else stays; the names of all in it.

    Raises `ConfigError`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = ["# NAME=value, read at each start of the service"]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    kept = [line for line in lines if _variable(line) not in variables]
    lines = [*kept, *(quoting.variable(name, value) for name, value in variables.items())]
    write(path, "\n".join(lines) + "\n", 0o600)
    return [name for name in map(_variable, lines) if name is not None]


def sets_any(path: Path, names: Collection[str]) -> bool:
    """Whether such a file gives one of them a value, or may do so: somebody who may not read it cannot know."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, UnicodeDecodeError):
        return True
    return any(_variable(line) in names for line in lines)


def _variable(line: str) -> str | None:
    """The name that a line of a file of variables gives a value."""
    name, is_set, _ = line.strip().partition("=")
    return name.rstrip() if is_set and not name.startswith(("#", ";")) else None


def remove(path: Path) -> bool:
    """Whether there was such a file. Raises `ConfigError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot remove {path}: {error.strerror}") from error
    return True
