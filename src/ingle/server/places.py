"""What each of several engines on this machine has of it: GPUs, processors, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ingle.channel import Share
from ingle.config import EngineConfig, parse_bytes
from ingle.errors import ConfigError

_LIST_S = 20.0
_NO_GPU = ("", "-1", "none", "void")
_ROOT = Path("/")


def places(config: EngineConfig, root: Path = _ROOT) -> list[tuple[EngineConfig, Share]]:
    """What each of `--data-parallel-size` engines is told: how to run, and with what.

    Raises `ConfigError` where there are fewer GPUs than they take.
    """
    parallel = config.parallel
    if parallel.data_parallel_size == 1:
        return [(config, Share())]
    own = alone(config)
    if parallel.device == "cpu":
        return _on_cpus(own, parallel.data_parallel_size, root)
    found = visible_gpus(os.environ, root)
    return [(replace(own, parallel=replace(own.parallel, device="cuda")), Share(gpus=",".join(each)))
            for each in _divided(config, found)]  # fmt: skip


def alone(config: EngineConfig) -> EngineConfig:
    """As one of them is told."""
    count, cache = config.parallel.data_parallel_size, config.cache
    if cache.host_cache is not None:  # which is of all together; they find each other's files on a disk
        cache = replace(cache, host_cache=str(max(parse_bytes("--host-cache", cache.host_cache) // count, 1)))
    return replace(config, cache=cache, parallel=replace(config.parallel, data_parallel_size=1))


# ---- GPUs


def visible_gpus(environment: Mapping[str, str], root: Path = _ROOT) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those that the user named, or all. PyTorch is not asked: what it has seen
    once, it goes on seeing."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found: list[str] = []
        for name in map(str.strip, named.split(",")):
            if name.lower() in _NO_GPU or name in found:  # CUDA sees nothing of what follows
                break
            found.append(name)
        return found
    count = len([*(root / "dev").glob("nvidia[0-9]*")]) or _num_listed()
    return [str(number) for number in range(count)]


def _num_listed() -> int:
    """By the driver's program, where GPUs have no files of their own."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_LIST_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in said.splitlines())


def _divided(config: EngineConfig, gpus: Sequence[str]) -> list[Sequence[str]]:
    """Those of each engine."""
    parallel, count = config.parallel, config.parallel.data_parallel_size
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    size = len(gpus) // count if tensor == "auto" else tensor * pipeline
    if gpus and size >= pipeline and size and size * count <= len(gpus):
        return [gpus[start : start + size] for start in range(0, size * count, size)]
    flags = {"--data-parallel-size": count, "--tensor-parallel-size": tensor, "--pipeline-parallel-size": pipeline}
    name = " ".join(f"{flag} {value}" for flag, value in flags.items() if value != 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "here" if visible is None else f"here (CUDA_VISIBLE_DEVICES={visible})"
    if not gpus:
        raise ConfigError(
            f"{name}: there is no GPU {where}", alternative="--device cpu has engines side by side on the CPU"
        )
    needed = count * pipeline if tensor == "auto" else count * size
    most = len(gpus) // (pipeline if tensor == "auto" else size)
    raise ConfigError(
        f"{name}: {needed} GPUs are needed, and there {'is 1' if len(gpus) == 1 else f'are {len(gpus)}'} {where}",
        alternative=f"--data-parallel-size {most}" if most > 1 else "leave out --data-parallel-size",
    )


# ---- CPUs


def _on_cpus(config: EngineConfig, count: int, root: Path) -> list[tuple[EngineConfig, Share]]:
    from ingle.engine.memory import free_host_bytes
    from ingle.kernels.cpu.threads import default_count

    parallel = config.parallel
    if parallel.threads is None:
        ranks = 1 if parallel.tensor_parallel_size == "auto" else parallel.tensor_parallel_size
        threads = max(default_count() // (count * ranks * parallel.pipeline_parallel_size), 1)
        config = replace(config, parallel=replace(parallel, threads=threads))
    free = free_host_bytes()
    share = Share(host_bytes=None if free is None else free // count)
    near = _nodes(root)
    if len(near) < 2 or (count % len(near) and len(near) % count):
        return [(config, share)] * count
    found = []
    for index in range(count):
        first, last = index * len(near) // count, max((index + 1) * len(near) // count, index * len(near) // count + 1)
        own = sorted(cpu for node in near[first:last] for cpu in node)
        found.append((config, Share(host_bytes=share.host_bytes, cpus=tuple(own))))
    return found


def _nodes(root: Path) -> list[set[int]]:
    """The processors that this process may use, by the memory that they are near to."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = os.sched_getaffinity(0)
    nodes = sorted(
        (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node"))
    )
    try:
        found = [_listed((node / "cpulist").read_text()) & allowed for node in nodes]
    except (OSError, ValueError):
        return []
    return [cpus for cpus in found if cpus]


def _listed(text: str) -> set[int]:
    """Of such as 0-15,32-47."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
