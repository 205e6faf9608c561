"""What the server's own process takes has a bound, whatever is asked of it: here by the worst of each kind at once.

The bound: what it takes when it is idle; four times `--max-bodies-bytes`, as a body is there twice while it is read,
and a large one, of which one is decoded at a time, grows; `--max-answers-bytes`; for each slot of the engine
`--max-unread-bytes`; for each of the threads that prepare requests what the longest stop strings make; and for each
connection its headers and what is written ahead of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Server, start_server
from tests.e2e.test_heavy_requests import LIGHT, post
from tests.e2e.test_loop_lag import toy_model

MB = 1 << 20
BODIES, ANSWERS, UNREAD, CONNECTIONS = 48 * MB, 48 * MB, MB, 200
FLAGS = {
    "max-body-bytes": 16 * MB, "max-bodies-bytes": BODIES, "max-answers-bytes": ANSWERS, "max-unread-bytes": UNREAD,
    "max-connections": 2 * CONNECTIONS, "slow-reader-timeout": 3, "max-num-seqs": 32,
}  # fmt: skip
SECONDS = 8.0
MOST = ANSWERS + 4 * BODIES + 32 * UNREAD + CONNECTIONS * (64 + 64 + 64) * 1024 + 5 * 65_536 * 400
"""Beyond what the idle server takes. A body is there twice while it is read, and the one large body that is being
decoded grows to several times its size."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    model = toy_model(tmp_path_factory.mktemp("toy"))
    running = start_server(str(model), "--kv-cache-memory", "64MiB", "--max-model-len", "8192", *flags)
    yield running
    assert running.stop() == 0, running.text()


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def head(path: str, size: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


def connected(server: Server) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return client


def asks(server: Server, path: str, body: dict[str, Any]) -> None:
    """A whole answer, read."""
    assert post(server, path, json.dumps(body)) in (200, 400, 429, 503, 504)


def reads_nothing(server: Server) -> None:
    body = json.dumps(
        {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 8}
    ).encode()
    with connected(server) as client:
        client.sendall(head("/v1/completions", len(body)) + body)
        time.sleep(2)


def sends_half(server: Server) -> None:
    with connected(server) as client, contextlib.suppress(OSError):
        client.sendall(head("/v1/completions", 16 * MB) + b'{"prompt":"' + b"a" * (12 * MB))
        time.sleep(1)


def sends_headers(server: Server) -> None:
    with connected(server) as client, contextlib.suppress(OSError):
        client.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 60_000)
        time.sleep(2)


def ids(count: int) -> dict[str, Any]:
    return {"prompt": [5] * count}


WORST: dict[str, tuple[int, Callable[[Server], None]]] = {
    "many log probabilities": (
        4,
        lambda server: asks(
            server,
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "n": 100, "logprobs": True, "top_logprobs": 20,
             "max_tokens": 4000, "timeout": 4},
        ),
    ),
    "streams that nobody reads": (6, reads_nothing),
    "bodies that do not end": (4, sends_half),
    "headers that do not end": (40, sends_headers),
    "5 million token ids": (2, lambda server: asks(server, "/v1/completions", ids(5_000_000))),
    "10 MB of text": (2, lambda server: asks(server, "/v1/completions", {"prompt": "ab c" * 2_500_000})),
    "long stop strings": (
        4,
        lambda server: asks(
            server,
            "/v1/completions",
            {"prompt": "a", "n": 16, "max_tokens": 500, "timeout": 2,
             "stop": [str(time.monotonic()) * 60 + str(number) for number in range(60)]},
        ),
    ),
    "2,000 texts": (1, lambda server: asks(server, "/v1/embeddings", {"input": ["hello"] * 2000})),
}  # fmt: skip


def test_memory_is_bounded_under_the_worst_of_all(server: Server) -> None:
    for body in (LIGHT, json.dumps(ids(300_000))):  # so that all that is imported late is there
        assert post(server, "/v1/completions", body) in (200, 400)
    before, end_s = resident(server), time.monotonic() + SECONDS
    failures: list[BaseException] = []

    def again_and_again(ask: Callable[[Server], None]) -> None:
        try:
            while time.monotonic() < end_s:
                ask(server)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=again_and_again, args=(ask,), daemon=True)
        for count, ask in WORST.values()
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    peak = before
    while any(thread.is_alive() for thread in threads) and time.monotonic() < end_s + 60:
        peak = max(peak, resident(server))
        time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    print(f"\nidle {before / MB:.0f} MB, most {peak / MB:.0f} MB: {(peak - before) / MB:.0f} of {MOST / MB:.0f} MB")
    assert not failures, failures[0]
    assert peak - before < MOST
    assert post(server, "/v1/completions", LIGHT) == 200
