"""Ranks on two hosts, which are network namespaces of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ingle.engine import ranks
from ingle.engine.ranks import Crew
from ingle.engine.startup import Startup
from ingle.errors import EngineError
from ingle.parallel.hosts import LocalProcess, RankProcess, Seat, rank_command
from ingle.parallel.layout import Layout
from tests.parallel.test_ranks import end_mid_stream, load, requests
from tests.support import engine_for, greedy, random_prompt, run, save_checkpoint

pytestmark = pytest.mark.slow

OURS, THEIRS = "10.213.7.1", "10.213.7.2"
WITHIN_S = 30.0
"""For a host that is gone: its silence takes seven seconds."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Namespaces:
    """A `Hosts`: rank 0 is in this one's network, the others are beyond a cable."""

    num_ranks: int
    name: str = f"ingle{os.getpid()}"
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cable = f"in{os.getpid()}"
        self.seats: Sequence[Seat] = [
            Seat("here" if rank == 0 else "there", OURS if rank == 0 else THEIRS, "cpu")
            for rank in range(self.num_ranks)
        ]

    def __enter__(self) -> Namespaces:
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", f"{OURS}/24", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        ip("-n", self.name, "addr", "add", f"{THEIRS}/24", "dev", "eth0")
        for interface in ("eth0", "lo"):
            ip("-n", self.name, "link", "set", interface, "up")
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.cable)
        ip("netns", "del", self.name)

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def start(self, ranks: Sequence[int], arguments: Sequence[str], secret: bytes) -> list[RankProcess]:
        for rank in ranks:
            command = ["ip", "netns", "exec", self.name, *rank_command(*arguments, os.getpid(), rank)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(secret)
            self.started.append(process)
        return [LocalProcess(process) for process in self.started]

    def failure(self) -> None:
        return None

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def namespaces(request: pytest.FixtureRequest) -> Iterator[Namespaces]:
    try:
        with Namespaces(getattr(request, "param", 2)) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


@contextlib.contextmanager
def crew_over(namespaces: Namespaces, tensor: int, pipeline: int) -> Iterator[Crew]:
    layout = Layout(tensor, pipeline)
    crew = ranks.assemble(layout, ["cpu"] * layout.num_ranks, Startup(lambda stage: None), hosts=namespaces)
    with crew.team:
        yield crew


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("namespaces", "layout"), [(2, (2, 1)), (2, (1, 2))], indirect=["namespaces"])
def test_requests_get_what_one_rank_gives(namespaces: Namespaces, folder: Path, layout: tuple[int, int]) -> None:
    tensor, pipeline = layout
    with crew_over(namespaces, tensor, pipeline) as crew:
        assert str(crew.member.link).startswith("the network between 2 hosts: 8 KiB in ")
        engine = load(crew, folder, threads=1, num_pages=40, max_num_batched_tokens=48, max_num_seqs=6)
        assert run(engine, requests()) == run(engine_for(folder, cpu_kernels="torch"), requests())
        said = end_mid_stream(crew, folder, lambda pid: os.kill(pid, signal.SIGKILL))
        assert re.fullmatch(rf"rank 1 \(node {THEIRS}, cpu, process \d+\) has died: killed by SIGKILL .*", said)


def test_the_network_is_cut(namespaces: Namespaces, folder: Path) -> None:
    """Nobody is told. Each side finds out by itself, and ends."""
    with crew_over(namespaces, 2, 1) as crew:
        engine = load(crew, folder, threads=1)
        for request in requests():
            engine.add(request)
        engine.step()
        namespaces.cut()
        begun_s = time.monotonic()
        with pytest.raises(EngineError, match=rf"rank 1 \(node {THEIRS}, cpu, process \d+\) has died"):
            while True:
                engine.step()
        assert time.monotonic() - begun_s < WITHIN_S
    assert namespaces.started[0].wait(WITHIN_S) is not None


def test_another_model_there(namespaces: Namespaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path, but other weights of the same shape; rank 0 reads what it read before they changed."""
    from ingle.weights import digest

    folder = save_checkpoint(tmp_path / "one")
    save_checkpoint(tmp_path / "two", seed=1)
    own = digest.digest_of(folder)
    monkeypatch.setattr(digest, "digest_of", lambda path: own)
    shutil.copy(tmp_path / "two" / "model.safetensors", folder)
    with crew_over(namespaces, 2, 1) as crew, pytest.raises(EngineError) as error:
        load(crew, folder)
    assert f"rank 1 (node {THEIRS}, cpu, process " in str(error.value)
    assert f"{folder} holds another model here than {folder} of the host that asks" in str(error.value)


@dataclass
class OtherNode:
    """A `Hosts`: a node that has the same address, as two of a Ray cluster may, and GPUs of its own."""

    devices: Sequence[str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def seats(self) -> Sequence[Seat]:
        return [Seat(f"node {index}", "127.0.0.1", device) for index, device in enumerate(self.devices)]

    def start(self, ranks: Sequence[int], arguments: Sequence[str], secret: bytes) -> list[RankProcess]:
        for rank in ranks:
            process = subprocess.Popen(rank_command(*arguments, os.getpid(), rank), stdin=subprocess.PIPE)
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(secret)
            self.started.append(process)
        return [LocalProcess(process) for process in self.started]

    failure = Namespaces.failure
    close = Namespaces.close


@pytest.mark.gpu
def test_gpus_of_two_nodes(tmp_path: Path) -> None:
    """By NCCL, which finds the interface, and by connections in place of the ring."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    hosts = OtherNode(("cuda:0", "cuda:1"))
    crew = ranks.assemble(Layout(2), list(hosts.devices), Startup(lambda stage: None), hosts=hosts)
    with crew.team:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
        folder, options = save_checkpoint(tmp_path, "qwen2", **sizes), {"device": "cuda", "dtype": "float32"}
        prompt = random_prompt(1, 70)
        own = engine_for(folder, **options, kv_cache_memory="64MiB")
        assert greedy(load(crew, folder, **options), prompt, 4) == greedy(own, prompt, 4)
        said = end_mid_stream(crew, folder, lambda pid: os.kill(pid, signal.SIGKILL), **options)
        assert re.fullmatch(r"rank 1 \(node 127.0.0.1, cuda:1, process \d+\) has died: killed by SIGKILL .*", said)
