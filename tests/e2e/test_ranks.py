"""A server of a model on several devices, whichever of its processes dies: one clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import SERVE, Server, command_line, descendants, start_server, until

from .test_health import LONG, WITHIN_S, Stream, answer, gone, ready

pytestmark = pytest.mark.slow
OPTIONS = ("--served-model-name", "tiny", "--kv-cache-memory", "16MiB", "--max-num-seqs", "4",
           "--max-num-batched-tokens", "64", "--dtype", "float32")  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLEAR_S = 10.0
"""For one clear error on GPUs, whatever becomes of a rank. CPUs of these tests are shared with others."""
NOISE_BYTES = 64 << 20
"""Of a GPU, that come and go without us."""
SHARED = "TEST_GPUS_ARE_SHARED" in os.environ
"""By tests that run at once, so that what is used of them says nothing."""


def ranks(server: Server) -> list[int]:
    return [pid for pid in descendants(server.process.pid) if b"ingle.engine.rank" in command_line(pid)]


def engines(server: Server) -> list[int]:
    return [server.engine_pid()]


def gpu_bytes() -> list[int]:
    """Used of each GPU, by whomever."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line) << 20 for line in told.split()]


def named_memory() -> set[Path]:
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.loky")}


class Machine:
    """As it was before."""

    def __init__(self, device: str) -> None:
        self._looks, self._named = device == "cuda" and not SHARED, named_memory()
        self._used = gpu_bytes() if self._looks else []

    def is_as_before(self) -> bool:
        used = gpu_bytes() if self._looks else []
        return named_memory() <= self._named and all(
            now <= before + NOISE_BYTES for now, before in zip(used, self._used, strict=True)
        )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    return str(request.param)


@pytest.fixture(params=["--tensor-parallel-size", "--pipeline-parallel-size"])
def of_two(tiny_model: Path, device: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    before = Machine(device)
    server = start_server(str(tiny_model), *OPTIONS, "--device", device, request.param, "2", "--host-cache", "8MiB")
    yield server
    left = descendants(server.process.pid)
    assert server.stop() == 0 and until(lambda: gone(left), WITHIN_S), server.text()
    assert until(before.is_as_before, WITHIN_S)
    assert_no_crash(server)


def test_whoever_dies_another_engine_goes_on(of_two: Server, device: str) -> None:
    right = answer(of_two).json()["choices"][0]["text"]
    ends = [
        (
            signal.SIGKILL,
            ranks,
            r"rank 1 \((cpu|cuda:1), process \d+\) has died: killed by SIGKILL \(out of memory\?\)",
        ),
        (signal.SIGSTOP, ranks, r"rank 1 \((cpu|cuda:1), process \d+\) is stopped \(SIGSTOP\?\), and the others wait"),
        (signal.SIGKILL, engines, r"killed by SIGKILL"),
    ]
    for number, (signal_number, of, reason) in enumerate(ends, 1):
        every = [*ranks(of_two), of_two.engine_pid()]
        stream = Stream(of_two, LONG | {"n": 64 if device == "cuda" else 1})
        assert until(lambda: of_two.running() >= 1, WITHIN_S)
        start = len(of_two.log)
        (pid,) = of(of_two)
        begun_s = time.monotonic()
        os.kill(pid, signal_number)
        error = json.loads(stream.ended()[-1].removeprefix("data: "))["error"]["message"]
        seconds = time.monotonic() - begun_s
        assert device == "cpu" or seconds < CLEAR_S
        assert "send the request again" in error
        assert until(lambda start=start: "a new one is started" in "".join(of_two.log[start:]), WITHIN_S)
        said = "".join(of_two.log[start:])
        assert re.search(reason, said), said
        assert "server's log" not in said, "this is that log"
        assert until(lambda every=every: gone(every), WITHIN_S)
        assert until(lambda: ready(of_two) == 200, WITHIN_S), f"after {number}"
        anew = time.monotonic() - begun_s
        print(f"\n{signal_number.name} of {of.__name__}: told in {seconds:.1f} s, ready in {anew:.1f} s")
        assert answer(of_two).json()["choices"][0]["text"] == right


def test_a_rank_that_dies_while_the_model_is_loaded(tiny_model: Path, device: str) -> None:
    before = Machine(device)
    server = start_server(str(tiny_model), *OPTIONS, "--device", device, "--tensor-parallel-size", "2", wait=False)
    server.read()
    assert until(lambda: bool(ranks(server)), WITHIN_S)
    (pid,) = ranks(server)
    os.kill(pid, signal.SIGKILL)
    assert_ended(server, before)
    assert re.search(r"rank 1 \([^)]*process \d+\) has died: killed by SIGKILL", server.text()), server.text()


def assert_no_crash(server: Server) -> None:
    said = [line for line in server.text().splitlines() if '"GET /health' not in line]
    assert not [line for line in said if "Traceback" in line or "terminate called" in line], "\n".join(said)


def assert_ended(server: Server, before: Machine) -> None:
    """It could not start, and nothing is left of it."""
    left = descendants(server.process.pid)
    assert server.process.wait(WITHIN_S) != 0
    assert until(lambda: gone(left), WITHIN_S) and until(before.is_as_before, WITHIN_S)
    assert_no_crash(server)


LITTLE_MEMORY = """
import sys
if any("ingle.engine.rank" in word for word in sys.orig_argv):
    import torch
    torch.cuda.set_per_process_memory_fraction({fraction}, 1)
"""


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_as_its_rank_loads(tiny_model: Path, tmp_path: Path) -> None:
    """After all was planned: PyTorch's allocator refuses it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    before = Machine("cuda")
    fraction = (256 << 20) / torch.cuda.get_device_properties(1).total_memory
    (tmp_path / "sitecustomize.py").write_text(LITTLE_MEMORY.format(fraction=fraction))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ("--num-gpu-blocks-override", "200000", "--dtype", "float32", "--tensor-parallel-size", "2")
    begun_s = time.monotonic()
    server = start_server(str(tiny_model), *options, wait=False, PYTHONPATH=path)
    server.read()
    assert_ended(server, before)
    print(f"\nstarted, told and gone in {time.monotonic() - begun_s:.1f} s:", server.text().splitlines()[-1])
    assert re.search(r"rank 1 \(cuda:1, process \d+\): the GPU's memory ran out as", server.text()), server.text()


def refused(model: Path, visible: str, options: Sequence[str]) -> str:
    """The one line that says so."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    begun_s = time.monotonic()
    command = [*SERVE, str(model), *options, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    print(f"\nCUDA_VISIBLE_DEVICES={visible}: refused in {time.monotonic() - begun_s:.1f} s")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "ingle: " in line or "ERROR" in line]
    return line


def test_a_gpu_that_is_not_there(tiny_model: Path) -> None:
    line = refused(tiny_model, "99", ["--tensor-parallel-size", "2"])
    assert "PyTorch sees no GPU here (CUDA_VISIBLE_DEVICES=99); --device cpu divides the model among CPUs" in line


@pytest.mark.gpu
def test_too_few_gpus_are_visible(tiny_model: Path) -> None:
    before = Machine("cuda")
    one, two = ["--tensor-parallel-size", "2"], ["--device", "cuda", "--tensor-parallel-size", "2"]
    with ThreadPoolExecutor(4) as pool:
        visible = pool.submit(refused, tiny_model, "1", one), pool.submit(refused, tiny_model, "0,99", two)
        none = pool.submit(refused, tiny_model, "99", one), pool.submit(refused, tiny_model, "", two)
    for value, line in zip(("1", "0,99"), visible, strict=True):
        assert (
            f"--tensor-parallel-size 2: PyTorch sees 1 GPU here (CUDA_VISIBLE_DEVICES={value}), and that takes 2; "
            "these sizes work: 1" in line.result()
        )
    assert "sees no GPU here (CUDA_VISIBLE_DEVICES=99)" in none[0].result()
    assert "sees no GPU here (CUDA_VISIBLE_DEVICES=)" in none[1].result()
    assert until(before.is_as_before, WITHIN_S)
