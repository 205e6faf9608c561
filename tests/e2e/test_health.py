"""What a server says of its health while its processes are stopped and killed, and that none of them is left over."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, command_line, descendants, start_server, until

SERVER = ("--served-model-name", "tiny", "--kv-cache-memory", "64MiB")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASK = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True}
WITHIN_S = 60.0
TRUTH_S = 5.0
"""Within which /health/ready tells that an engine does not live."""


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Iterator[Server]:
    """For tests after which it is as before."""
    server = start_server(str(tiny_model), *SERVER, "--chat-template", TEMPLATE, "--max-num-seqs", "2")
    yield server
    assert server.stop() == 0, server.text()


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


def ready(server: Server) -> int:
    return httpx.get(f"{server.url}/health/ready", timeout=30).status_code


def answer(server: Server, body: dict[str, object] = ASK) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def num_waiting(server: Server) -> int:
    return int(re.search(r"(\d+) waiting", httpx.get(f"{server.url}/health").text)[1])  # type: ignore[index]


def gone(pids: list[int]) -> bool:
    return not any(command_line(pid) for pid in pids)


class Stream:
    """A streamed answer that is read in a thread."""

    def __init__(self, server: Server, body: dict[str, object]) -> None:
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(server, body | {"stream": True}), daemon=True)
        self._thread.start()

    def _read(self, server: Server, body: dict[str, object]) -> None:
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
        ):
            self.lines.extend(filter(None, response.iter_lines()))

    def ended(self) -> list[str]:
        self._thread.join(WITHIN_S)
        assert not self._thread.is_alive()
        return self.lines


def test_an_engine_that_is_killed_is_followed_by_another(shared: Server) -> None:
    right = answer(shared).json()["choices"][0]["text"]
    first = shared.engine_pid()
    with ThreadPoolExecutor(2) as pool:
        stream = Stream(shared, LONG | {"n": 128})  # two at a time
        assert until(lambda: shared.running() == 2, WITHIN_S)
        waits = pool.submit(answer, shared, ASK | {"n": 128})
        assert until(lambda: num_waiting(shared) > 128, WITHIN_S)
        os.kill(first, signal.SIGKILL)
        assert until(lambda: ready(shared) == 503, TRUTH_S)
        assert httpx.get(f"{shared.url}/health/live").status_code == 200
        error = json.loads(stream.ended()[-1].removeprefix("data: "))["error"]
        assert "killed by SIGKILL" in error["message"] and "send the request again" in error["message"]
        assert {choice["text"] for choice in waits.result().json()["choices"]} == {right}
    assert until(lambda: ready(shared) == 200, WITHIN_S)
    assert shared.engine_pid() != first and gone([first])
    assert answer(shared).json()["choices"][0]["text"] == right
    assert "a new one is started (1 of 5 in a row)" in shared.text() and "Traceback" not in shared.text()


def test_a_stopped_engine_is_not_ready_until_it_goes_on(shared: Server) -> None:
    pid = shared.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert until(lambda: ready(shared) == 503, 2 * TRUTH_S)
        assert time.monotonic() - started < TRUTH_S
        refused = answer(shared)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert "is stopped" in refused.json()["error"]["message"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert until(lambda: ready(shared) == 200, WITHIN_S)
    assert shared.engine_pid() == pid and answer(shared).status_code == 200


@pytest.mark.slow  # a stuck process is given 10 s
def test_an_engine_that_stays_stopped_is_ended(shared: Server) -> None:
    pid = shared.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    assert until(lambda: gone([pid]), WITHIN_S)
    assert until(lambda: ready(shared) == 200, WITHIN_S)
    assert answer(shared).status_code == 200
    assert "its process is stopped, as by SIGSTOP; it is ended" in shared.text()


def test_a_template_process_that_is_killed_costs_nobody_an_answer(shared: Server) -> None:
    body = {"messages": [{"role": "user", "content": "<5>"}], "max_tokens": 2}

    def rendered() -> str:
        """What the tiny tokenizer has no tokens for."""
        return httpx.post(f"{shared.url}/v1/chat/completions", json=body, timeout=60).json()["error"]["message"]

    assert rendered() == "the prompt is empty: it must hold at least one token"
    for pid in descendants(shared.process.pid):
        if b"template_worker" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    assert rendered() == "the prompt is empty: it must hold at least one token"


def test_after_too_many_engines_the_server_ends_and_says_why(tiny_model: Path, servers: Callable[..., Server]) -> None:
    server = servers(str(tiny_model), *SERVER, "--max-engine-restarts", "1")
    for _ in range(2):
        assert until(lambda: ready(server) == 200, WITHIN_S)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert until(lambda: server.process.poll() is not None or ready_or_gone(server) != 200, TRUTH_S)
    assert server.process.wait(timeout=15) == 1
    assert until(lambda: "2 engines in a row have ended, so the server ends too" in server.text())
    assert "Traceback" not in server.text()


def ready_or_gone(server: Server) -> int:
    try:
        return ready(server)
    except httpx.TransportError:
        return 0


def test_a_second_sigterm_ends_it_at_once(tiny_model: Path, servers: Callable[..., Server]) -> None:
    server = servers(str(tiny_model), *SERVER, "--shutdown-timeout", "60", "--max-num-seqs", "2")
    children = descendants(server.process.pid)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(answer, server, LONG | {"n": 128})
        assert until(lambda: server.running() == 2, WITHIN_S)
        server.process.send_signal(signal.SIGTERM)
        assert until(lambda: "stopping: answers have 60 s to end" in server.text())
        time.sleep(0.3)  # what comes at once is the same signal, sent to the process and to its group
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0
        assert time.monotonic() - started < 5
        assert endless.result().status_code == 503
        assert "the server is being stopped" in endless.result().text
    assert gone(children) and "Traceback" not in server.text()


def test_a_server_that_is_killed_leaves_no_process(tiny_model: Path, servers: Callable[..., Server]) -> None:
    server = servers(str(tiny_model), *SERVER, "--chat-template", TEMPLATE)
    assert until(lambda: any(b"template_worker" in command_line(pid) for pid in descendants(server.process.pid)))
    children = descendants(server.process.pid)
    stream = Stream(server, LONG | {"n": 32})
    assert until(lambda: server.running() == 32, WITHIN_S)
    server.process.kill()
    server.process.wait()
    assert until(lambda: gone(children), TRUTH_S)
    assert stream is not None


def test_a_server_that_is_killed_while_it_starts_an_engine_leaves_no_process(
    tiny_model: Path, servers: Callable[..., Server]
) -> None:
    server = servers(str(tiny_model), *SERVER)
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    assert until(lambda: any(pid != first and command_line(pid) for pid in descendants(server.process.pid)))
    children = descendants(server.process.pid)
    server.process.kill()
    server.process.wait()
    assert until(lambda: gone(children), WITHIN_S)


def test_a_compiler_ends_with_an_engine_that_is_killed(
    tiny_model: Path, servers: Callable[..., Server], tmp_path: Path
) -> None:
    """With the driver, and what that has started; and a server that cannot load says so at once."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 78\n')
    compiler.chmod(0o755)
    server = servers(str(tiny_model), *SERVER, wait=False, CXX=str(compiler), INGLE_HOME=str(tmp_path / "home"))
    server.read()
    assert until(lambda: any(b"sleep\x0078" in command_line(pid) for pid in descendants(server.process.pid)), WITHIN_S)
    children = descendants(server.process.pid)
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.process.wait(timeout=15) == 1
    assert "the engine ended while it was loading: killed by SIGKILL" in server.text()
    assert until(lambda: gone(children), TRUTH_S)


def test_a_server_that_is_stopped_while_it_starts_an_engine_ends(
    tiny_model: Path, servers: Callable[..., Server]
) -> None:
    server = servers(str(tiny_model), *SERVER)
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    assert until(lambda: ready(server) == 503, TRUTH_S)
    children = descendants(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=15) == 0, server.text()
    assert until(lambda: gone(children), TRUTH_S) and "Traceback" not in server.text()


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """What /health/ready says all the while."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(ready(server))
            done.wait(0.05)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield seen
        finally:
            done.set()
            watching.result()


def test_a_long_prompt_never_makes_it_unready(shared: Server) -> None:
    context = httpx.get(f"{shared.url}/v1/models").json()["data"][0]["max_model_len"]
    with watched(shared) as seen:
        assert answer(shared, {"prompt": [5] * (context - 8), "max_tokens": 4}).status_code == 200
    assert set(seen) == {200}


def gpu_mib() -> int:
    """In use on the first card, in MiB."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.gpu
def test_on_a_gpu_neither_compilation_nor_capture_makes_it_unready_and_memory_comes_back(
    tiny_model: Path, servers: Callable[..., Server], tmp_path: Path
) -> None:
    """Nothing is compiled yet: Triton's cache is empty, and PyTorch's."""
    before = gpu_mib()
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    server = servers(str(tiny_model), *SERVER, "--device", "cuda", **caches)
    with watched(server) as seen:
        for num_choices in (1, 3, 9, 40, 100):
            for sampling in ({"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1, "logprobs": 2}):
                body = {"prompt": [5] * (num_choices + 60), "max_tokens": 40, "n": num_choices, "ignore_eos": True}
                assert answer(server, body | sampling).status_code == 200
        time.sleep(10)  # what is idle captures graphs
    assert set(seen) == {200}
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    assert until(lambda: server.text().count("the new engine is ready") == 1, WITHIN_S)
    assert answer(server).status_code == 200
    server.process.kill()
    server.process.wait()
    assert until(lambda: gpu_mib() < before + 64, WITHIN_S)
