"""A model on several ranks: whether it can be, and how all of them come to be one device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ingle.config import DType, EngineConfig
from ingle.engine.startup import Loaded, Numerics, OpenModel, Startup
from ingle.errors import ConfigError, EngineError, ModelError
from ingle.model.architecture import DecoderConfig
from ingle.model.count import count_experts, num_parameters
from ingle.model.sizes import WeightSizes
from ingle.parallel.hosts import QUIET
from ingle.parallel.layout import Layout, Place

if TYPE_CHECKING:
    from ingle.parallel.group import Member
    from ingle.parallel.hosts import Hosts
    from ingle.parallel.messages import Loaded as Share
    from ingle.parallel.team import Team

_MOST_EARLY = 16
"""Ranks that are started before it is known that they can be."""
_IMPORTS_S = 120.0
"""For a rank to import PyTorch, on a machine that is busy."""


def layout_of(config: EngineConfig, device: str, opened: OpenModel) -> Layout:
    """How the model is divided. Raises `ConfigError` where it cannot be so, with what can."""
    parallel = config.parallel
    if not parallel.asks_for_ranks:
        return Layout()
    on_ray = parallel.distributed_executor_backend == "ray"
    from ingle.model.share import MAX_SIZE, Division, sizes_for
    from ingle.model.stages import stages_of

    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    flags = {"--tensor-parallel-size": tensor, "--pipeline-parallel-size": pipeline}
    name = " ".join(f"{flag} {value}" for flag, value in flags.items() if value != 1)
    num_gpus = min(_num_gpus(), MAX_SIZE) if device == "cuda" else None
    if opened.decoder is None:
        if (tensor, pipeline) == ("auto", 1):
            return Layout()
        raise ConfigError(
            f"{name}: model_type {opened.files.hf_config['model_type']!r} is run by transformers' code, on one device",
            alternative="leave the flag out",
        )
    if device == "cpu" and parallel.device != "cpu" and tensor != "auto":
        raise ConfigError(
            f"{name}: PyTorch sees no GPU here{_visible()}"
            + (", where rank 0 is to be, the engine's own process" if on_ray else ""),
            alternative="--device cpu divides the model among CPUs",
        )
    sizes = sizes_for(opened.decoder, 1 if num_gpus is None else num_gpus // (1 if on_ray else pipeline))
    layout = Layout(max(sizes, default=1) if tensor == "auto" else tensor, pipeline)
    if num_gpus is not None and layout.num_ranks > num_gpus and not on_ray:
        works = f"these sizes work: {', '.join(map(str, sizes))}" if pipeline == 1 else "give fewer"
        raise ConfigError(
            f"{name}: PyTorch sees {num_gpus} {'GPU' if num_gpus == 1 else 'GPUs'} here{_visible()}, and that takes "
            f"{layout.num_ranks}",
            alternative=works,
        )
    Division.of(opened.decoder, layout.tensor)
    stages_of(opened.decoder, layout.pipeline, parallel.layers_of_stages())
    return layout


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _visible() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"


def share_of(config: EngineConfig, opened: OpenModel, place: Place) -> OpenModel:
    """What a rank has of a model. Closing either closes both."""
    layout, source = place.layout, opened.source
    if layout.num_ranks == 1:
        return opened
    from ingle.model.share import Division
    from ingle.model.stages import stage_config, stages_of
    from ingle.weights.cut import CutSource

    assert opened.decoder is not None, "only decoders are divided"
    decoder = opened.decoder
    stages = stages_of(decoder, layout.pipeline, config.parallel.layers_of_stages())
    if layout.tensor > 1:
        division = Division.of(decoder, layout.tensor, source)
        decoder, source = division.share, CutSource(source, division.cuts(source, place.index))
    return replace(opened, decoder=stage_config(decoder, stages[place.stage]), source=source)


@dataclass(frozen=True)
class Crew:
    """Ranks that have joined."""

    team: Team
    member: Member
    notice: str | None = None


def started_early(config: EngineConfig) -> Team | None:
    """Ranks that import PyTorch while this process reads the model's headers, where their number is clear already.

    Raises `ConfigError` where they would be on a Ray cluster, and there is no Ray.
    """
    parallel = config.parallel
    if parallel.asks_for_ranks and parallel.distributed_executor_backend == "ray":
        from ingle.parallel.cluster import check_ray

        check_ray()
        os.environ.setdefault(*QUIET)  # before anything imports PyTorch
        return None
    if not parallel.asks_for_ranks or parallel.tensor_parallel_size == "auto":
        return None
    size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if size > _MOST_EARLY:
        return None
    if config.parallel.device != "cpu" and size > len(list(Path("/dev").glob("nvidia[0-9]*"))):
        return None
    from ingle.parallel.team import Team

    return Team(size)


@contextlib.contextmanager
def ending(team: Team | None) -> Iterator[None]:
    """Ends the ranks where what is done here fails, and raises `EngineError` where one of them is why."""
    try:
        yield
    except BaseException as error:
        if team is None:
            raise
        if isinstance(error, Exception) and not isinstance(error, (ConfigError, ModelError)):
            team.wait_for_words()
        failure = team.failure
        team.close()
        if failure is not None and isinstance(error, Exception):
            raise EngineError(failure) from error
        raise


def devices_of(layout: Layout, device: str) -> list[str]:
    """A GPU for each rank, or all of them on CPUs."""
    return [f"cuda:{rank}" if device == "cuda" else "cpu" for rank in range(layout.num_ranks)]


def gather(
    config: EngineConfig, layout: Layout, device: str, startup: Startup, team: Team | None, *, own_kernels: bool
) -> Crew:
    """Ranks on this machine, or in a cluster where the configuration says so. `team`: if they are started already."""
    if config.parallel.distributed_executor_backend != "ray":
        return assemble(layout, devices_of(layout, device), startup, team, own_kernels=own_kernels)
    from ingle.parallel.cluster import RayHosts

    with startup.phase("ray", "joining Ray's cluster"):
        hosts = RayHosts(
            layout.tensor,
            layout.pipeline,
            "GPU" if device == "cuda" else "CPU",
            each=1 if device == "cuda" else config.parallel.threads or 1,
            report=startup.report,
        )
    crew = assemble(layout, [seat.device for seat in hosts.seats], startup, own_kernels=own_kernels, hosts=hosts)
    return replace(crew, notice=hosts.notice)


def assemble(
    layout: Layout,
    devices: list[str],
    startup: Startup,
    team: Team | None = None,
    *,
    own_kernels: bool = True,
    hosts: Hosts | None = None,
) -> Crew:
    """Has ranks find each other, on these devices; starts them where there is no `team` yet, on other machines too
    where `hosts` has seats for them. `own_kernels`: not all sums of GPUs are left to NCCL."""
    from ingle.parallel.team import Team

    if team is None:
        with startup.phase("start_ranks", "starting the other ranks"):
            team = Team(layout.num_ranks, hosts)
    with ending(team):
        with startup.phase("pytorch", f"importing PyTorch in {layout.num_ranks} ranks"):
            import torch

            from ingle.parallel.group import JOIN_S, join

            own_kernels = own_kernels and not team.is_on_several_hosts
            team.ready(_IMPORTS_S)
        with startup.phase("ranks", f"joining {layout.num_ranks} ranks"):
            backend, meeting = team.join(layout, devices, own_kernels=own_kernels)
            device = torch.device(devices[0])
            ready = partial(ready_to_load, device.type)
            member = join(layout.place(0), device, backend, meeting, own_kernels=own_kernels, meanwhile=ready)
            team.on_end(member.abort)
            team.joined(JOIN_S)
        startup.report(f"the ranks reach each other by {member.link}")
    return Crew(team, member)


def ready_to_load(device_type: str) -> None:
    """Imports what loads and runs a model, which takes about as long as NCCL does to bring ranks together."""
    from ingle.engine import torch_build  # noqa: F401

    if device_type == "cuda":
        with contextlib.suppress(ImportError):  # PyTorch's operators run where Triton is not there
            import ingle.kernels.gpu.device  # noqa: F401


def load_on(
    crew: Crew, config: EngineConfig, path: Path, opened: OpenModel, startup: Startup
) -> tuple[Numerics, Loaded]:
    """All ranks load it, in place of what they had."""
    from ingle.engine.torch_build import TorchRunner
    from ingle.parallel.device import RanksDevice

    team, member, layout = crew.team, crew.member, crew.member.place.layout
    with ending(team):
        if config.cache.has_tiers and team.is_on_several_hosts:
            flag = "--host-cache" if config.cache.host_cache is not None else "--disk-cache"
            raise ConfigError(
                f"{flag}: pages of a model on several hosts are kept on its devices alone",
                alternative="leave the flag out",
            )
        runner = TorchRunner(config, member.device.type, our_kernels=False, member=member)
        if team.is_on_several_hosts:
            from ingle.weights.digest import digest_of

            # Another host's processor might choose another type.
            dtype = cast(DType, runner.numerics(opened).dtype)
            team.load(replace(config, weights=replace(config.weights, dtype=dtype)), path, digest_of(path))
        else:
            team.load(config, path)
        startup.meanwhile = team.check
        numerics, own = runner.load(share_of(config, opened, member.place), startup)
        with startup.phase("other_ranks", "waiting for the other ranks' weights"):
            shares = team.loaded()
    assert opened.decoder is not None, "only decoders are divided"
    weights = _weights_of_all(opened.decoder, own.facts.weights, shares)
    kv = opened.decoder.kv_spec(numerics.kv_dtype)
    limits = replace(own.memory.limits, num_turns=layout.pipeline)
    waits = member.stages is not None and not member.stages.on_devices
    page_bytes = [own.facts.kv.page_bytes(limits.page_size), *(share.page_bytes for share in shares)]
    facts = replace(own.facts, model=opened.decoder, weights=weights, kv=kv)
    return numerics, replace(
        own,
        device=RanksDevice(own.device, team, page_bytes, later=waits),
        device_name=f"{layout.num_ranks} x {own.device_name} ({layout} by {member.link.name})",
        facts=replace(facts, num_devices=layout.num_ranks) if facts.on_gpu else facts,
        memory=replace(own.memory, limits=limits),
        notices=(*own.notices, *([] if crew.notice is None else [crew.notice])),
    )


def _weights_of_all(decoder: DecoderConfig, own: WeightSizes, others: list[Share]) -> WeightSizes:
    """The numbers of the model, and the bytes that all ranks have of it together."""
    matrix, mixture = decoder.vocab_size * decoder.hidden_size, own.mixture
    if mixture is not None and decoder.moe is not None:
        mixture = replace(
            mixture,
            num_parameters=count_experts(decoder, decoder.moe.layers),
            num_bytes=mixture.num_bytes + sum(share.expert_bytes for share in others),
        )
    return WeightSizes(
        total=(num_parameters(decoder), own.total[1] + sum(share.weight_bytes for share in others)),
        head=(matrix, own.head[1] + sum(share.head_bytes for share in others)),
        looked_up=(
            0 if decoder.tied_embeddings else matrix,
            own.looked_up[1] + sum(share.looked_up_bytes for share in others),
        ),
        mixture=mixture,
    )
