"""From a process's start to its first token, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ingle.config import EngineConfig
from ingle.errors import EngineError


@dataclass(frozen=True)
class Startup:
    """Seconds; the phases are the engine's own."""

    kernel_cache: str
    """cold: no compiled GPU kernel was on disk; warm: those of the run before."""
    first_token_s: float
    phases_s: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure_startup(config: EngineConfig, path: Path) -> list[Startup]:
    """Starts an engine twice in new processes, the first with an empty kernel cache. Raises `EngineError`."""
    with tempfile.TemporaryDirectory() as cache:
        return [_start(config, path, cache, name) for name in ("cold", "warm")]


def _start(config: EngineConfig, path: Path, cache: str, name: str) -> Startup:
    started = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ingle.bench.startup",
            json.dumps({"model": config.model, **config.options()}),
            str(path),
        ],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise EngineError(f"the engine did not start: exit code {done.returncode}")
    report = json.loads(done.stdout.splitlines()[-1])
    # The child's clock is the system's own, so its moment of the first token can be compared with ours.
    return Startup(name, report["first_token"] - started, report["phases_s"])


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
