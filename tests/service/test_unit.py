"""The text of a unit, and what systemd itself says of it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ingle.errors import ConfigError
from ingle.service.unit import MARKER, Credential, Unit, checked_name, url_in

PLAIN = Unit(
    name="ingle",
    model="smollm2:135m",
    program="/bin/true",
    arguments=("-m", "ingle", "serve", "smollm2:135m"),
    url="http://127.0.0.1:8000",
    port=8000,
    environment={"HOME": "/var/lib/ingle", "INGLE_HOME": "/var/lib/ingle"},
    environment_file="/etc/ingle/ingle.env",
)
HOSTILE = replace(
    PLAIN,
    model='5% of\n"$HOME" \\',
    arguments=(
        "-m",
        "ingle",
        "serve",
        '/srv/5% "$HOME"; a\\b\n',
        Credential("--api-key-file", "api-keys", Path("/a b")),
    ),
    environment={"PYTHONPATH": "/srv/a b%h"},
    environment_file="/etc/ingle/a b.env",
    visible=(Path("/home/a/x:y z"), Path("/root/.venv")),
    store=Path("/home/a/my store"),
)
UNITS = {
    "plain": PLAIN,
    "hostile": HOSTILE,
    "graphics": replace(PLAIN, gpu=True, modprobe="/bin/true", run_as="root", port=80),
    "own": replace(PLAIN, own=True, gpu=True, modprobe="/bin/true"),
}


def test_plain() -> None:
    text = PLAIN.text()
    assert text.startswith(MARKER)
    for line in (
        "Description=ingle: smollm2:135m",
        "ExecStart=/bin/true -m ingle serve smollm2:135m",
        "Environment=HOME=/var/lib/ingle",
        "EnvironmentFile=/etc/ingle/ingle.env",
        "Restart=on-failure",
        "TimeoutStopSec=15",
        "DynamicUser=yes",
        "StateDirectory=ingle",
        "SyslogIdentifier=ingle",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "CapabilityBoundingSet=",
        "PrivateDevices=yes",
        "WantedBy=multi-user.target",
    ):
        assert line in text.splitlines()


def test_every_line_is_a_directive_whatever_the_names() -> None:
    for unit in UNITS.values():
        for line in unit.text().splitlines()[1:]:
            assert not line or line[0] == "[" or (line.partition("=")[1] and line[0].isupper()), line
            assert not line.endswith("\\"), line
        assert unit.text().count("ExecStart=") == 1


def test_what_would_break_gpus_and_compilers_is_not_there() -> None:
    for unit in UNITS.values():
        text = unit.text()
        assert "MemoryDenyWriteExecute" not in text and "ProtectClock" not in text and "DeviceAllow" not in text
        assert ("PrivateDevices" in text) == (not unit.gpu)
        assert "ExecPaths" not in text and "PrivateNetwork" not in text
    assert "ExecStartPre=-+/bin/true -u -c=0" in UNITS["graphics"].text()


def test_user_and_port_below_1024() -> None:
    text = UNITS["graphics"].text()
    assert "User=root" in text and "DynamicUser" not in text
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in text


def test_unit_of_a_user_asks_for_nothing_that_takes_root() -> None:
    text = UNITS["own"].text()
    assert "WantedBy=default.target" in text
    for word in (
        "User=",
        "StateDirectory",
        "Protect",
        "Private",
        "Capabilit",
        "Bind",
        "ExecStartPre",
        "network-online",
    ):
        assert word not in text


def test_places_and_credentials() -> None:
    lines = HOSTILE.text().splitlines()
    assert 'BindReadOnlyPaths="/home/a/x:y z"' in lines and "BindReadOnlyPaths=/root/.venv" in lines
    assert 'BindPaths="/home/a/my store"' in lines
    assert "LoadCredential=api-keys:/a b" in lines
    assert [each for each in lines if each.startswith("ExecStart=")] == [
        'ExecStart=/bin/true -m ingle serve "/srv/5%% \\"$$HOME\\"; a\\\\b\\n" '
        "--api-key-file=${CREDENTIALS_DIRECTORY}/api-keys"
    ]


def test_url_is_found_again() -> None:
    assert url_in(HOSTILE.text()) == "http://127.0.0.1:8000"
    assert url_in("[X-Ingle]\nURL=file:///etc/passwd\n") is None
    assert url_in("URL=http://x\n") is None


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", ".x", "a b", "a%", "a@b", "x" * 62, "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a service") as caught:
        checked_name(name)
    assert "\n" not in str(caught.value)


def test_name_with_its_ending() -> None:
    assert checked_name("chat-7b.service") == "chat-7b"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("kind", UNITS)
def test_systemd_has_nothing_to_say(kind: str, tmp_path: Path) -> None:
    assert _verify(UNITS[kind].text(), tmp_path, own=kind == "own") == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_would_say_something(tmp_path: Path) -> None:
    assert "Restrt" in _verify(PLAIN.text().replace("Restart=", "Restrt="), tmp_path, own=False)


def _verify(text: str, folder: Path, *, own: bool) -> str:
    """What systemd-analyze says of a unit, not of those around it."""
    path = folder / "ingle-test.service"
    path.write_text(text)
    command = ["systemd-analyze", *(["--user"] if own else []), "--man=no", "verify", str(path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
    )
    return "\n".join(line for line in (done.stderr + done.stdout).splitlines() if path.name in line)
