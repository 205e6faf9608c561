"""A Ray cluster of two nodes on this machine, over which a model is served."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support import engine_for, greedy

from .conftest import Server, command_line, start_server, until

START_S = 120.0
"""For Ray on a slow machine."""
END_S = 60.0
PROMPT = list(range(5, 45))

CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
small = dict(num_cpus=1, object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(include_dashboard=False, **small))
try:
    second = cluster.add_node(**small)
    print("cluster", cluster.address, flush=True)
    for line in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
finally:
    cluster.shutdown()
"""
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
}
"""A machine that is slow has no dead nodes."""
MARK = "TEST_OF_A_CLUSTER"
"""In the environment of all that belongs to one."""


@dataclass
class Cluster:
    process: subprocess.Popen[str]
    folder: Path
    printed: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        self.printed.extend(iter(self.process.stdout.readline, ""))

    @property
    def address(self) -> str | None:
        return next((line.split()[1] for line in self.printed if line.startswith("cluster ")), None)

    def kill_second_node(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.process.kill()
        self.process.wait()


def started(folder: Path) -> Cluster:
    """Ray keeps its files in `folder`."""
    environment = {**os.environ, **PATIENT, "RAY_TMPDIR": str(folder), MARK: str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    cluster = Cluster(process, folder)
    threading.Thread(target=cluster.read, daemon=True).start()
    until(lambda: cluster.address is not None or process.poll() is not None, START_S)
    return cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install 'ingle[ray]'")
    for _ in range(2):  # Ray gives up by itself on a node that takes more than 30 s
        folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # its sockets' paths have 107 bytes, and it uses 80
        running = started(folder)
        if running.address is not None:
            break
        running.end()
        shutil.rmtree(folder, ignore_errors=True)
    else:
        pytest.skip(f"Ray does not start here: {''.join(running.printed)[-2000:]}")
    yield running
    running.end()
    shutil.rmtree(folder, ignore_errors=True)


def of_ray(cluster: Cluster) -> list[int]:
    """Processes of ours that Ray keeps, or that speak with it."""
    mark, found = f"{MARK}={cluster.folder}\0".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            line = command_line(int(entry.name))
            if (
                re.search(rb"ingle\.engine\.(rank|ray_agent|process)", line)
                and mark in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return found


def serve(cluster: Cluster, model: Path, *flags: str) -> Server:
    return start_server(
        str(model), "--served-model-name", "tiny", "--kv-cache-memory", "8MiB", "--device", "cpu",
        "--dtype", "float32", "--distributed-executor-backend", "ray", *flags,
        RAY_ADDRESS=str(cluster.address), **{MARK: str(cluster.folder)},
    )  # fmt: skip


def answered(server: Server, **options: object) -> list[str]:
    """Token by token."""
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "logprobs": 0, "max_tokens": 16, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body | options, timeout=END_S).raise_for_status().json()
    return list(reply["choices"][0]["logprobs"]["tokens"])


def test_a_model_served_over_two_nodes(cluster: Cluster, tiny_model: Path) -> None:
    """Each stage on a node, until one is killed amid an answer."""
    alone = greedy(engine_for(tiny_model), PROMPT, 16)
    server = serve(cluster, tiny_model, "--pipeline-parallel-size", "2")
    try:
        assert answered(server) == [f"<{token}>" for token in alone]
        assert "2 x cpu (PP 2 by " in server.text()
        assert len(of_ray(cluster)) >= 3
        long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=END_S) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            cluster.kill_second_node()
            for _ in lines:  # until it is lost, or was faster
                pass
        said = r"rank 1 \(node [\d.]+, cpu, process \d+\) has died: its node is lost: no Ray answers at [\d.]+ port \d+"
        assert until(lambda: re.search(said, server.text()) is not None, END_S), server.text()
        assert not re.search("raylet|Traceback", server.text()), server.text()
    finally:
        server.stop()
    assert until(lambda: not of_ray(cluster), END_S)


def replica_elsewhere(cluster: Cluster) -> int:
    engines = [pid for pid in of_ray(cluster) if b"ingle.engine.process" in command_line(pid)]
    (pid,) = [pid for pid in engines if b"\0reach\0" in command_line(pid)]
    return pid


@pytest.mark.slow
def test_replicas_on_two_nodes(cluster: Cluster, tiny_model: Path) -> None:
    """One of them is killed, and comes back; then its node is, and the other goes on."""
    alone = [f"<{token}>" for token in greedy(engine_for(tiny_model), PROMPT, 16)]
    server = serve(cluster, tiny_model, "--data-parallel-size", "2", "--no-enable-prefix-caching")

    def ready(status: str) -> bool:
        return bool(httpx.get(f"{server.url}/health/ready").json()["status"] == status)

    try:
        assert re.search(r"replicas: 0 on [\d.]+, 1 on [\d.]+\n", server.text())
        for _ in range(4):
            assert answered(server) == alone
        told = httpx.get(f"{server.url}/metrics").text
        counts = dict(re.findall(r'^ingle_engine_prompt_tokens_total{engine="(\d)".*} (.*)$', told, re.M))
        assert min(float(counts["0"]), float(counts["1"])) >= len(PROMPT)
        os.kill(replica_elsewhere(cluster), signal.SIGKILL)
        said = (
            r"replica 1 died: killed by SIGKILL \(out of memory\?\) \(node [\d.]+, process \d+\); a new one is started"
        )
        assert until(lambda: re.search(said, server.text()) is not None, END_S), server.text()
        assert until(lambda: ready("ok"), END_S), server.text()
        cluster.kill_second_node()
        said = r"replica 1 died: its node is lost: no Ray answers at [\d.]+ port \d+ any more"
        assert until(lambda: re.search(said, server.text()) is not None, END_S), server.text()
        assert answered(server) == alone and ready("degraded")
    finally:
        server.stop()
    assert until(lambda: not of_ray(cluster), END_S)
