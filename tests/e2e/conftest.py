"""A real server on the default model, and what its tests need to know about it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

READY_S = 120.0


@dataclass
class Server:
    """`ingle serve` as a child process; `log` grows as it speaks."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    url: str = ""

    def wait_ready(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + READY_S
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not come up:\n{self.text()}")
            if match := re.search(r"base URL: (http://\S+)/v1", self.text()):
                self.url = match[1]
            time.sleep(0.02)

    def text(self) -> str:
        return "".join(self.log)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def running(self) -> int:
        """Requests that are in the engine's batch now."""
        detail = httpx.get(f"{self.url}/health").raise_for_status().json()["detail"]
        return int(re.match(r"(\d+) requests running", detail)[1])  # type: ignore[index]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


def start_server(*arguments: str) -> Server:
    command = [sys.executable, "-m", "ingle", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    server = Server(process)
    server.wait_ready()
    return server


@pytest.fixture(scope="session")
def server(smollm2_gguf: Path) -> Iterator[Server]:
    """The default model in float32, so that every path to it gives the same greedy text."""
    running = start_server("smollm2:135m", "--dtype", "float32", "--kv-cache-memory", "1GiB")
    yield running
    assert running.stop() == 0, running.text()
