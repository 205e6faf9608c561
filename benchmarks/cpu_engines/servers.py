"""What is measured of the servers: ready, tokens/s at three concurrencies, memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpu_engines.measures import MODEL
from cpu_engines.session import ENGINES, OURS, Session, random_prompts

from ingle.hub.resolve import ensure_model

_PORT, _MAX_SEQS, _MAX_LEN = 18473, 16, 256
_PROMPT, _OUT = 128, 64
_KV_BYTES = 2 * 30 * 192 * 2 * _MAX_SEQS * _MAX_LEN
_READY_TIMEOUT_S, _LOAD_TIMEOUT_S = 60, 300


def server(session: Session, index: int) -> None:
    path = str(ensure_model(MODEL).path)
    for engine in ENGINES:
        session.say(f"{engine}: server")
        with _running(session, engine, path) as (process, ready_s):
            session.add(engine, "ready_s", ready_s)
            asyncio.run(_load(2, seed=99))  # warm-up
            for concurrency in (1, 4, 16):
                seconds = asyncio.run(_load(concurrency, seed=100 * index + concurrency))
                session.add(engine, f"server_c{concurrency}", concurrency * _OUT / seconds)
            resident = sum(map(_proportional_bytes, _family(process.pid)))
            session.add(engine, "resident_mib", (resident - _KV_BYTES) / 2**20)


def _command(session: Session, engine: str, path: str) -> list[str]:
    """Either's own; slots, context and KV cache are of one size."""
    if engine == OURS:
        return [
            sys.executable, "-m", "ingle", "serve", path, "--device", "cpu", "--threads", str(session.threads),
            "--port", str(_PORT), "--max-num-seqs", str(_MAX_SEQS), "--max-model-len", str(_MAX_LEN),
            "--kv-cache-memory", str(_KV_BYTES), "--served-model-name", MODEL, "--disable-access-log",
        ]  # fmt: skip
    return [
        str(session.peer.folder / "llama-server"), "--model", path, "--threads", str(session.threads),
        "--threads-batch", str(session.threads), "--host", "127.0.0.1", "--port", str(_PORT),
        "--parallel", str(_MAX_SEQS), "--ctx-size", str(_MAX_SEQS * _MAX_LEN),
    ]  # fmt: skip


@contextmanager
def _running(session: Session, engine: str, path: str) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A server, and the seconds until its /health said that it takes requests."""
    if _healthy():
        raise RuntimeError(f"another server answers on port {_PORT}")
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        command = _command(session, engine, path)
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=session.environment())
        try:
            while not _healthy():
                if process.poll() is not None or time.perf_counter() - started > _READY_TIMEOUT_S:
                    log.seek(0)
                    raise RuntimeError(f"{engine} did not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.01)
            yield process, time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy() -> bool:
    """Asked without an event loop: making one each time would take the processor from those that start."""
    try:
        with socket.create_connection(("127.0.0.1", _PORT)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


async def _load(concurrency: int, seed: int) -> float:
    """Seconds from the first of so many simultaneous streams to the end of the last."""
    started = time.perf_counter()
    streams = asyncio.gather(*(_stream(prompt) for prompt in random_prompts(seed, concurrency, _PROMPT)))
    counts = await asyncio.wait_for(streams, _LOAD_TIMEOUT_S)
    seconds = time.perf_counter() - started
    if any(count != _OUT for count in counts):
        raise RuntimeError(f"streams of {counts} tokens, not {_OUT}")
    return seconds


async def _stream(prompt: list[int]) -> int:
    """Reads one completion as it is streamed; the number of its tokens, as the server counts them."""
    body = json.dumps({
        "model": MODEL, "prompt": prompt, "max_tokens": _OUT, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT, limit=1 << 20)
    head = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "Connection: close", "", "")  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    count = 0
    async for line in reader:
        if line.startswith(b"data: {") and b'"completion_tokens"' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            count = usage.get("completion_tokens", count)
        if line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return count


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    return [pid, *(each for child in children for each in _family(int(child)))]


def _proportional_bytes(pid: int) -> int:
    """Resident memory; pages shared by several processes are shared out among them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
