"""Memory that lacks is said in a line, and what large requests took is given back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from ingle.errors import lack_of_memory
from tests.e2e.conftest import Server, start_server, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and heap are Linux's")


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 139 GiB"), True),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), True),
        (RuntimeError("something else"), False),
        (ImportError("No module named x"), False),
    ],
)
def test_whoever_says_that_memory_lacks_is_understood(error: Exception, lacks: bool) -> None:
    assert (lack_of_memory(error) is not None) == lacks


@pytest.mark.parametrize("kilobytes", [200_000, 250_000, 320_000, 400_000])
def test_a_server_that_ulimit_gives_too_little_says_so_or_serves_less(kilobytes: int, smollm2_gguf: Path) -> None:
    command = f'ulimit -v {kilobytes}; exec "$0" -m ingle serve "$1" --port 0'
    process = subprocess.Popen(
        ["sh", "-c", command, sys.executable, str(smollm2_gguf)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if "base URL" in line:
                break
    finally:
        process.terminate()
        process.wait(timeout=10)
    assert "Traceback" not in said, said
    assert "base URL" in said or re.search("^(ingle:|  -) .*(memory|the engine ended)", said, re.MULTILINE), said


def resident_mib(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) >> 10  # type: ignore[index]


@pytest.mark.slow
def test_what_large_requests_took_is_given_back(smollm2_gguf: Path) -> None:
    server: Server = start_server(str(smollm2_gguf), "--kv-cache-memory", "256MiB")
    try:
        url, pids = f"{server.url}/v1/completions", (server.process.pid, server.engine_pid())
        httpx.post(url, json={"prompt": "x", "max_tokens": 1}, timeout=60)
        before = [resident_mib(pid) for pid in pids]
        ids = json.dumps({"prompt": [[7] * 8] * 100 + [[5] * 9000] * 600, "max_tokens": 1})
        text = json.dumps({"prompt": "the quick brown fox " * 50_000, "max_tokens": 1})
        for body in (text, ids) * 3:
            answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60)
            assert answer.status_code == 400
        time.sleep(1.0)
        assert until(lambda: all(resident_mib(pid) < size + 40 for pid, size in zip(pids, before, strict=True)), 5.0), (
            before, [resident_mib(pid) for pid in pids]
        )  # fmt: skip
    finally:
        server.stop()
