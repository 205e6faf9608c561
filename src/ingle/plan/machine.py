"""The machine that a plan is for: GPUs and a CPU's memory, as they are here or as somebody has them in mind."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ingle.engine.memory import DeviceMemory, host_memory
from ingle.engine.roofline import Ceilings
from ingle.errors import ConfigError
from ingle.kernels.cpu import threads
from ingle.plan.gpus import Gpu, find_gpu, least_of, parse_gpus

_TIMEOUT_S = 10
_QUERY = "name,memory.total,memory.free,compute_cap"
_OLDER_QUERY = "name,memory.total,memory.free"
"""Of drivers that do not tell the compute capability."""
_READ_BYTES, _PRODUCT_SIZE, _TRIES = 1 << 28, 1024, 4


@dataclass(frozen=True)
class Machine:
    num_gpus: int
    gpu: Gpu | None
    """What each of them has; None where there is none."""
    host: DeviceMemory
    cpu: Ceilings | None
    """What the CPU reaches, where it was measured."""
    is_here: bool


def machine_of(text: str | None) -> Machine:
    """For `--gpus`: those GPUs, `cpu` for this machine without its GPUs, None for this machine as it is."""
    if text is None or text.strip().lower() in ("cpu", "none"):
        gpus = () if text is not None else gpus_here()
        gpu = least_of(gpus) if gpus else None
        return Machine(len(gpus), gpu, host_memory(), measure_cpu() if gpu is None else None, is_here=True)
    gpus = parse_gpus(text)
    return Machine(len(gpus), least_of(gpus), DeviceMemory(None), None, is_here=False)


def gpus_here() -> tuple[Gpu, ...]:
    """This machine's NVIDIA GPUs as nvidia-smi sees them; none without it. Raises `ConfigError` when that fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = _ask(program, _QUERY) or _ask(program, _OLDER_QUERY)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"nvidia-smi does not answer ({error}): give --gpus, or look at `ingle doctor`") from error
    return tuple(gpu for line in listed.splitlines() if (gpu := _listed(line)) is not None)


def _ask(program: str, query: str) -> str:
    """Empty when it refuses: a driver may be loaded without a card, or be older than the question."""
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else ""


def _listed(line: str) -> Gpu | None:
    """A card of nvidia-smi's list; its figures are the table's where that has it."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) < 3 or not (fields[1].isdecimal() and fields[2].isdecimal()):  # in pieces (MIG), or lost
        return None
    name, total, free = fields[0], int(fields[1]) << 20, int(fields[2]) << 20
    known = find_gpu(name) or Gpu(name, total)
    major, _, minor = fields[3].partition(".") if len(fields) > 3 else ("", "", "")
    capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else known.capability
    return replace(known, name=name, memory_bytes=total, free_bytes=free, capability=capability)


def measure_cpu() -> Ceilings:
    """What this CPU reads and multiplies at best: some tenths of a second's measurement, by NumPy.

    Products are of float32, and those of 16-bit numbers at most twice as fast.
    """
    num_threads = threads.default_count()
    parts = np.array_split(np.ones(_READ_BYTES // 4, np.float32), num_threads)
    square = np.ones((_PRODUCT_SIZE, _PRODUCT_SIZE), np.float32)
    with ThreadPoolExecutor(num_threads) as pool:
        read_s = _best(lambda: list(pool.map(np.max, parts)))
    return Ceilings(_READ_BYTES / read_s, 2 * 2 * _PRODUCT_SIZE**3 / _best(lambda: square @ square))


def _best(function: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
