"""ingle service, in a root of its own and with a systemctl that only takes notes."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ingle.cli import service
from ingle.cli.service_unit import CARRIED
from ingle.service import reach, systemd
from tests.cli.conftest import Run

_SYSTEMCTL = """\
#!/bin/sh
echo "$@" >> "$NOTES/calls"
test "$1" = --user && shift
shift
if test -e "$NOTES/fail-$1"; then cat "$NOTES/fail-$1" >&2; exit 5; fi
cat "$NOTES/say-$1$2" "$NOTES/say-$1" 2>/dev/null
exit 0
"""
_JOURNALCTL = """\
#!/bin/sh
cat "$NOTES/journal" 2>/dev/null
"""


@dataclass
class Machine:
    root: Path
    notes: Path
    model: Path
    port: int

    def say(self, words: str, text: str) -> None:
        """What systemctl answers to such words."""
        (self.notes / f"say-{words.replace(' ', '')}").write_text(text)

    def calls(self) -> list[str]:
        """What systemctl was told, without questions."""
        try:
            lines = (self.notes / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        words = [line.replace("--no-pager ", "") for line in lines]
        return [line for line in words if not line.removeprefix("--user ").startswith(("is-active", "show"))]

    @property
    def unit(self) -> Path:
        return self.root / "etc/systemd/system/ingle.service"

    @property
    def variables(self) -> Path:
        return self.root / "etc/ingle/ingle.env"


@pytest.fixture
def machine(ingle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Of root's, with a model folder that all may read."""
    root, notes, programs, model = (tmp_path / name for name in ("root", "notes", "bin", "models/m 1"))
    for folder in (root / "run/systemd/system", notes, programs, model):
        folder.mkdir(parents=True)
    for name, text in (("systemctl", _SYSTEMCTL), ("journalctl", _JOURNALCTL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    model.chmod(0o755)
    (model / "config.json").write_text("{}")
    (model / "config.json").chmod(0o644)
    for name in (*CARRIED, "INGLE_HOME", "INGLE_API_KEY", "INGLE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "ROOT", root)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(reach, "HIDDEN", (*reach.HIDDEN, tmp_path.parent))  # as /tmp is
    monkeypatch.setattr(reach, "of_python", set)  # it may lie where only its owner reads
    monkeypatch.setattr("ingle.cli.service_unit._check_python", lambda reader, visible: None)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    made = Machine(root, notes, model, port)
    made.say("is-active", "active\n")
    return made


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_health", lambda url: (True, "ok"))


def _install(ingle: Run, machine: Machine, *flags: str) -> tuple[int, str, str]:
    result = ingle("service", "install", str(machine.model), "--port", str(machine.port), "--device", "cpu", *flags)
    return result.code, result.out, result.err


def test_help_and_mistyped_commands(ingle: Run) -> None:
    assert "uninstall" in ingle("service").out
    result = ingle("service", "unistall")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "did you mean `ingle service uninstall`?" in result.err
    assert "--run-as" in ingle("service", "install", "--help").out


def test_print_is_what_install_writes(ingle: Run, machine: Machine, healthy: None) -> None:
    flags = (str(machine.model), "--port", str(machine.port), "--device", "cpu", "--max-model-len", "4k")
    printed = ingle("service", "print", *flags)
    assert printed.code == 0 and not machine.calls() and not machine.unit.exists() and not machine.variables.exists()
    command = next(line for line in printed.out.splitlines() if line.startswith("ExecStart="))
    assert command == (
        f'ExecStart={sys.executable} -m ingle serve "{machine.model}" --port={machine.port} --device=cpu '
        "--max-model-len=4k"
    )
    assert f'BindReadOnlyPaths="{machine.model}"' in printed.out
    assert ingle("service", "install", *flags).code == 0
    assert machine.unit.read_text() == printed.out


def test_print_while_the_port_is_taken(ingle: Run, machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", machine.port)):
        result = ingle("service", "print", str(machine.model), "--port", str(machine.port))
        assert result.code == 0
        code, _, err = _install(ingle, machine)
    assert code != 0 and "cannot listen on" in err and not machine.unit.exists()


def test_install(ingle: Run, machine: Machine, healthy: None) -> None:
    code, out, err = _install(ingle, machine)
    assert (code, err) == (0, "")
    assert machine.calls() == [
        "daemon-reload",
        "enable ingle.service",
        "reset-failed ingle.service",
        "restart ingle.service",
    ]
    assert stat.S_IMODE(machine.unit.stat().st_mode) == 0o644
    assert stat.S_IMODE(machine.variables.stat().st_mode) == 0o600
    assert f"it answers on http://127.0.0.1:{machine.port}: ok" in out
    assert "journalctl -u ingle -f" in out and "ingle service status" in out
    assert "as it was" in _install(ingle, machine)[1]
    assert f"wrote {machine.unit} anew" in _install(ingle, machine, "--max-model-len=2k")[1]


def test_secrets_stand_in_a_file_for_root_alone(
    ingle: Run, machine: Machine, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Qx7")
    monkeypatch.setenv("https_proxy", "http://me:Qx7@proxy:3128")
    code, out, err = _install(ingle, machine, "--api-key", "sk-Qx7", "sk-$Qx7")
    assert code == 0
    for text in (machine.unit.read_text(), out, err):
        assert "Qx7" not in text
    for call in machine.calls():
        assert "Qx7" not in call
    lines = machine.variables.read_text().splitlines()
    assert 'HF_TOKEN="hf_Qx7"' in lines and 'INGLE_API_KEY="sk-Qx7,sk-\\$Qx7"' in lines
    printed = ingle("service", "print", str(machine.model), "--api-key", "sk-Qx7")
    assert "Qx7" not in printed.out + printed.err and "INGLE_API_KEY" in printed.err


def test_files_for_their_owner_are_handed_over_by_systemd(ingle: Run, machine: Machine, tmp_path: Path) -> None:
    keys, config = tmp_path / "keys", tmp_path / "c.toml"
    keys.write_text("sk-Qx7\n")
    config.write_text('log-level = "warning"\n')
    flags = ("--api-key-file", str(keys), "--config", str(config))
    out = ingle("service", "print", str(machine.model), *flags).out
    assert "--config=${CREDENTIALS_DIRECTORY}/config.toml --api-key-file=${CREDENTIALS_DIRECTORY}/api-keys\n" in out
    assert f"LoadCredential=api-keys:{keys}\n" in out and f"LoadCredential=config.toml:{config}\n" in out
    assert "sk-Qx7" not in out and "log-level" not in out
    own = ingle("service", "print", str(machine.model), "--user", *flags).out
    assert f"--config={config} --api-key-file={keys}\n" in own and "LoadCredential" not in own


def test_certificates_are_handed_over_too(ingle: Run, machine: Machine, healthy: None) -> None:
    files = Path(__file__).parents[1] / "server" / "tls"
    flags = ("--ssl-certfile", str(files / "server.pem"), "--ssl-keyfile", str(files / "encrypted.key"))
    code, out, _ = _install(ingle, machine, *flags, "--ssl-keyfile-password", "open-sesame", "--admin-api-key", "r-Qx7")
    text = machine.unit.read_text()
    assert code == 0 and f"https://127.0.0.1:{machine.port}" in out
    assert (
        "--ssl-certfile=${CREDENTIALS_DIRECTORY}/certificate.pem --ssl-keyfile=${CREDENTIALS_DIRECTORY}/key.pem" in text
    )
    assert f"LoadCredential=key.pem:{files / 'encrypted.key'}\n" in text
    assert "open-sesame" not in text + out and "Qx7" not in text + out
    lines = machine.variables.read_text().splitlines()
    assert 'INGLE_SSL_KEYFILE_PASSWORD="open-sesame"' in lines and 'INGLE_ADMIN_API_KEY="r-Qx7"' in lines


def test_a_key_that_the_service_has_already_lets_it_be_reached(ingle: Run, machine: Machine, healthy: None) -> None:
    code, _, err = _install(ingle, machine, "--host", "0.0.0.0", "--api-key", "sk-Qx7")
    assert code == 0, err
    code, _, err = _install(ingle, machine, "--host", "0.0.0.0", "--max-model-len", "1k")  # as an upgrade is
    assert code == 0 and 'INGLE_API_KEY="sk-Qx7"' in machine.variables.read_text(), err
    machine.variables.write_text('# INGLE_API_KEY="sk-Qx7"\n')
    code, _, err = _install(ingle, machine, "--host", "0.0.0.0")
    assert code != 0 and "--allow-open" in err


def test_relative_paths_become_absolute(ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machine.notes)
    out = ingle("service", "print", "../models/m 1").out
    assert f'serve "{machine.model}"' in out and f'BindReadOnlyPaths="{machine.model}"\n' in out


def test_a_prompt_cache_lies_where_the_service_may_write(ingle: Run, machine: Machine) -> None:
    folder = "/var/lib/ingle/prompt-cache"
    assert f"--disk-cache={folder}\n" in ingle("service", "print", str(machine.model), "--disk-cache", folder).out
    assert (
        "--disk-cache=/srv/kv\n"
        in ingle("service", "print", str(machine.model), "--user", "--disk-cache", "/srv/a/../kv").out
    )


def test_settings_of_the_environment_are_kept(ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGLE_MAX_MODEL_LEN", "1k")
    assert "--max-model-len=1000\n" in ingle("service", "print", str(machine.model)).out


def test_a_name_is_pulled_by_the_service_into_its_own_store(ingle: Run, machine: Machine) -> None:
    result = ingle("service", "print", "smollm2:135m", "--name", "small")
    assert "serve smollm2:135m" in result.out and "INGLE_HOME=/var/lib/small" in result.out
    assert "store of its own, /var/lib/small" in result.err


def test_run_as_uses_the_store_of_that_user(
    ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setenv("INGLE_HOME", str(tmp_path / "store"))
    out = ingle("service", "print", str(machine.model), "--run-as", me).out
    assert f"User={me}\n" in out and "DynamicUser" not in out
    assert f"INGLE_HOME={tmp_path}/store\n" in out and f"BindPaths={tmp_path}/store\n" in out
    result = ingle("service", "print", str(machine.model))
    assert f"{tmp_path}/store" not in result.out and "holds with --run-as" in result.err


def test_own_service(
    ingle: Run, machine: Machine, healthy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HF_TOKEN", "hf_Qx7")
    code, out, err = _install(ingle, machine, "--user")
    assert (code, err) == (0, "")
    assert all(call.startswith("--user ") for call in machine.calls()) and machine.calls()
    unit, variables = tmp_path / "config/systemd/user/ingle.service", tmp_path / "config/ingle/ingle.env"
    assert f"EnvironmentFile={variables}\n" in unit.read_text()
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    assert "loginctl enable-linger" in out and "ingle service status --user" in out
    assert ingle("service", "uninstall", "--user").code == 0
    assert not unit.exists() and variables.exists()


def test_only_root_installs_and_the_line_to_type_is_told(
    ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HF_TOKEN", "hf_Qx7")
    code, out, err = _install(ingle, machine, "--api-key", "sk-Qx7")
    assert (code, out, err.count("\n")) == (2, "", 1)
    line = shlex.split(err.split("`")[1])
    assert line[:7] == ["sudo", "--preserve-env=HF_TOKEN", sys.executable, "-m", "ingle", "service", "install"]
    assert line[7:] == [str(machine.model), "--port", str(machine.port), "--device", "cpu", "--api-key", "KEY"]
    assert not machine.unit.exists() and not machine.variables.exists()
    assert "sudo " in ingle("service", "uninstall").err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--name", "../x"], "is no name for a service"),
        (["--run-as", "nobody-of-that-name"], "there is no user 'nobody-of-that-name'"),
        (["--run-as", "root", "--user"], "leave one out"),
        (["--port", "0"], "another address at each start"),
        (["--api-key", "a,b"], "give --api-key-file"),
        (["--host", "http://x"], "more than an address"),
        (["--host", "0.0.0.0"], "give INGLE_API_KEY or --api-key, or --allow-open"),
        (["--uds", "/run/x.sock"], "a service listens on an address and a port"),
        (["--ssl-certfile", "/nowhere.pem"], "--ssl-certfile /nowhere.pem: No such file"),
        (["--max-model-len", "-1"], "max-model-len"),
        (
            ["--disk-cache", "/srv/kv"],
            "the service writes below /var/lib/ingle alone: give --disk-cache /var/lib/ingle/",
        ),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_refused_before_anything_is_written(ingle: Run, machine: Machine, flags: list[str], words: str) -> None:
    code, out, err = _install(ingle, machine, *flags)
    assert (code != 0, out, err.count("\n")) == (True, "", 1)
    assert err.startswith("ingle: ") and words in err
    assert not machine.unit.exists() and not machine.variables.exists() and not machine.calls()


def test_a_model_that_is_nowhere(ingle: Run, machine: Machine) -> None:
    result = ingle("service", "install", "./gone", "--port", str(machine.port))
    assert result.code == 1 and result.err.count("\n") == 1 and not machine.unit.exists()


def test_a_model_that_the_services_user_may_not_read(ingle: Run, machine: Machine) -> None:
    (machine.model / "config.json").chmod(0o600)
    code, _, err = _install(ingle, machine)
    assert code != 0 and f"{machine.model}/config.json of the model is not for a user" in err and err.count("\n") == 1


def test_units_of_others_are_left_alone(ingle: Run, machine: Machine) -> None:
    machine.say("show --property=FragmentPath", "/usr/lib/systemd/system/ssh.service\n")
    code, _, err = _install(ingle, machine, "--name", "ssh")
    assert code != 0 and "is not ingle's: give another --name" in err
    machine.unit.parent.mkdir(parents=True)
    machine.unit.write_text("[Unit]\n")
    for command in (("install", str(machine.model)), ("uninstall",), ("status",)):
        assert "was not written by ingle" in ingle("service", *command).err
    assert machine.unit.read_text() == "[Unit]\n" and not machine.calls()


def test_systemctl_that_refuses(ingle: Run, machine: Machine, healthy: None) -> None:
    (machine.notes / "fail-restart").write_text("Job for ingle.service failed.\nSee \x1b[1mlog\n")
    code, _, err = _install(ingle, machine)
    assert code != 0 and err == (
        "ingle: `systemctl restart ingle.service` failed: Job for ingle.service failed. See \\x1b[1mlog\n"
    )


def test_a_server_that_ends_says_why(ingle: Run, machine: Machine) -> None:
    machine.say("is-active", "failed\n")
    (machine.notes / "journal").write_text("loading\ningle: too large for this machine\nbye\n")
    code, _, err = _install(ingle, machine)
    assert code != 0 and err == "ingle: ingle.service does not stay up: too large for this machine\n"
    (machine.notes / "journal").unlink()
    assert "see `journalctl -u ingle -f`" in _install(ingle, machine)[2]


def test_a_server_that_does_not_answer_yet(ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_UP_S", 0.0)
    code, out, _ = _install(ingle, machine)
    assert code == 0 and "does not answer on" in out


def test_without_systemd(ingle: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.root / "run/systemd/system").rmdir()
    (machine.root / ".dockerenv").touch()
    for command in (("install", str(machine.model)), ("uninstall",), ("status",)):
        result = ingle("service", *command)
        assert result.code == 1 and "systemd does not run this machine" in result.err
        assert "docker run --restart" in result.err and result.err.count("\n") == 1
    assert ingle("service", "print", str(machine.model)).code == 0


def test_uninstall(ingle: Run, machine: Machine, healthy: None) -> None:
    assert _install(ingle, machine)[0] == 0
    (machine.notes / "calls").unlink()
    result = ingle("service", "uninstall")
    assert (result.code, result.err) == (0, "")
    assert machine.calls() == ["disable --now ingle.service", "daemon-reload", "reset-failed ingle.service"]
    assert not machine.unit.exists() and machine.variables.exists()
    assert f"kept: {machine.variables}, /var/lib/ingle (--purge removes them)" in result.out
    result = ingle("service", "uninstall")
    assert result.code != 0 and f"there is no {machine.unit}" in result.err and result.err.count("\n") == 1


def test_purge(ingle: Run, machine: Machine, healthy: None) -> None:
    assert _install(ingle, machine)[0] == 0
    assert ingle("service", "uninstall", "--purge").code == 0
    assert "clean --what=state ingle.service" in machine.calls()
    assert not machine.unit.exists() and not machine.variables.exists()


def test_another_name_is_told(ingle: Run, machine: Machine, healthy: None) -> None:
    assert _install(ingle, machine, "--name", "chat")[0] == 0
    (machine.unit.parent / "ssh.service").write_text("[Unit]\n")
    result = ingle("service", "status")
    assert result.code != 0 and "ingle's are: chat (--name NAME)" in result.err


class _Health(BaseHTTPRequestHandler):
    status, body = 200, b'{"status": "ok"}'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server where that of the service would be, and a unit that runs."""
    text = f"# Written by `ingle service`\n[X-Ingle]\nURL=http://127.0.0.1:{machine.port}\n"
    systemd.write(machine.unit, text, 0o644)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for one's own machine
    machine.say("status", "● ingle.service\n   Active: active (running) \x1b[2J\n")
    with ThreadingHTTPServer(("127.0.0.1", machine.port), _Health) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_status(ingle: Run, machine: Machine, answering: None) -> None:
    result = ingle("service", "status")
    assert (result.code, result.err) == (0, "")
    assert "Active: active (running) \\x1b[2J" in result.out
    assert f"URL:    http://127.0.0.1:{machine.port}/v1" in result.out and "health: ok" in result.out


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (json.dumps({"detail": "loads its weights\x1b"}).encode(), "loads its weights\\x1b"),
        (b"<html>", "HTTP 503"),
        (b"[1]", "HTTP 503"),
    ],
)
def test_status_of_a_server_that_loads(
    ingle: Run, answering: None, monkeypatch: pytest.MonkeyPatch, body: bytes, shown: str
) -> None:
    monkeypatch.setattr(_Health, "status", 503)
    monkeypatch.setattr(_Health, "body", body)
    result = ingle("service", "status")
    assert result.code == 1 and f"health: {shown}\n" in result.out
    assert result.err == "ingle: ingle.service runs, and takes no requests yet\n"


def test_status_of_a_service_that_failed(ingle: Run, machine: Machine) -> None:
    text = f"# Written by `ingle service`\n[X-Ingle]\nURL=http://127.0.0.1:{machine.port}\n"
    systemd.write(machine.unit, text, 0o644)
    machine.say("is-active", "failed\n")
    (machine.notes / "journal").write_text("ingle: cannot listen on 127.0.0.1:8000\n")
    result = ingle("service", "status")
    assert result.code == 1 and "health: no answer" in result.out
    assert result.err == "ingle: ingle.service is failed: cannot listen on 127.0.0.1:8000\n"
