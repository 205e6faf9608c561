"""Downloads that end at any byte, by any means: what came stays, and the next one ends with a whole, verified model."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle.errors import ModelError
from ingle.hub.resolve import ensure_model, resolve_model
from tests.hub.repos import SMALL, data, files_in, sharded, single
from tests.hub.server import Fault, Hub, Repo
from tests.hub.toy import Recorder

SIZE = 400_000
SHARDS = sharded(4, SIZE // 4)
FILES = {**SMALL, **SHARDS}


def parts(root: Path) -> int:
    """Bytes of unfinished files."""
    total = 0
    for path in root.rglob("*.ingle-part"):
        with contextlib.suppress(FileNotFoundError):  # one that is whole by now
            total += path.stat().st_size
    return total


def whole(path: Path) -> None:
    assert {name: (path / name).read_bytes() for name in files_in(path)} == FILES


class Killed(BaseException):
    """What a kill is within one process: nothing catches it."""


KILLED_AT = """
import os, signal, sys
import httpx, huggingface_hub, ingle.hub.fetch, ingle.hub.origins.huggingface
from ingle.hub.resolve import ensure_model
from tests.hub.toy import Recorder

def kill(stage, done):
    if stage == "pulling" and done >= int(end):
        os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    name, end = line.split()
    if (child := os.fork()) == 0:
        ensure_model(name, Recorder(on_update=kill))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Pulls each model in a process of its own, which kills itself once so many bytes of weights are here."""


@pytest.mark.parametrize("times", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_bytes_each_resumes(hub: Hub, tmp_path: Path, times: int) -> None:
    """Four files come at once, and their connections are cut where the kill is to hit."""
    command = [sys.executable, "-c", KILLED_AT]
    random_bytes = random.Random(17)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        for number in range(times):
            name, end = f"org/tiny{number}", random_bytes.randrange(SIZE // 4)
            hub.repos[name] = Repo({path: held + name.encode() * path.endswith("s") for path, held in FILES.items()})
            hub.faults = [Fault(f"cdn/{name}/", cut_after=max(end, 1))]
            print(name, end, file=killer.stdin, flush=True)
            assert int(killer.stdout.readline()) == -signal.SIGKILL, (number, end)
            with pytest.raises(ModelError, match="is not on this machine yet"):
                resolve_model(name)
            hub.faults.clear()
            hub.starts.clear()
            left = parts(tmp_path)
            path = ensure_model(name, Recorder()).path
            assert {file: (path / file).read_bytes() for file in files_in(path)} == hub.repos[name].files
            assert (parts(tmp_path), sum(hub.starts)) == (0, left), (number, end)
        killer.stdin.close()


@contextlib.contextmanager
def pulling(name: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ingle", "pull", name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_real_process_ended_by_a_signal(hub: Hub, number: int, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = Repo(FILES)
    hub.faults = [Fault("cdn", pause_s=0.1)]
    with pulling("org/tiny") as process:
        deadline = time.monotonic() + 20
        while parts(tmp_path) < SIZE // 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=10)[1]
    ended = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert process.returncode == ended[signal.Signals(number)]
    assert "Traceback" not in said
    left = parts(tmp_path)
    assert left >= SIZE // 4
    hub.faults.clear()
    hub.starts.clear()
    with pulling("org/tiny") as process:
        out, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    whole(Path(out.partition("here: ")[2].strip()))
    assert sum(hub.starts) == left


def test_a_file_that_changed_meanwhile_is_brought_anew(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    hub.faults = [Fault("cdn", cut_after=50_000)]
    path = part_of(hub, recorder)
    path.write_bytes(b"\0" * 50_000)  # as a disk may hand out after a power cut
    hub.faults.clear()
    assert (ensure_model("org/tiny", recorder).path / "model.safetensors").read_bytes() == data(100_000)


def part_of(hub: Hub, recorder: Recorder) -> Path:
    """Of the weights, as an interrupted download leaves it."""

    def stop(stage: str, done: int) -> None:
        if done >= 50_000:
            raise Killed

    interrupted = Recorder(on_update=stop)
    with contextlib.suppress(Killed):
        ensure_model("org/tiny", interrupted)
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join()
    (part,) = Path(os.environ["HF_HOME"]).rglob(f"{hashlib.sha256(data(100_000)).hexdigest()}.ingle-part")
    assert part.stat().st_size == 50_000
    return part


def test_a_server_without_ranges_sends_all_again(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    hub.ranges = False
    hub.faults = [Fault("cdn", cut_after=50_000, times=1)]
    assert (ensure_model("org/tiny", recorder).path / "model.safetensors").read_bytes() == data(100_000)


def test_a_disk_that_fills_up_is_told_and_gone_on_with(hub: Hub, recorder: Recorder, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = single(3_000_000)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from ingle.cli.main import main; sys.exit(main(['pull', 'org/tiny']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ingle: cannot pull org/tiny: File too large" in ended.stderr and "Traceback" not in ended.stderr
    assert parts(tmp_path) == 1_000_000
    path = ensure_model("org/tiny", recorder).path
    assert (path / "model.safetensors").read_bytes() == data(3_000_000)
    assert hub.starts[-1] == 1_000_000
