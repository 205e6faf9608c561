"""Prefixes outlast engines and servers: cached tokens, as clients see them, after each of the ways to end."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Server, start_server, until

PROMPT = [random.Random(7).randrange(3, 250) for _ in range(400)]


def ask(server: Server, prompt: list[int] = PROMPT, **options: Any) -> tuple[str, int]:
    """The answer, and how many of the prompt's tokens were cached; of a new engine too, once it is there."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
    deadline = time.monotonic() + 60
    while (answer := httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = answer.raise_for_status().json()
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def written(server: Server, tier: str) -> bool:
    """Whether the prompt's pages are kept. Figures come with steps, so one more prompt is asked for."""
    ask(server, [5])
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    figure = next(line for line in lines if "written_pages_total{" in line and f'tier="{tier}"' in line)
    return float(figure.split()[-1]) >= len(PROMPT) // 16


def serve(tiny_model: Path, *flags: str) -> Server:
    return start_server(str(tiny_model), "--served-model-name", "tiny", "--kv-cache-memory", "16MiB", *flags)


def test_an_engine_that_is_killed_leaves_its_prefixes_in_host_memory(tiny_model: Path) -> None:
    server = serve(tiny_model, "--host-cache", "16MiB")
    try:
        assert "prefixes are kept in 16.00 MiB of host memory" in server.text()
        answer, cached = ask(server)
        assert cached == 0
        assert until(lambda: written(server, "host"), 30)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert ask(server) == (answer, 384)
        assert ask(server, cache_salt="another user") == (answer, 0)
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_leaves_its_prefixes_on_the_disk(
    tiny_model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    flags = ("--disk-cache", str(tmp_path / "cache"))
    server = serve(tiny_model, *flags)
    try:
        answer, _ = ask(server)
        if how == signal.SIGKILL:
            assert until(lambda: written(server, "disk"), 30)
        server.process.send_signal(how)
        server.process.wait(timeout=30)
        server = serve(tiny_model, *flags)
        assert "MiB found)" in server.text()
        assert ask(server) == (answer, 384)
    finally:
        assert server.stop() == 0
