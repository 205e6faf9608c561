"""A server that is attacked again and again, and how tests start one of their own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.chaos.target import Target
from tests.e2e.conftest import READY_S, SERVE, Server, save_byte_model, start_server, until

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'LOOP' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if m.content == 'GROW' %}{% set s = namespace(x='grow') %}"
    "{% for a in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""Two messages break it: one takes all time, one all memory."""
CONTEXT = 2048
LIMITS = (
    "--served-model-name", "tiny", "--kv-cache-memory", "4MiB", "--max-model-len", str(CONTEXT),
    "--max-num-seqs", "32", "--chat-template", TEMPLATE, "--files-dir",
)  # fmt: skip
ROOMY = ("--max-model-len", str(4 * CONTEXT), "--kv-cache-memory", "64MiB")
"""For answers that last while a test looks at them."""
Start = Callable[..., Target]


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"), max_position_embeddings=4 * CONTEXT)


def started(model: Path, files: Path, *flags: str) -> Server:
    return start_server(str(model), *LIMITS, str(files), *flags)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def started_unheard(model: Path, files: Path, *flags: str, stderr: int | IO[bytes], **options: Any) -> Server:
    """One whose log this process does not read: it is ready when it says so over HTTP."""
    port = free_port()
    command = [*SERVE, str(model), *LIMITS, str(files), *flags, "--port", str(port)]
    server = Server(subprocess.Popen(command, stderr=stderr, start_new_session=True, **options))
    server.url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{server.url}/health").status_code == 200
        return False

    assert until(ready, READY_S), "the server did not come up"
    return server


@pytest.fixture(scope="session")
def standing(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all attacks that a server must stand."""
    server = started(byte_model, tmp_path_factory.mktemp("files"))
    yield Target(server)
    assert server.stop() == 0, server.text()[-4000:]


@pytest.fixture
def start(byte_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers that a test may break. With options, which are those of a process, their log is not read."""
    servers: list[Server] = []

    def begin(*flags: str, **options: Any) -> Target:
        how = started_unheard if options else started
        servers.append(how(byte_model, tmp_path / "files", *flags, **options))
        return Target(servers[-1])

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait(timeout=20)
