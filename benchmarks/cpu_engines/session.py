"""One comparison while it runs: both engines, what they measured, and the time that it has taken."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_engines.peer import Peer

HERE = Path(__file__).parent
PEER, OURS = "llama.cpp", "ingle"
ENGINES = (PEER, OURS)
CHILD_TIMEOUT_S = 600
_VOCABULARY = 48_000  # above it are tokens with a meaning of their own


@dataclass
class Session:
    peer: Peer
    target: str
    threads: int
    clock: str = "perf_counter"
    """Of Python's `time`: process_time on a machine that others use, with one thread."""
    activations: str = "int16"
    """Ours: --cpu-activations."""
    runs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {name: {} for name in ENGINES})
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the memory's bandwidth, and what they come from, by shape."""
    failures: dict[str, str] = field(default_factory=dict)
    """By part, why it was given up."""
    _started: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        print(f"[{self.elapsed_s():5.0f} s] {text}", flush=True)

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Runs a part of the comparison. One that fails, or takes too long, leaves the others what they measured."""
        try:
            part()
        except (OSError, RuntimeError, subprocess.SubprocessError, asyncio.TimeoutError) as error:
            self.failures[name] = f"{type(error).__name__}: {error}"[:2000]
            self.say(f"{name} failed: {self.failures[name]}")

    def add(self, engine: str, key: str, value: float) -> None:
        self.runs[engine].setdefault(key, []).append(value)

    def environment(self) -> dict[str, str]:
        """In which both engines, and what PyTorch does for ours, use the target's instructions."""
        inherited = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
        pytorch = {} if self.target == "native" else {"ATEN_CPU_CAPABILITY": "avx2"}
        own = {"INGLE_CPU_TARGET": self.target, "LLAMA_CPP_LIB_PATH": str(self.peer.folder)}
        return {**inherited, **pytorch, **own}

    def call(self, engine: str, command: str, path: Path, **arguments: object) -> Any:
        """What a command of an engine's script returns for a model, in a process of its own."""
        self.say(f"{engine}: {command}, {path.name}")
        arguments |= {"path": str(path), "threads": self.threads}
        if engine == OURS and not arguments.get("exact"):
            arguments["activations"] = self.activations
        python, script = (self.peer.python, "llamacpp.py") if engine == PEER else (sys.executable, "ingle_engine.py")
        done = subprocess.run(
            [str(python), str(HERE / script), command, json.dumps(arguments)],
            stdout=subprocess.PIPE, text=True, check=True, timeout=CHILD_TIMEOUT_S, env=self.environment(),
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])


def random_prompts(seed: int, count: int, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(_VOCABULARY) for _ in range(length)] for _ in range(count)]
