"""ingle, as `cpu_vs_llamacpp.py` drives it: the same commands as `llamacpp.py`, but for the server."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path


def _engine(path: str, threads: int, activations: str = "int16", **options: object):  # type: ignore[no-untyped-def]
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it
    from ingle.config import EngineConfig
    from ingle.engine.build import build_engine

    config = EngineConfig.of(path, device="cpu", threads=threads, max_model_len=2048, kv_cache_memory="64MiB",
                          enable_prefix_caching=False, cpu_activations=activations, **options)  # fmt: skip
    return build_engine(config, Path(path))


def describe(path: str, threads: int, activations: str) -> dict[str, object]:
    from importlib.metadata import version

    from ingle import __version__

    _, info = _engine(path, threads, activations)
    return {
        "version": __version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
        "kernels": info.kernels,
        "factors": info.factors,
        "notices": info.notices,
    }


def offline(
    path: str, threads: int, prompts: list[list[int]], num_out: int, clock: str, activations: str
) -> list[dict[str, float]]:
    from ingle.request import EngineRequest, SamplingParams

    engine, _ = _engine(path, threads, activations)
    now = getattr(time, clock)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
    results = []
    for index, prompt in enumerate(prompts):
        started = now()
        engine.add(EngineRequest(str(index), prompt, sampling))
        while not engine.step():
            pass
        first = now()
        while engine.has_work:
            engine.step()
        results.append({"first_s": first - started, "next_s": (now() - first) / (num_out - 1)})
    return results[1:]


def decode(
    path: str, threads: int, prompts: list[list[int]], num_out: int, clock: str, activations: str
) -> dict[str, float]:
    """The least time of a token behind one of the prompts, and the weights' bytes that it reads."""
    from ingle.request import EngineRequest, SamplingParams

    engine, _ = _engine(path, threads, activations)
    now, times = getattr(time, clock), []
    for index, prompt in enumerate(prompts):
        engine.add(
            EngineRequest(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True))
        )
        while engine.has_work:
            started = now()
            engine.step()
            times.append(now() - started)
    weights = engine.facts.weights
    read = weights.total[1] - weights.looked_up[1]
    return {"bytes_per_token": read, "next_s": statistics.median(sorted(times)[: len(times) // 2])}


def logits(
    path: str, threads: int, windows: list[list[int]], output: str, activations: str = "int16", exact: bool = False
) -> None:
    """`exact`: the oracle, weights decoded to float32 and multiplied by PyTorch."""
    import numpy as np

    from ingle.request import EngineRequest, SamplingParams
    from ingle.step import Masks

    engine, info = _engine(
        path, threads, activations, **({"dtype": "float32", "cpu_kernels": "torch"} if exact else {})
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    found = np.lib.format.open_memmap(output, "w+", np.float32, (len(windows), len(windows[0]), info.vocab_size))
    for index, window in enumerate(windows):
        engine.add(EngineRequest(str(index), window, sampling))
        plan = engine.scheduler.plan()
        assert plan is not None and plan.step.num_tokens == len(window)
        running = engine.worker.forward(plan.step)  # fills the tables
        engine.worker.sample(running, Masks())
        found[index] = _logits_of(engine.worker.device, plan.step)
        engine.scheduler.retire(plan, engine.worker.result(running))


def _logits_of(device, step):  # type: ignore[no-untyped-def]
    from ingle.device.inputs import inputs_of
    from ingle.device.native.device import NativeDevice

    if isinstance(device, NativeDevice):
        return device.model.logits(device.hidden(inputs_of(step, step.num_tokens)))
    import torch

    with torch.inference_mode():
        return device.model.logits(device.model.forward(device.tables.batch_of(step), device.kv_cache)).float().numpy()


def bandwidth(path: str, threads: int, num_runs: int, activations: str) -> dict[str, float]:
    """Decodes made-up weights of a shape: bytes that a token reads, of a mixture those of the experts it chooses."""
    import torch

    from ingle.bench.ceilings import measure_ceilings
    from ingle.bench.throughput import run_once, warm_up
    from ingle.bench.workloads import Workload
    from ingle.engine.roofline import Stored, least
    from ingle.request import Sampling

    before = measure_ceilings(torch.device("cpu"), torch.float32)
    engine, info = _engine(path, threads, activations, load_format="dummy")
    prompt, all_of_it = (Workload("decode", ((128, num_out),)) for num_out in (1, 33))
    greedy = Sampling(temperature=0.0)
    warm_up(engine, info.vocab_size, [all_of_it], greedy)
    times_s = [run_once(engine, all_of_it, info.vocab_size, greedy, seed).mean_tpot_s for seed in range(num_runs)]
    after = measure_ceilings(torch.device("cpu"), torch.float32)  # whatever else the machine does slows one of them
    ceilings = max(before, after, key=lambda ceilings: ceilings.bytes_per_s)
    model, limits = engine.facts.model, engine.scheduler.limits
    has = Stored.of(engine.facts.weights, engine.facts.kv)
    num_bytes = [least(workload.lengths, model, has, limits, ceilings).num_bytes for workload in (all_of_it, prompt)]
    per_token, token_s = (num_bytes[0] - num_bytes[1]) / 32, statistics.median(times_s)
    return {
        "bytes_per_s": ceilings.bytes_per_s,
        "bytes_per_token": per_token,
        "tokens_per_s": 1 / token_s,
        "share": per_token / token_s / ceilings.bytes_per_s,
    }


if __name__ == "__main__":
    command, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[command](**arguments)))
