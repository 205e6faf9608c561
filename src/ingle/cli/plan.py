"""`ingle plan`: what a model takes and which machine carries it, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ingle.cli.ending import in_order
from ingle.cli.fields import Hidden
from ingle.cli.flags import parse
from ingle.config import CacheConfig, EngineConfig, ParallelConfig, WeightsConfig
from ingle.errors import printable

if TYPE_CHECKING:
    from ingle.hub.remote import Remote

_HIDDEN: Hidden = {
    EngineConfig: {"seed", "enforce_eager", "overlap"},
    WeightsConfig: {"trust_remote_code"},
    CacheConfig: {"num_gpu_blocks_override", "enable_prefix_caching"},
    ParallelConfig: {"threads", "cpu_kernels", "data_parallel_size"},
}
"""What changes no memory, or is what the plan is to find out."""


@dataclass(frozen=True)
class Plan:
    """Say what a model takes, which GPUs carry it and how, and how fast it could be at best.

    From its configuration and the headers of its weight files alone: of a model that is not here no more is fetched.

    MODEL may also be just a config.json. --tensor-parallel-size and --pipeline-parallel-size: that layout alone.
    """

    engine: EngineConfig
    gpus: str | None = None
    """The GPUs to plan for: 8x24GiB, 3090:8, 2xV100-32GB, h100; cpu for this machine without its GPUs. Default: this
    machine."""
    weights: Literal["auto", "int8", "int4", "fp8"] = "auto"
    """The same as --quantization: weights of floats rounded while they are loaded."""
    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Plan, argv, command="plan", hide=_HIDDEN)
    from ingle.plan.machine import machine_of
    from ingle.plan.plan import make_plan
    from ingle.plan.report import as_dict, lines

    engine = flags.engine
    if flags.weights != "auto":
        engine = replace(engine, weights=replace(engine.weights, quantization=flags.weights))
    machine, name = machine_of(flags.gpus), engine.model
    free = None if flags.gpus is None else machine.host.free if machine.gpu is None else machine.gpu.memory_bytes
    with _files(name, free) as (path, remote):
        plan = make_plan(path, engine, machine)
        if remote is not None:
            name, plan = remote.name, replace(plan, offers=remote.download.offers, choice=remote.download.choice)
        if flags.json:
            print(json.dumps(_named(as_dict(plan, name, engine), remote), indent=1))
            return
        for line in lines(plan, name, engine):
            print(printable(_named(line, remote)))


@contextmanager
def _files(model: str, free: int | None) -> Iterator[tuple[Path, Remote | None]]:
    """A folder, a .gguf file, or a config.json; of a model that is not here a stand-in, chosen for so many bytes of
    memory."""
    path = Path(model)
    if path.suffix.lower() == ".json" and path.is_file():
        yield path, None
        return
    from ingle.hub.names import RepoRef, UrlRef
    from ingle.hub.resolve import ModelSource, resolve_model, resolve_or_locate

    found = resolve_or_locate(model)
    if isinstance(found, ModelSource):
        yield found.path, None
        return
    reference = found.reference
    if not isinstance(reference, RepoRef | UrlRef):
        yield resolve_model(model).path, None  # which says how it comes here
        return
    from ingle.hub.remote import looked_at

    def note(text: str) -> None:
        print(printable(text), file=sys.stderr)

    with in_order(), looked_at(found.name, reference, "plan", note, free) as remote:
        yield remote.source.path, remote


def _named(value: Any, remote: Remote | None) -> Any:
    """`value` with the model's name wherever the place of its stand-in is told."""
    if remote is None:
        return value
    if isinstance(value, dict):
        return {key: _named(inner, remote) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner, remote) for inner in value]
    return remote.named(value) if isinstance(value, str) else value
