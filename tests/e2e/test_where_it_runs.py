"""A server in a container, under a supervisor, without streams, and told to stop whatever it is doing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, command_line, descendants, start_server, until

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
CLOSED_STREAMS = ("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-')
SERVER = ("--served-model-name", "tiny", "--kv-cache-memory", "64MiB")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
HI = {"messages": [{"role": "user", "content": "<5>"}], "max_tokens": 2}
AT_ONCE_S = 3.0


def test_as_process_1_it_serves_and_stops(tiny_model: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace of process ids")
    server = start_server(str(tiny_model), *SERVER, under=CONTAINER)
    try:
        body = {"prompt": [5, 6, 7], "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
        os.kill(descendants(server.process.pid)[0], signal.SIGTERM)  # the kernel drops what process 1 does not handle
        assert server.process.wait(timeout=10) == 0
    finally:
        server.process.kill()


@contextlib.contextmanager
def socket_on_any_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def processes_of(server: Server) -> list[int]:
    return [pid for pid in descendants(server.process.pid) if command_line(pid)]


def child(server: Server, part: bytes) -> int:
    """The process below the server whose command line holds `part`, once there is one."""
    assert until(lambda: any(part in command_line(pid) for pid in processes_of(server)))
    return next(pid for pid in processes_of(server) if part in command_line(pid))


def ended(pids: list[int]) -> bool:
    return not any(command_line(pid) for pid in pids)  # that of a zombie is empty


@pytest.fixture
def servers() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*arguments: str, **options: object) -> Server:
        started.append(start_server(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_its_processes_lets_answers_end(
    number: signal.Signals, tiny_model: Path, servers: Callable[..., Server]
) -> None:
    """As systemd stops a service; and to the engine and the templates' processes first."""
    server = servers(str(tiny_model), *SERVER, "--chat-template", TEMPLATE, "--shutdown-timeout", "60")
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "n": 48}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=90)
        assert until(lambda: server.running() == 48)
        children = processes_of(server)
        for pid in children:
            os.kill(pid, number)
        os.killpg(server.process.pid, number)
        assert answer.result().json()["usage"]["completion_tokens"] == 48 * 400
    assert server.process.wait(timeout=10) == 0
    assert ended(children)


def test_nohup_keeps_it(tiny_model: Path, servers: Callable[..., Server]) -> None:
    server = servers(str(tiny_model), *SERVER, under=("sh", "-c", 'trap \'\' HUP; exec "$0" "$@"'))
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_kernel_compile_ends_with_the_server(
    number: signal.Signals, code: int, tiny_model: Path, servers: Callable[..., Server], tmp_path: Path
) -> None:
    """With the driver, what it has started, and their files. Until then clients are told what it waits for."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nmktemp >/dev/null\nsleep 77\n')
    compiler.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    home = tmp_path / "home"
    environment = {"CXX": str(compiler), "INGLE_HOME": str(home), "TMPDIR": str(tmp_path / "tmp")}
    server = servers(str(tiny_model), *SERVER, wait=False, **environment)
    server.read()
    sleeping = child(server, b"sleep\x0077")
    children = processes_of(server)
    assert until(lambda: "listening on http" in server.text())
    url = re.search(r"listening on (http://[\d.:]+)", server.text())[1]  # type: ignore[index]
    health = httpx.get(f"{url}/health")
    assert health.status_code == 503 and "kernels" in health.json()["stage"] and health.headers["retry-after"]
    started = time.monotonic()
    os.killpg(server.process.pid, number)
    assert server.process.wait(timeout=10) == code
    assert time.monotonic() - started < AT_ONCE_S
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert until(lambda: ended([sleeping, *children]), 1.0)
    assert not [*home.rglob("tmp*"), *(tmp_path / "tmp").iterdir()]
    assert "Traceback" not in server.text()


def test_a_template_that_hangs_does_not_hold_up_the_end_of_loading(
    tiny_model: Path, servers: Callable[..., Server]
) -> None:
    server = servers(str(tiny_model), *SERVER, "--chat-template", TEMPLATE, wait=False)
    server.read()
    rendering = child(server, b"template_worker")
    os.kill(rendering, signal.SIGSTOP)
    time.sleep(1.0)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=10) == 0
    assert time.monotonic() - started < AT_ONCE_S
    assert until(lambda: ended([rendering]), 1.0)


def test_a_client_that_was_sent_nothing_is_told_although_a_thread_is_busy(
    tiny_model: Path, servers: Callable[..., Server]
) -> None:
    server = servers(str(tiny_model), *SERVER, "--chat-template", TEMPLATE)
    os.kill(child(server, b"template_worker"), signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=HI, timeout=30)
        time.sleep(0.5)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0
        assert time.monotonic() - started < 10, "`docker stop` kills after that"
        assert answer.result().status_code == 503
        assert "the server is being stopped" in answer.result().json()["error"]["message"]
    assert "Traceback" not in server.text()


# ---- streams


def test_without_standard_streams_it_serves(tiny_model: Path) -> None:
    """No socket or file of it takes their numbers: what is written to the log would go there."""
    with socket_on_any_port() as port:
        pass
    command = [*CLOSED_STREAMS, sys.executable, "-m", "ingle", "serve", str(tiny_model), *SERVER, "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        assert until(lambda: answers(url), 60.0)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": [5], "max_tokens": 2}, timeout=30).status_code == 200
        for pid in (process.pid, *descendants(process.pid)):
            opened = [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)]
            assert all(name == "/dev/null" or name.startswith("pipe:") for name in opened), opened
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_a_log_that_nobody_reads_does_not_stop_it(tiny_model: Path) -> None:
    with socket_on_any_port() as port:
        pass
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "ingle", "serve", str(tiny_model), *SERVER, "--port", str(port)]
    process = subprocess.Popen(command, stderr=write_end)
    url = f"http://127.0.0.1:{port}"
    try:
        assert until(lambda: answers(url), 60.0)
        os.set_blocking(write_end, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write_end, b"." * 4096)
        os.set_blocking(write_end, True)
        with httpx.Client() as client:
            for _ in range(300):
                assert client.get(f"{url}/health", timeout=5).status_code == 200
        process.terminate()
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        os.close(read_end)
        os.close(write_end)
