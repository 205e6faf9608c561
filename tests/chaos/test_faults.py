"""Processes that die, stall or cannot write: what is lost is said, and what is left goes on or ends whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos import raw
from tests.chaos.conftest import ROOMY, Start
from tests.chaos.target import Target
from tests.e2e.conftest import command_line, descendants, until

ENDLESS = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True}
RESTART_S = 60.0


def stream(target: Target, **fields: Any) -> tuple[int, str]:
    """Status and text of a long stream, or what there was of it."""
    with target.http.stream("POST", "/v1/completions", json={**ENDLESS, **fields, "stream": True}) as response:
        return response.status_code, "".join(response.iter_text())


def whole(target: Target, **fields: Any) -> httpx.Response:
    return target.http.post("/v1/completions", json={**ENDLESS, **fields})


def last_event(text: str) -> Any:
    return json.loads(text.strip().rpartition("data: ")[2])


def ready(target: Target) -> int:
    return target.http.get("/health/ready").status_code


@contextlib.contextmanager
def busy(target: Target, num: int = 4, **fields: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Long streams and long answers under way."""
    with ThreadPoolExecutor(2 * num) as pool:
        streams = [pool.submit(stream, target, **fields) for _ in range(num)]
        answers = [pool.submit(whole, target, **fields) for _ in range(num)]
        assert until(lambda: target.load()[0] == 2 * num), target.load()
        yield streams, answers


def ends(pids: list[int]) -> bool:
    return until(lambda: not any(Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid) for pid in pids), 20.0)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (OSError, IndexError):
        return True


def check_told(streams: list[Any], answers: list[Any]) -> None:
    """Each request in flight has an error that says what befell it."""
    for future in streams:
        status, text = future.result()
        assert status == 200 and "engine" in last_event(text)["error"]["message"], text[-500:]
    for future in answers:
        response = future.result()
        assert response.status_code == 503, response.text
        assert "engine" in response.json()["error"]["message"]


def comes_back(target: Target, before: int) -> None:
    assert until(lambda: ready(target) == 200 and target.engine != before, RESTART_S), target.server.text()[-3000:]
    target.check()


def test_an_engine_that_is_killed_is_replaced(start: Start) -> None:
    """kill -9 in mid-stream: whoever had an answer under way is told, readiness says no, and a new engine serves."""
    target = start(*ROOMY)
    for _ in range(2):
        before = target.engine
        with busy(target) as (streams, answers):
            os.kill(before, signal.SIGKILL)
            assert until(lambda: ready(target) == 503, 5.0), "readiness does not tell"
        check_told(streams, answers)
        comes_back(target, before)
        assert ends([before])


def test_requests_that_wait_are_served_by_the_next_engine(start: Start) -> None:
    target = start("--max-num-seqs", "1", *ROOMY)
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(whole, target)
        assert until(lambda: target.load()[0] == 1)
        waiting = [pool.submit(whole, target, max_tokens=3, temperature=0) for _ in range(3)]
        assert until(lambda: target.load()[1] == 3)
        before = target.engine
        os.kill(before, signal.SIGKILL)
        assert running.result().status_code == 503
        assert [answer.result().status_code for answer in waiting] == [200] * 3
    comes_back(target, before)


def test_an_engine_that_stalls_is_replaced(start: Start) -> None:
    """SIGSTOP: it is there, its socket is open, and nothing comes. Readiness says so, and it is ended in time."""
    target = start(*ROOMY)
    before = target.engine
    with busy(target) as (streams, answers):
        os.kill(before, signal.SIGSTOP)
        assert until(lambda: ready(target) == 503, 15.0), "readiness does not tell"
    check_told(streams, answers)
    comes_back(target, before)
    assert ends([before])


def test_a_stop_and_a_start_in_time_is_no_fault(start: Start) -> None:
    """A laptop's lid, a debugger: nothing is lost of a short pause."""
    target = start(*ROOMY)
    before = target.engine
    with busy(target, num=1, max_tokens=3000) as (streams, answers):
        os.kill(before, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(before, signal.SIGCONT)
    assert all(future.result()[1].endswith("data: [DONE]\n\n") for future in streams)
    assert all(future.result().status_code == 200 for future in answers)
    assert target.engine == before
    target.check()


def test_a_server_that_is_killed_leaves_no_orphan(start: Start) -> None:
    target = start(*ROOMY)
    children = list(target.processes())
    assert len(children) >= 2
    with contextlib.suppress(httpx.HTTPError), busy(target):
        target.server.process.kill()
    assert ends(children)


def test_a_server_that_is_killed_with_a_stopped_engine_leaves_no_orphan(start: Start) -> None:
    target = start()
    children = list(target.processes())
    os.kill(target.engine, signal.SIGSTOP)
    target.server.process.kill()
    assert ends(children)


def test_a_server_that_is_stopped_with_a_stopped_engine_ends(start: Start) -> None:
    target = start()
    children = list(target.processes())
    os.kill(target.engine, signal.SIGSTOP)
    target.server.process.send_signal(signal.SIGTERM)
    target.server.process.wait(timeout=30)
    assert ends(children)


def test_processes_of_templates_that_are_killed_are_replaced(standing: Target) -> None:
    def attack() -> None:
        for pid, kind in standing.processes().items():
            if kind == "template":
                os.kill(pid, signal.SIGKILL)

    standing.withstands(attack)


@pytest.mark.slow
def test_a_stopped_process_of_templates_holds_up_no_other(start: Start) -> None:
    """Its request ends in time, and is the only one."""
    target = start()
    for pid, kind in target.processes().items():
        if kind == "template":
            os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        stuck = pool.submit(
            target.http.post,
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        )
        assert target.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert stuck.result().status_code in (200, 400, 500, 503)
    target.check()


# ---- a log that cannot be written


def limited(what: int, most: int) -> Callable[[], None]:
    """To be called in the child: a limit that it inherits."""
    return lambda: resource.setrlimit(what, (most, most))


def asks(target: Target, num: int = 300) -> None:
    for index in range(num):
        target.http.get("/health")
        if index % 50 == 0:
            assert target.ask() == target.answers


def test_a_log_on_a_full_disk_stops_nobody(start: Start, tmp_path: Path) -> None:
    """Limited to some kB, as a disk that fills up: what does not fit is lost, and answers go on."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        target = start(stderr=file, preexec_fn=limited(resource.RLIMIT_FSIZE, 8192))
        target.withstands(lambda: asks(target))
    assert log.stat().st_size <= 8192
    assert target.server.stop() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_takes_nothing_stops_nobody(start: Start, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        target = start(stderr=full)
        target.withstands(lambda: asks(target))
    assert target.server.stop() == 0


def test_a_log_that_nobody_reads_stops_nobody(start: Start) -> None:
    """A pipe whose reader sleeps."""
    ours, theirs = os.pipe()
    try:
        target = start(stderr=theirs)
        os.close(theirs)
        target.withstands(lambda: asks(target, 1500))
        assert target.server.stop() == 0
    finally:
        os.close(ours)


def test_a_log_whose_reader_is_gone_stops_nobody(start: Start) -> None:
    ours, theirs = os.pipe()
    target = start(stderr=theirs)
    os.close(theirs)
    os.close(ours)
    target.withstands(lambda: asks(target))
    assert target.server.stop() == 0


def test_a_full_disk_under_uploads(start: Start) -> None:
    """A file that does not fit is refused, and nothing of it stays."""
    target = start(stderr=subprocess.DEVNULL, preexec_fn=limited(resource.RLIMIT_FSIZE, 1 << 20))
    line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}})

    def attack() -> None:
        for size in (1 << 19, 1 << 22):
            files = {"file": ("lines.jsonl", (line + "\n") * (size // len(line)))}
            response = target.http.post("/v1/files", data={"purpose": "batch"}, files=files)
            assert response.status_code == (200 if size < 1 << 20 else 507), response.text
        (file,) = target.http.get("/v1/files").json()["data"]
        assert target.http.delete(f"/v1/files/{file['id']}").status_code == 200

    target.withstands(attack)
    assert command_line(target.engine) and descendants(target.api)


def test_few_descriptors(start: Start) -> None:
    """A server that may open few files takes as many connections as it can, and lives."""
    target = start(stderr=subprocess.DEVNULL, preexec_fn=limited(resource.RLIMIT_NOFILE, 120))

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(raw.connect(target.port)) for _ in range(200)]
            refused = sum(until_closed(sock) for sock in sockets[100:])
            assert refused > 50

    target.withstands(attack)


def until_closed(sock: socket.socket) -> bool:
    """Whether it is told that there are too many."""
    sock.settimeout(5.0)
    with contextlib.suppress(OSError):
        return b"too_many_connections" in sock.recv(1 << 12)
    return False
