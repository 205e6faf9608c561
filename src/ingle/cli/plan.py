"""`ingle plan`: what a model takes and which machine carries it, before anything is downloaded or loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ingle.cli.fields import Hidden
from ingle.cli.flags import parse
from ingle.config import CacheConfig, EngineConfig, ParallelConfig, WeightsConfig
from ingle.errors import printable

_HIDDEN: Hidden = {
    EngineConfig: {"seed", "enforce_eager", "overlap"},
    WeightsConfig: {"quantization", "trust_remote_code"},
    CacheConfig: {"num_gpu_blocks_override", "enable_prefix_caching"},
    ParallelConfig: {"threads", "cpu_kernels", "tensor_parallel_size"},
}
"""What changes no memory, or is what the plan is to find out."""


@dataclass(frozen=True)
class Plan:
    """Say what a model takes, which GPUs carry it and how, and how fast it could be at best.

    From its configuration and the headers of its weight files alone: MODEL is a name, a folder, a .gguf file, or just a
    config.json.
    """

    engine: EngineConfig
    gpus: str | None = None
    """The GPUs to plan for: 8x24GiB, 3090:8, 2xV100-32GB, h100; cpu for this machine without its GPUs. Default: this
    machine."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """Weights as ingle would hold them, or quantized: an estimate, for groups of 128."""
    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Plan, argv, command="plan", hide=_HIDDEN)
    path = _path(flags.engine.model)
    from ingle.plan.machine import machine_of
    from ingle.plan.plan import make_plan
    from ingle.plan.report import as_dict, lines

    bits = {"auto": None, "int8": 8, "int4": 4}[flags.weights]
    plan = make_plan(path, flags.engine, machine_of(flags.gpus), bits)
    if flags.json:
        print(json.dumps(as_dict(plan, flags.engine.model, flags.engine), indent=1))
        return
    for line in lines(plan, flags.engine.model, flags.engine):
        print(printable(line))


def _path(model: str) -> Path:
    """A folder, a .gguf file, or a config.json."""
    path = Path(model)
    if path.suffix.lower() == ".json" and path.is_file():
        return path
    from ingle.hub.resolve import resolve_model

    return Path(resolve_model(model).path)
