"""A server as process 1 of a container, told to stop by whoever supervises it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import descendants, start_server

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_as_process_1_it_serves_and_stops(tiny_model: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace of process ids")
    server = start_server(str(tiny_model), "--kv-cache-memory", "64MiB", under=CONTAINER)
    try:
        body = {"prompt": [5, 6, 7], "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
        os.kill(descendants(server.process.pid)[0], signal.SIGTERM)  # the kernel drops what process 1 does not handle
        assert server.process.wait(timeout=10) == 0
    finally:
        server.process.kill()
