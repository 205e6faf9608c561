"""A real server on the default model, and what its tests need to know about it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import pre_tokenizers

from tests.support import save_checkpoint

READY_S = 120.0


@dataclass
class Server:
    """`ingle serve` as a child process; `log` grows as it speaks."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    url: str = ""

    def wait_ready(self) -> None:
        self.read()
        deadline = time.monotonic() + READY_S
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not come up:\n{self.text()}")
            if match := re.search(r"base URL: (http://\S+)/v1", self.text()):
                self.url = match[1]
            time.sleep(0.02)

    def text(self) -> str:
        return "".join(self.log)

    def read(self) -> None:
        """Reads its log from now on."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def running(self) -> int:
        """Requests that are in the engine's batch now."""
        detail = httpx.get(f"{self.url}/health").raise_for_status().json()["detail"]
        return int(re.match(r"(\d+) requests running", detail)[1])  # type: ignore[index]

    def engine_pid(self) -> int:
        return next(pid for pid in descendants(self.process.pid) if b"ingle.engine.process" in command_line(pid))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


PYTHON = os.environ.get("TEST_PYTHON", sys.executable)
"""That runs the server, where the tests' own has other packages."""
SERVE = (PYTHON, "-m", "ingle", "serve")


@contextlib.contextmanager
def heard_signals() -> Iterator[None]:
    """A process that is started inside hears signals, although whoever runs the tests may ignore some.

    nohup ignores SIGHUP, and a shell's background job SIGINT; what is started inherits that.
    """
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def start_server(
    *arguments: str, under: Sequence[str] = (), serve: Sequence[str] = SERVE, wait: bool = True, **environment: str
) -> Server:
    """`under`: a command that runs the one that follows it, such as unshare; `serve`: the one that serves."""
    command = [*under, *serve, *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with heard_signals():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    server = Server(process)
    if wait:
        server.wait_ready()
    return server


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def descendants(pid: int) -> list[int]:
    """Children, and theirs, of a process, whichever of its threads started them."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [found for child in children for found in (child, *descendants(child))]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a folder, with a tokenizer and no chat template."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=300)
    vocab = {f"<{i}>": i for i in range(300)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    tokenizer = {"version": "1.0", "model": model, "decoder": {"type": "ByteLevel", "add_prefix_space": False,
                 "trim_offsets": True, "use_regex": True}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def save_byte_model(folder: Path, **overrides: Any) -> Path:
    """A random model that knows every byte, in `folder`.

    Its tokenizer takes texts apart into words, as those of models do: it keeps the last 10,000 that it has met.
    """
    save_checkpoint(folder, vocab_size=300, **overrides)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(44))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def tiny_server(tiny_model: Path) -> Iterator[Server]:
    """A server of its own, for tests that break it."""
    server = start_server(str(tiny_model), "--served-model-name", "tiny", "--kv-cache-memory", "64MiB")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def server(smollm2_gguf: Path) -> Iterator[Server]:
    """The default model in float32, so that every path to it gives the same greedy text."""
    running = start_server("smollm2:135m", "--dtype", "float32", "--kv-cache-memory", "1GiB")
    yield running
    assert running.stop() == 0, running.text()
