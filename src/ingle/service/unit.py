"""The text of a unit, out of values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ingle.errors import ConfigError
from ingle.service import quoting

MARKER = "# Written by `ingle service`"
"""The beginning of a unit that may be written anew and removed."""
STOP_S = 15
"""A server that is told to end does so within 9 s, by force if need be, unless its answers have more than 5."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_FIRST_FREE_PORT = 1024


def checked_name(name: str) -> str:
    """Of a unit, without `.service`. It is also the name of its user and folders. Raises `ConfigError`."""
    short = name.removesuffix(".service")
    if not _NAME.fullmatch(short):
        raise ConfigError(
            f"--name {name!r:.100} is no name for a service: letters, digits, and _ . - within it, 61 at most"
        )
    return short


@dataclass(frozen=True)
class Credential:
    """A word of a command that names a file which only its owner may read: systemd hands it to the service."""

    flag: str
    name: str
    """Of the copy."""
    path: Path


@dataclass(frozen=True)
class Unit:
    name: str
    model: str
    """As people call it."""
    program: str
    arguments: tuple[str | Credential, ...]
    url: str
    """Where this machine reaches the server."""
    port: int
    run_as: str | None = None
    """None is a user that systemd makes up."""
    own: bool = False
    """A unit of the user who installs it, of that user's own systemd."""
    environment: Mapping[str, str] = field(default_factory=dict)
    environment_file: str = ""
    visible: tuple[Path, ...] = ()
    """What it reads below home directories and /tmp."""
    store: Path | None = None
    """The folder for its models, where that is not the one below /var/lib."""
    gpu: bool = False
    stop_s: int = STOP_S
    """That it has to end, before systemd ends it."""
    modprobe: str | None = None
    """NVIDIA's program that makes its device files, which a process without new privileges cannot start."""

    @property
    def file_name(self) -> str:
        return f"{self.name}.service"

    def text(self) -> str:
        sections = {
            "Unit": list(self._unit()),
            "Service": [*self._service(), *self._sandbox()],
            "Install": [f"WantedBy={'default' if self.own else 'multi-user'}.target"],
            "X-Ingle": [f"URL={self.url}"],
        }
        manager = "systemctl --user" if self.own else "systemctl"
        head = f"{MARKER}, which writes it anew: `{manager} edit {self.name}` keeps changes of yours apart.\n"
        return head + "".join(f"\n[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())

    def _unit(self) -> Iterator[str]:
        yield f"Description=ingle: {quoting.text_line(self.model)}"
        if not self.own:
            yield "After=network-online.target"
            yield "Wants=network-online.target"
        yield "StartLimitIntervalSec=600"
        yield "StartLimitBurst=5"

    def _service(self) -> Iterator[str]:
        # It listens within a second and says on /health/ready how far the model is: nobody has to wait for it at boot.
        yield "Type=exec"
        if self.gpu and self.modprobe and not self.own:
            yield f"ExecStartPre=-+{quoting.program(self.modprobe)} -u -c=0"
        yield f"ExecStart={' '.join([quoting.program(self.program), *map(_word, self.arguments)])}"
        for name, value in self.environment.items():
            yield f"Environment={quoting.assignment(name, value)}"
        # Not optional: a server whose keys are gone would let everybody in.
        yield f"EnvironmentFile={quoting.bare_path(self.environment_file)}"
        for word in self.arguments:
            if isinstance(word, Credential):
                yield f"LoadCredential={word.name}:{quoting.bare_path(str(word.path))}"
        yield "Restart=on-failure"
        yield "RestartSec=5"
        yield f"TimeoutStopSec={self.stop_s}"
        yield "KillMode=mixed"  # the server ends its own processes, in their order
        yield f"SyslogIdentifier={self.name}"
        if self.own:
            return
        yield "DynamicUser=yes" if self.run_as is None else f"User={self.run_as}"
        yield f"StateDirectory={self.name}"
        yield "StateDirectoryMode=0700"

    def _sandbox(self) -> Iterator[str]:
        # Without MemoryDenyWriteExecute=: PyTorch, Triton and CUDA make code while they run.
        yield "UMask=0077"
        yield "NoNewPrivileges=yes"
        yield "LockPersonality=yes"
        yield "RestrictRealtime=yes"
        yield "RestrictSUIDSGID=yes"
        yield "RestrictNamespaces=yes"
        yield "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK"
        yield "SystemCallArchitectures=native"
        yield "SystemCallFilter=@system-service"
        yield "SystemCallErrorNumber=EPERM"
        if not self.own:  # what follows takes rights that a user's own systemd has not
            yield from self._walls()

    def _walls(self) -> Iterator[str]:
        capability = "CAP_NET_BIND_SERVICE" if self.port < _FIRST_FREE_PORT else ""
        yield f"CapabilityBoundingSet={capability}"
        yield f"AmbientCapabilities={capability}"
        yield "ProtectSystem=strict"
        yield "ProtectHome=tmpfs"
        yield "PrivateTmp=yes"
        for path in self.visible:
            yield f"BindReadOnlyPaths={quoting.path(str(path))}"
        if self.store is not None:
            yield f"BindPaths={quoting.path(str(self.store))}"
        yield "ProtectProc=invisible"
        # Without ProtectClock=: its DeviceAllow= would shut out GPUs. The filter of calls keeps clocks from being set.
        for what in ("ControlGroups", "Hostname", "KernelLogs", "KernelModules", "KernelTunables"):
            yield f"Protect{what}=yes"
        yield "RemoveIPC=yes"
        if not self.gpu:
            yield "PrivateDevices=yes"


def _word(word: str | Credential) -> str:
    if isinstance(word, Credential):
        return f"{word.flag}=${{CREDENTIALS_DIRECTORY}}/{word.name}"
    return quoting.argument(word)


def url_in(text: str) -> str | None:
    """Of a unit that `Unit.text` wrote."""
    found = re.search(r"^\[X-Ingle\]\nURL=(http://\S+)$", text, flags=re.M)
    return None if found is None else found[1]
