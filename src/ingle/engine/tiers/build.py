"""From a configuration to the tiers below a device."""

from __future__ import annotations

import os
from pathlib import Path

from ingle.config import EngineConfig, parse_bytes
from ingle.engine.memory import free_host_bytes
from ingle.engine.pages import PagePool
from ingle.engine.startup import Loaded, Numerics, OpenModel
from ingle.engine.tiers import Tier
from ingle.engine.tiers.disk import DiskTier
from ingle.engine.tiers.host import HostTier, slots_in
from ingle.engine.tiers.identity import identity
from ingle.engine.tiers.keeper import PageKeeper
from ingle.errors import ConfigError, printable
from ingle.facts import size
from ingle.parallel.layout import Layout

_CPU_BATCH_BYTES = 16 << 20
_GPU_BATCH_BYTES = 32 << 20
_BLOCK_BYTES = 512
_ONE = Layout()


def check_tiers(config: EngineConfig, memory: int | None, taken: int = 0) -> None:
    """Raises `ConfigError` for a host cache that does not fit what is free, beside so many bytes that others will take.

    What a process before left in `memory` counts as free.
    """
    free = free_host_bytes()
    if config.cache.host_cache is None or free is None:
        return
    wanted = parse_bytes("--host-cache", config.cache.host_cache)
    held = 0 if memory is None else os.fstat(memory).st_blocks * _BLOCK_BYTES
    left = max(free + held - taken, 0)
    if wanted > left:
        raise ConfigError(
            f"--host-cache {config.cache.host_cache} does not fit the {size(left)} of memory that are free"
        )


def build_tiers(
    config: EngineConfig,
    opened: OpenModel,
    numerics: Numerics,
    loaded: Loaded,
    pool: PagePool,
    memory: int | None = None,
    layout: Layout = _ONE,
) -> PageKeeper:
    """The tiers that the configuration asks for. `memory`: a file in memory that outlasts this process, if any does.
    `layout`: of the ranks, which have a part of each page.

    Raises `ConfigError`.
    """
    cache, on_gpu = config.cache, loaded.facts.on_gpu
    copies = loaded.device.pages()
    page_bytes = copies.buffer(1).shape[1]
    whose, tiers = identity(config, opened, numerics, loaded, layout), dict[str, Tier]()
    if cache.host_cache is not None:
        check_tiers(config, memory, 0 if on_gpu else loaded.memory.num_pages * page_bytes)
        num_bytes = _room("--host-cache", cache.host_cache, page_bytes)
        tiers["host"] = HostTier(num_bytes, page_bytes, whose, memory)
    if cache.disk_cache is not None:
        num_bytes = _room("--disk-cache-size", cache.disk_cache_size, page_bytes)
        tiers["disk"] = DiskTier(Path(cache.disk_cache).expanduser().absolute(), num_bytes, page_bytes, whose)
    return PageKeeper(
        pool,
        copies,
        tiers,
        batch_bytes=_GPU_BATCH_BYTES if on_gpu else _CPU_BATCH_BYTES,
        num_savers=2 if on_gpu else 1,
        num_loaders=4 if on_gpu else 2,
    )


def _room(flag: str, text: str, page_bytes: int) -> int:
    num_bytes = parse_bytes(flag, text)
    if slots_in(num_bytes, page_bytes) < 1:
        raise ConfigError(f"{flag} {text} holds not even one page of {size(page_bytes)}")
    return num_bytes


def in_words(config: EngineConfig, keeper: PageKeeper) -> list[str]:
    """Each tier, its limit, and what it holds already."""
    cache, words = config.cache, []
    for kind, tier in keeper.tiers.items():
        found = f" ({size(tier.num_bytes)} found)" if tier.num_bytes else ""
        if kind == "host" and cache.host_cache is not None:
            words.append(f"{size(parse_bytes('--host-cache', cache.host_cache))} of host memory{found}")
        elif cache.disk_cache is not None:
            limit = size(parse_bytes("--disk-cache-size", cache.disk_cache_size))
            words.append(f"{limit} of {printable(cache.disk_cache)}{found}")
    return words
