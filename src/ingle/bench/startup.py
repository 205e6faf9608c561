"""From a process's start to its first token, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ingle.config import EngineConfig
from ingle.errors import EngineError

_CACHES = {
    "INGLE_HOME": "home",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
"""Where a start leaves what the next one takes. The model itself is given as a path."""
_NUM_SAMPLES = 64


@dataclass(frozen=True)
class Startup:
    """Seconds; the phases are the engine's own."""

    start: str
    """cold: nothing was compiled or measured before; warm: what the run before left was there."""
    first_token_s: float
    phases_s: dict[str, float]
    share_in_memory: float | None
    """Of the model's files, how much the system had in its cache before; None where it does not say."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def described(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases_s.items())
        cached = "" if self.share_in_memory is None else f", {self.share_in_memory:.0%} of the model's files in memory"
        return f"{self.start} start{cached}: first token after {self.first_token_s:.2f} s ({phases})"


def measure_startup(config: EngineConfig, path: Path) -> list[Startup]:
    """Starts an engine twice in new processes.

    The first finds no compiled kernel, no measurement of which kernels are faster, and the model's files on the disk
    alone. What cannot be taken from it without the rights of root are the files of Python and PyTorch in the system's
    cache. Raises `EngineError`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
        for file in files:
            _forget(file)
        return [_start(config, path, Path(scratch), name, _share_in_memory(files)) for name in ("cold", "warm")]


def _forget(file: Path) -> None:
    """Takes a file out of the system's cache, as far as no other process maps it."""
    if not hasattr(os, "posix_fadvise"):
        return
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not on the disk yet stays
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _share_in_memory(files: Sequence[Path]) -> float | None:
    """By reads that do not wait for a disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    places = [(file, size * i // _NUM_SAMPLES) for file in files if (size := file.stat().st_size)
              for i in range(_NUM_SAMPLES)]  # fmt: skip
    weights, cached = 0, 0
    for file, place in places:
        with file.open("rb") as opened:
            weights += (size := file.stat().st_size)
            try:
                cached += size * bool(os.preadv(opened.fileno(), [bytearray(1)], place, os.RWF_NOWAIT))
            except BlockingIOError:
                continue
            except OSError:
                return None
    return cached / weights if weights else None


def _start(config: EngineConfig, path: Path, scratch: Path, name: str, share_in_memory: float | None) -> Startup:
    started = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ingle.bench.startup",
            json.dumps({"model": config.model, **config.options()}),
            str(path),
        ],
        env={**os.environ, **{variable: str(scratch / folder) for variable, folder in _CACHES.items()}},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise EngineError(f"the engine did not start: exit code {done.returncode}")
    report = json.loads(done.stdout.splitlines()[-1])
    # The child's clock is the system's own, so its moment of the first token can be compared with ours.
    return Startup(name, report["first_token"] - started, report["phases_s"], share_in_memory)


def _child(config: EngineConfig, path: Path) -> None:
    from ingle.engine.build import build_engine
    from ingle.request import EngineRequest, SamplingParams, token_ids

    engine, info = build_engine(config, path)
    engine.add(EngineRequest("first", token_ids([1, 2, 3]), SamplingParams(temperature=0.6, max_tokens=1)))
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason == "error":
                sys.exit(f"the first token failed: {output.error}")
    print(json.dumps({"first_token": time.perf_counter(), "phases_s": info.timings_s}))


if __name__ == "__main__":
    _child(EngineConfig.of(**json.loads(sys.argv[1])), Path(sys.argv[2]))
