"""A server of several engines: it answers as one does, outlives the death of one, and leaves none behind."""

from __future__ import annotations

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.e2e.conftest import Server, command_line, descendants, start_server, until

from .test_health import ASK, LONG, WITHIN_S, Stream, answer, gone, ready

SERVER = ("--served-model-name", "tiny", "--kv-cache-memory", "64MiB", "--device", "cpu", "--max-num-seqs", "2",
          "--dtype", "float32")  # fmt: skip


def engines(server: Server) -> list[int]:
    return [pid for pid in descendants(server.process.pid) if b"ingle.engine.process" in command_line(pid)]


def figures(server: Server, name: str) -> dict[str, float]:
    """By the label `engine`."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    found = re.findall(rf'^{name}{{engine="(\w+)",model_name="tiny"}} (\S+)', text, re.MULTILINE)
    return {engine: float(value) for engine, value in found}


def test_replicas_serve_as_one_engine_and_one_of_them_may_die(tiny_model: Path) -> None:
    server = start_server(str(tiny_model), *SERVER, "-dp", "2")
    both = engines(server)
    try:
        assert len(both) == 2 and "2 replicas, each on cpu" in server.text()
        alone = [answer(server, ASK | {"prompt": [number, 6, 7]}).json()["choices"][0]["text"] for number in range(4)]
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(answer, server, ASK | {"prompt": [number % 4, 6, 7]}) for number in range(16)]
            assert [each.result().json()["choices"][0]["text"] for each in asked] == alone * 4
        steps = figures(server, "ingle_engine_steps_total")
        assert steps.keys() == {"0", "1"} and min(steps.values()) > 0
        assert figures(server, "vllm:generation_tokens_total") == {"all": 20 * 4}

        # Two at a time in each, and enough that the metrics are read while they run.
        streams = [Stream(server, LONG | {"prompt": [number, 6, 7]}) for number in range(120)]
        assert until(lambda: figures(server, "vllm:num_requests_running") == {"0": 2, "1": 2}, WITHIN_S)
        os.kill(both[1], signal.SIGKILL)
        assert until(lambda: "degraded" in httpx.get(f"{server.url}/health", timeout=60).text, WITHIN_S)
        assert ready(server) == 200 and answer(server).status_code == 200
        ends = [stream.ended()[-1].removeprefix("data: ") for stream in streams]
        lost = [json.loads(end)["error"]["message"] for end in ends if end != "[DONE]"]
        assert 1 <= len(lost) <= 4, "what it had begun with, and nothing else"
        assert all("replica 1 died: killed by SIGKILL" in text and "send the request again" in text for text in lost)
        assert until(lambda: figures(server, "ingle_engine_up") == {"0": 1, "1": 1}, WITHIN_S)
        assert figures(server, "ingle_engine_restarts_total") == {"0": 0, "1": 1}
        after = engines(server)
        assert both[0] in after and len(after) == 2 and gone([both[1]])
        assert answer(server, ASK | {"prompt": [0, 6, 7]}).json()["choices"][0]["text"] == alone[0]
        left = descendants(server.process.pid)
        assert server.stop() == 0 and until(lambda: gone(left), WITHIN_S), server.text()
        assert "Traceback" not in server.text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
