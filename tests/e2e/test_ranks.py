"""A server of a model on several devices, whichever of its processes dies: one clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import SERVE, Server, command_line, descendants, start_server, until

from .test_health import LONG, WITHIN_S, Stream, answer, gone, ready

pytestmark = pytest.mark.slow
OPTIONS = ("--served-model-name", "tiny", "--device", "cpu", "--kv-cache-memory", "16MiB", "--max-num-seqs", "4")


def ranks(server: Server) -> list[int]:
    return [pid for pid in descendants(server.process.pid) if b"ingle.engine.rank" in command_line(pid)]


@pytest.fixture(params=["--tensor-parallel-size", "--pipeline-parallel-size"])
def of_two(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    named = set(Path("/dev/shm").iterdir())
    server = start_server(str(tiny_model), *OPTIONS, request.param, "2", "--host-cache", "8MiB")
    yield server
    left = descendants(server.process.pid)
    assert server.stop() == 0 and until(lambda: gone(left), WITHIN_S), server.text()
    assert not [name for name in set(Path("/dev/shm").iterdir()) - named if "ingle" in name.name]
    assert "Traceback" not in server.text() and "terminate called" not in server.text()


def test_whoever_dies_another_engine_goes_on(of_two: Server) -> None:
    right = answer(of_two).json()["choices"][0]["text"]
    ends = [
        (signal.SIGKILL, ranks, r"rank 1 \(cpu, process \d+\) has died: killed by SIGKILL \(out of memory\?\)"),
        (signal.SIGSTOP, ranks, r"rank 1 \(cpu, process \d+\) is stopped \(SIGSTOP\?\), and the others wait for it"),
        (signal.SIGKILL, lambda server: [server.engine_pid()], r"killed by SIGKILL"),
    ]
    for number, (signal_number, of, reason) in enumerate(ends, 1):
        every = [*ranks(of_two), of_two.engine_pid()]
        stream = Stream(of_two, LONG)
        assert until(lambda: of_two.running() == 1, WITHIN_S)
        start = len(of_two.log)
        (pid,) = of(of_two)
        os.kill(pid, signal_number)
        error = json.loads(stream.ended()[-1].removeprefix("data: "))["error"]["message"]
        assert "send the request again" in error
        assert until(lambda start=start: "a new one is started" in "".join(of_two.log[start:]), WITHIN_S)
        said = "".join(of_two.log[start:])
        assert re.search(reason, said), said
        assert until(lambda: ready(of_two) == 200, WITHIN_S), f"after {number}"
        assert until(lambda every=every: gone(every), WITHIN_S)
        assert answer(of_two).json()["choices"][0]["text"] == right


def test_a_rank_that_dies_while_the_model_is_loaded(tiny_model: Path) -> None:
    server = start_server(str(tiny_model), *OPTIONS, "--tensor-parallel-size", "2", wait=False)
    server.read()
    assert until(lambda: bool(ranks(server)), WITHIN_S)
    (pid,) = ranks(server)
    os.kill(pid, signal.SIGKILL)
    left = descendants(server.process.pid)
    assert server.process.wait(WITHIN_S) != 0
    assert until(lambda: gone(left), WITHIN_S)
    assert re.search(r"rank 1 \([^)]*process \d+\) has died: killed by SIGKILL", server.text()), server.text()
    assert "Traceback" not in server.text()


def test_a_gpu_that_is_not_there(tiny_model: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "99"}
    command = [*SERVE, str(tiny_model), "--tensor-parallel-size", "2", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "ingle: " in line or "ERROR" in line]
    assert "PyTorch sees no GPU here (CUDA_VISIBLE_DEVICES=99); --device cpu divides the model among CPUs" in line
