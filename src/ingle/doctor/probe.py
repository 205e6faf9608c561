"""What is tried in a process of its own, `python -m ingle.doctor.probe NAME`, because it may crash or hang.

Each prints one JSON object, in a line that begins with `children.MARK`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingle.doctor.children import MARK

if TYPE_CHECKING:
    from ingle.config import EngineConfig

_WORDS, _BLOCK = 1024, 256
_REDUCED_BYTES = (8 << 10, 64 << 20)
_TRIES = 10
_POLL_S = 0.05


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "built_for": [],
        "gpus": [],
        "error": None,
    }
    if torch.version.cuda:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            found["built_for"] = torch.cuda.get_arch_list()
            for index in range(torch.cuda.device_count()):
                found["gpus"].append([torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)])
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
    from ingle.errors import ConfigError
    from ingle.kernels.cpu import compile, library

    try:
        ready, failure = compile.is_ready(), None
        if ready:
            failure = library.start(1)
    except (compile.CompileError, ConfigError) as error:
        ready, failure = False, str(error)
    return {"ready": ready, "failure": failure, "instructions": library.instructions() if ready and not failure else ""}


def _packages(*names: str) -> dict[str, Any]:
    """Why modules do not import, by name."""
    failures = {}
    for name in names:
        print(f"importing {name} ends the process", file=sys.stderr, flush=True)  # the last word, if it does
        try:
            importlib.import_module(name)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {"failures": failures}


def _model(question: str) -> dict[str, Any]:
    """What of a model would fail here; one that is not here yet is judged by its headers on its hub."""
    from ingle.config import EngineConfig
    from ingle.errors import IngleError, errors_in
    from ingle.hub.names import RepoRef, UrlRef
    from ingle.hub.remote import looked_at
    from ingle.hub.resolve import ModelSource, resolve_model, resolve_or_locate

    asked = json.loads(question)
    config = EngineConfig.of(asked["model"], **asked["options"])
    is_fetched = False
    try:
        found = resolve_or_locate(config.model)
        if isinstance(found, ModelSource):
            return _checked(config, asked["text"], found.path)
        if isinstance(found.reference, RepoRef | UrlRef):
            with looked_at(found.name, found.reference, "show", lambda text: None) as remote:
                if remote.refusal is not None:
                    raise remote.refusal
                checked = _checked(config, asked["text"], remote.source.path)
                named = [[refused, *(each and remote.named(each) for each in said)]
                         for refused, *said in checked["findings"]]  # fmt: skip
                return {**checked, "findings": named}
        is_fetched = True  # by a start, from PyPI
        return _checked(config, asked["text"], resolve_model(config.model).path)
    except IngleError as error:
        refusals = [[not is_fetched, each.what, each.alternative] for each in errors_in(error)]
        return {"findings": refusals, "need": None, "fits": False, "path": None}


def _checked(config: EngineConfig, text: dict[str, Any], path: Path) -> dict[str, Any]:
    from ingle.config import TextConfig
    from ingle.engine.check import check_model

    report = check_model(config, TextConfig(**text), path)
    findings = [[each.refused, each.what, each.alternative] for each in report.findings]
    need = report.need
    fits = need is None or need.free is None or need.total <= need.free
    return {"findings": findings, "need": need and str(need), "fits": fits, "path": str(path)}


def _nccl() -> dict[str, Any]:
    """Sums over all GPUs, timed."""
    import torch

    return _reduced("nccl", torch.cuda.device_count())


def _gloo() -> dict[str, Any]:
    """The same over two processes of the CPU, for tests."""
    return _reduced("gloo", 2)


def _reduced(backend: str, num_ranks: int) -> dict[str, Any]:
    if num_ranks < 2:
        return {"num_ranks": num_ranks, "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        ranks = []
        for rank in range(num_ranks):
            command = [sys.executable, "-m", "ingle.doctor.probe", "rank", backend, str(rank), str(num_ranks), meeting]
            with Path(folder, f"{rank}.out").open("w") as out, Path(folder, f"{rank}.err").open("w") as err:
                ranks.append(subprocess.Popen(command, stdout=out, stderr=err))
        while any(each.poll() is None for each in ranks) and not any(each.returncode for each in ranks):
            time.sleep(_POLL_S)
        failed = [index for index, each in enumerate(ranks) if each.returncode]
        for each in ranks:  # those that wait for one that failed
            each.kill()
            each.wait()
        if failed:
            said = Path(folder, f"{failed[0]}.err").read_text(errors="replace")
            lines = [line for line in said.splitlines() if line.strip()]
            raise SystemExit(lines[-1] if lines else f"rank {failed[0]} ended with {ranks[failed[0]].returncode}")
        answer: dict[str, Any] = json.loads(Path(folder, "0.out").read_text().rpartition(MARK)[2])
        return answer


def _rank(backend: str, rank: str, num_ranks: str, meeting: str) -> dict[str, Any]:
    import torch
    from torch import distributed

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(rank))
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=meeting, rank=int(rank), world_size=int(num_ranks))
    times = {}
    for num_bytes in _REDUCED_BYTES:
        numbers = torch.ones(num_bytes // 4, device=device)
        best = float("inf")
        for _ in range(_TRIES):
            numbers.fill_(1.0)
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(numbers)
            summed = float(numbers[-1])  # waits for it
            best = min(best, time.perf_counter() - started)
            if summed != int(num_ranks):
                raise SystemExit(f"the sum of {num_ranks} ones over the GPUs is {summed:g}")
        times[str(num_bytes)] = best
    distributed.destroy_process_group()
    return {"num_ranks": int(num_ranks), "seconds": times}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": _torch,
    "triton": _triton,
    "kernels": _kernels,
    "packages": _packages,
    "model": _model,
    "nccl": _nccl,
    "gloo": _gloo,
    "rank": _rank,
}


def main(name: str, *words: str) -> None:
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    print(MARK + json.dumps(PROBES[name](*words)))


if __name__ == "__main__":
    main(*sys.argv[1:])
