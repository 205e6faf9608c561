"""Which servers run: those whose process lives, and no others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingle.cli.main import main
from ingle.server import running

INFO: Any = SimpleNamespace(weight_bytes=3_000_000_000, kv_cache_bytes=200_000_000, device="cpu", max_model_len=2048)

SERVER = """
import signal, socket, sys, time
from types import SimpleNamespace
from ingle.server.running import announced, url_of
info = SimpleNamespace(weight_bytes=3_000_000_000, kv_cache_bytes=200_000_000, device="cpu", max_model_len=2048)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    with announced(sys.argv[1:], info, url_of(sock)):
        print(sock.getsockname()[1], flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INGLE_HOME", str(tmp_path))
    return tmp_path


@contextmanager
def server(*names: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that says it serves, and its port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, *names], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    waiter = threading.Thread(target=process.wait)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        if waiter.is_alive():
            waiter.join()


def test_a_record_says_what_runs_and_no_more(own_home: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        port = sock.getsockname()[1]
        with running.announced(["a", "b"], INFO, running.url_of(sock)):
            (file,) = (own_home / "running").iterdir()
            assert file.stat().st_mode & 0o777 == 0o600 and (own_home / "running").stat().st_mode & 0o777 == 0o700
            (found,) = running.servers()
            assert (found.pid, found.models, found.url) == (os.getpid(), ["a", "b"], f"http://127.0.0.1:{port}")
            assert (found.size, found.device, found.context, found.port) == (3_200_000_000, "cpu", 2048, port)
            assert set(json.loads(file.read_text())) == set(running.Running.__struct_fields__)
    assert running.servers() == [] and not list((own_home / "running").iterdir())


def test_who_was_killed_does_not_run(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server("m") as (process, _):
        assert [found.models for found in running.servers()] == [["m"]]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list((own_home / "running").iterdir())
        assert main(["ps"]) == 0
    assert capsys.readouterr().out == "no server runs: `ingle serve MODEL` starts one\n"
    assert not list((own_home / "running").iterdir())


def test_a_damaged_record_is_left_out(own_home: Path) -> None:
    (own_home / "running").mkdir()
    (own_home / "running" / "1.json").write_text("{")
    (own_home / "running" / "2.json").symlink_to("/etc/passwd")
    assert running.servers() == []


def test_a_home_that_cannot_be_written_to_is_a_notice(own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own_home / "running").write_text("a file in the way")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with running.announced(["m"], INFO, running.url_of(sock)):
            assert running.servers() == []
    assert "`ingle ps` will not show this server" in caplog.text


def test_ps(capsys: pytest.CaptureFixture[str]) -> None:
    with server("smollm2:135m", "x\x1b[2J") as (process, port):
        assert main(["ps"]) == 0
        head, row = capsys.readouterr().out.splitlines()
        assert head.split() == ["NAME", "SIZE", "DEVICE", "CONTEXT", "URL", "UPTIME", "PID"]
        shown = row.split()
        assert shown[:5] == ["smollm2:135m,", "x\\x1b[2J", "3.2", "GB", "cpu"] and shown[-1] == str(process.pid)
        assert shown[5:7] == ["2048", f"http://127.0.0.1:{port}"]
        assert main(["ps", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["pid"] == process.pid and found["models"] == ["smollm2:135m", "x\x1b[2J"]


@pytest.mark.parametrize("by", ["name", "other name", "last part", "port", "pid", "all"])
def test_stop(by: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server("./models/tiny", "other") as (process, port):
        threading.Thread(target=process.wait, daemon=True).start()  # as whoever started a server does
        name = {"name": "./models/tiny", "other name": "other", "last part": "tiny", "port": str(port),
                "pid": str(process.pid), "all": "all"}[by]  # fmt: skip
        assert main(["stop", name]) == 0
        assert capsys.readouterr().out == f"stopped ./models/tiny on port {port}\n"
        assert running.servers() == [] and process.wait(5) == 0


def test_whom_to_stop_must_be_clear(capsys: pytest.CaptureFixture[str]) -> None:
    with server("m") as (_, one), server("m") as (_, two):
        assert main(["stop", "m"]) == 1
        assert (
            capsys.readouterr().err
            == f"ingle: 2 servers have m: `ingle stop` the one on port {one} or port {two}, or all\n"
        )
        assert main(["stop", "n"]) == 1
        assert capsys.readouterr().err == (
            f"ingle: no server for 'n' runs; running: m on port {one}, m on port {two}\n"
        )
        assert len(running.servers()) == 2


def test_an_address_of_every_interface() -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::", 0))
        assert running.url_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"
