"""The goals, and how far they are reached."""

from __future__ import annotations

import statistics
from pathlib import Path

from cpu_engines.session import ENGINES

from ingle.kernels.cpu import targets

_UNITS = {"prefill_512": "tokens/s", "decode_at_512": "tokens/s", "server_c1": "tokens/s", "server_c4": "tokens/s",
          "server_c16": "tokens/s", "gemma_prefill_1000": "tokens/s", "gemma_decode_at_1000": "tokens/s",
          "ready_s": "s", "resident_mib": "MiB, KV aside", "top1_agreement": "share", "mean_kl": "nats"}  # fmt: skip
_LESS_IS_BETTER = {"ready_s", "resident_mib", "mean_kl"}
_ALWAYS = {"ready_s": 1.0, "resident_mib": 1.5, "top1_agreement": 1.0, "mean_kl": 1.0}
GOALS = {
    "AVX2": {"prefill_512": 3.0, "decode_at_512": 1.5, "server_c1": 1.4, "server_c4": 2.5, "server_c16": 4.0,
             "gemma_prefill_1000": 3.0, "gemma_decode_at_1000": 1.5, **_ALWAYS},
    "AVX-512": {"prefill_512": 5.5, "decode_at_512": 2.3, "server_c1": 2.5, "server_c4": 5.0, "server_c16": 5.3,
                "gemma_prefill_1000": 4.0, "gemma_decode_at_1000": 2.0, **_ALWAYS},
}  # fmt: skip
"""The ratio to llama.cpp to reach, by the instructions that ingle's kernels run on."""
SHARES = {"smollm2-135m": 0.7, "qwen3-moe-1b-active": 0.5, "qwen3-moe-100m-active": 0.5}
"""Of the memory's bandwidth to reach, by shape."""
_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "asimddp", "i8mm")


def kind(kernels: str) -> str:
    """Which goals hold for these kernels of ingle's."""
    return "AVX-512" if "AVX-512" in kernels else "AVX2"


def medians(runs: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {key: statistics.median(values) for key, values in runs[name].items()} for name in ENGINES}


def table(results: dict[str, dict[str, float]], kind: str) -> str:
    lines = [f"{'':<22}{'llama.cpp':>12}{'ingle':>12}{'ratio':>10}{'goal':>9}"]
    for key, goal in GOALS[kind].items():
        if any(key not in results[name] for name in ENGINES):
            continue
        theirs, ours = (results[name][key] for name in ENGINES)
        less = key in _LESS_IS_BETTER
        reached = ours <= goal * theirs if less else ours >= goal * theirs
        sign = "<=" if less else ">="
        numbers = f"{theirs:>12.4g}{ours:>12.4g}{ours / theirs:>10.3g}{sign + format(goal, 'g'):>9}"
        lines.append(f"{key:<22}{numbers}  {'yes' if reached else 'NO':<4}{_UNITS[key]}")
    return "\n".join(lines)


def table_of_shares(found: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<22}{'tokens/s':>12}{'GB/s':>8}{'of':>8}{'share':>8}{'goal':>9}"]
    for shape, one in found.items():
        rate = one["bytes_per_token"] * one["tokens_per_s"] / 1e9
        numbers = f"{one['tokens_per_s']:>12.4g}{rate:>8.1f}{one['bytes_per_s'] / 1e9:>8.1f}{one['share']:>8.2f}"
        goal = SHARES[shape]
        lines.append(f"{shape:<22}{numbers}{'>=' + format(goal, 'g'):>9}  {'yes' if one['share'] >= goal else 'NO'}")
    return "\n".join(lines)


def processor() -> dict[str, object]:
    """Its name, and which of the instructions it has that engines differ by."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    features = targets.features()
    return {"name": names[0] if names else targets.machine(), "instructions": [x for x in _FEATURES if x in features]}
