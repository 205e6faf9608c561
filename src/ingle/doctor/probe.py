"""What is tried in a process of its own, `python -m ingle.doctor.probe NAME`, because it may crash or hang.

Each prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

_MARK = "ingle-probe "
_WORDS, _BLOCK = 1024, 256
_REDUCED_BYTES = (8 << 10, 64 << 20)
_TRIES = 10


class ProbeError(Exception):
    """A probe failed; the message is its last word, in a line."""


def ask(name: str, timeout_s: float) -> dict[str, Any]:
    """Raises `ProbeError` when the probe crashes, fails or takes longer."""
    command = [sys.executable, "-m", "ingle.doctor.probe", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL,
            check=False, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {timeout_s:.0f} s") from error
    except OSError as error:
        raise ProbeError(f"cannot be started: {error}") from error
    answers = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode == 0 and answers:
        answer: dict[str, Any] = json.loads(answers[-1])
        return answer
    if done.returncode < 0:
        raise ProbeError(f"the process was ended by signal {-done.returncode}")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise ProbeError(said[-1][:300] if said else f"exit code {done.returncode}")


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "built_for": torch.cuda.get_arch_list() if torch.version.cuda else [],
        "gpus": [],
        "error": None,
    }
    if torch.version.cuda:
        try:
            torch.cuda.init()
            found["gpus"] = [list(torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())]
        except (RuntimeError, AssertionError) as error:
            found["error"] = str(error).splitlines()[0][:300]
    return found


def _triton() -> dict[str, Any]:
    """A kernel of Triton's, compiled and run."""
    import torch
    import triton

    from ingle.doctor.triton_kernel import double

    numbers = torch.arange(_WORDS, device="cuda", dtype=torch.float32)
    out = torch.empty_like(numbers)
    started = time.perf_counter()
    double[(_WORDS // _BLOCK,)](numbers, out, BLOCK=_BLOCK)
    torch.cuda.synchronize()
    right = bool(torch.equal(out, 2 * numbers))
    return {"version": triton.__version__, "right": right, "seconds": time.perf_counter() - started}


def _kernels() -> dict[str, Any]:
    """The CPU's kernels, where nothing has to be compiled for it."""
    from ingle.kernels.cpu import compile, library

    try:
        if not compile.is_ready():
            return {"failure": None, "ready": False}
    except compile.CompileError as error:
        return {"failure": str(error), "ready": False}
    failure = library.start(1)
    return {"failure": failure, "ready": failure is None, "instructions": library.instructions() if not failure else ""}


def _nccl() -> dict[str, Any]:
    """Sums over all GPUs, timed."""
    import torch

    return _reduced("nccl", torch.cuda.device_count())


def _gloo() -> dict[str, Any]:
    """The same over two processes of the CPU, for tests."""
    return _reduced("gloo", 2)


def _reduced(backend: str, num_ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "ingle.doctor.probe", "rank", backend, str(rank), str(num_ranks), meeting],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
        said = [rank.communicate() for rank in ranks]
    if failed := [rank for rank in ranks if rank.returncode]:
        lines = [line for line in said[ranks.index(failed[0])][1].splitlines() if line.strip()]
        raise SystemExit(lines[-1] if lines else f"a rank ended with {failed[0].returncode}")
    answer: dict[str, Any] = json.loads(said[0][0].splitlines()[-1].removeprefix(_MARK))
    return answer


def _rank(backend: str, rank: int, num_ranks: int, meeting: str) -> dict[str, Any]:
    import torch
    from torch import distributed

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=num_ranks)
    times = {}
    for num_bytes in _REDUCED_BYTES:
        numbers = torch.ones(num_bytes // 4, device=device)
        best = float("inf")
        for _ in range(_TRIES):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(numbers)
            float(numbers[0])  # waits for it
            best = min(best, time.perf_counter() - started)
            numbers.fill_(1.0)
        times[str(num_bytes)] = best
    distributed.destroy_process_group()
    return {"num_ranks": num_ranks, "seconds": times}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "triton": _triton,
    "kernels": _kernels,
    "nccl": _nccl,
    "gloo": _gloo,
}


def main(words: list[str]) -> None:
    name, *rest = words
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    found = _rank(rest[0], int(rest[1]), int(rest[2]), rest[3]) if name == "rank" else PROBES[name]()
    print(_MARK + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
