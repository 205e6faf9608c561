"""How much memory the KV cache gets, and what fits into it. Plain arithmetic, printed as it is done."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ingle import cgroup
from ingle.config import EngineConfig, parse_bytes
from ingle.errors import ConfigError
from ingle.facts import size
from ingle.kv import KvSpec, longest, pages_held
from ingle.model.sizes import ModelConfig
from ingle.step import Limits

if TYPE_CHECKING:
    import torch

_GIB = 1 << 30
_CPU_DEFAULT_SHARE = 4
_CPU_DEFAULT_CAP = 4 * _GIB
_TABLES_SHARE = 16
_TABLES_BYTES = 256 << 20
"""A context of which rotations and page tables take more than both this and a share of the KV cache's memory is no
model's, and fills memory."""
_LEAST_GPU_PORTION = 512
"""Tokens that keep tensor cores busy for longer than it takes to read the weights."""
_LEAST_CPU_PORTION = 64
"""Of half as many, prompts are read a tenth slower."""


class DeviceMemory(NamedTuple):
    """Bytes of a device that are free, and that it has, before what is planned is allocated."""

    free: int | None
    """None where the system does not say."""
    total: int | None = None
    """Of a GPU, whose use is bounded by a share of it."""

    def beside(self, num_bytes: int) -> DeviceMemory:
        """What is left beside so many bytes."""
        return DeviceMemory(None if self.free is None else max(self.free - num_bytes, 0), self.total)


@dataclass(frozen=True)
class MemoryPlan:
    limits: Limits
    num_pages: int
    """Reserved page included."""
    kv_cache_bytes: int
    notices: tuple[str, ...]


def _longest_by_tables(config: EngineConfig, model: ModelConfig, budget: int, kv: KvSpec) -> int:
    """The context that tables allow where nobody asked for one: a model of a few numbers may claim any."""
    if config.max_model_len is not None:
        return config.max_model_len
    rotations = 2 * 2 * 4 * model.head_dim  # sine and cosine of two kinds of layers, float32
    # Of each slot a token, and for each group a share of a page's number.
    slots = (config.max_num_seqs or 256) * (4 + 4 * len(kv.groups) / config.cache.block_size)
    return int(max(budget / _TABLES_SHARE, _TABLES_BYTES) / (rotations + slots))


def plan_memory(
    config: EngineConfig, model: ModelConfig, kv: KvSpec, *, on_gpu: bool, budget: int, free: int | None
) -> MemoryPlan:
    """Pages and limits for `budget` bytes of KV cache.

    Raises `ConfigError` when not even a page of every layer fits, or when what was asked for is more than the `free`
    bytes.
    """
    notices = []
    max_num_batched_tokens = config.max_num_batched_tokens or (8192 if on_gpu else 512)
    max_num_seqs = config.max_num_seqs or (256 if on_gpu else 64)
    if max_num_seqs > max_num_batched_tokens:
        notices.append(
            f"max_num_seqs {max_num_seqs} -> {max_num_batched_tokens}: each sequence needs a token of a step"
        )
        max_num_seqs = max_num_batched_tokens
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        notices.append(
            f"max_model_len {max_model_len} is beyond the {model.max_position_embeddings} tokens the model was made for"
        )
    page_size, windows = config.cache.block_size, kv.windows
    page_bytes = kv.page_bytes(page_size)
    by_tables = _longest_by_tables(config, model, budget, kv)
    if by_tables < longest(windows, budget // page_bytes, page_size, max_num_batched_tokens, max_model_len):
        notices.append(
            f"max_model_len {max_model_len} -> {by_tables}: tables for more take more memory than a model of this size "
            "is worth; --max-model-len asks for more"
        )
        max_model_len = by_tables
    pages_per_seq = pages_held(windows, max_model_len, page_size, max_num_batched_tokens)
    num_useful = 1 + max_num_seqs * pages_per_seq
    num_pages = config.cache.num_gpu_blocks_override or min(budget // page_bytes, num_useful)
    capacity = longest(windows, num_pages - 1, page_size, max_num_batched_tokens, max_model_len)
    if capacity < 1:
        raise ConfigError(
            f"the KV cache gets {size(budget)} and one page takes {size(len(windows) * page_bytes)}: give it more "
            + "with "
            + ("--gpu-memory-utilization" if on_gpu else "--kv-cache-memory")
        )
    if free is not None and num_pages * page_bytes > free:
        flag = "--num-gpu-blocks-override" if config.cache.num_gpu_blocks_override else "--kv-cache-memory"
        raise ConfigError(
            f"a KV cache of {size(num_pages * page_bytes)} does not fit the {size(free)} that are "
            f"free beside the weights: give less with {flag}"
        )
    if config.cache.kv_cache_memory is not None and num_pages == num_useful < budget // page_bytes:
        notices.append(
            f"the KV cache takes {size(num_pages * page_bytes)} of {size(budget)}: {max_num_seqs} "
            f"sequences of {max_model_len} tokens need no more"
        )
    if capacity < max_model_len:
        notices.append(
            f"max_model_len {max_model_len} -> {capacity}: {num_pages - 1} pages of {page_size} tokens, "
            f"{page_bytes} bytes each, fit {size(num_pages * page_bytes)} of KV cache"
        )
        max_model_len = capacity
    limits = Limits(
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        page_size,
        config.cache.enable_prefix_caching,
        windows,
        target_itl_s=(config.target_itl_ms or 0.0) / 1e3 or None,
        least_portion=_LEAST_GPU_PORTION if on_gpu else _LEAST_CPU_PORTION,
    )
    return MemoryPlan(limits, num_pages, num_pages * page_bytes, tuple(notices))


def check_weights(num_bytes: int, memory: DeviceMemory, *, on_gpu: bool) -> None:
    """Raises `ConfigError` for weights that do not fit the memory that is free, whatever is left for all else."""
    if memory.free is None or num_bytes <= memory.free:
        return
    where = "of the GPU's memory" if on_gpu else "of memory"
    raise ConfigError(
        f"the weights take {size(num_bytes)}, and {size(memory.free)} {where} are free",
        alternative="free some, or take a smaller model, or a GGUF file of this one with fewer bits a weight"
        if not on_gpu
        else "free some, take a smaller model, or give --device cpu",
    )


def kv_budget(config: EngineConfig, model: ModelConfig, memory: DeviceMemory) -> int:
    """Bytes that the KV cache may take of what is left beside the weights. Raises `ConfigError` where that is none."""
    if config.cache.kv_cache_memory is not None:
        return parse_bytes("--kv-cache-memory", config.cache.kv_cache_memory)
    if memory.total is None:
        return _GIB if memory.free is None else min(memory.free // _CPU_DEFAULT_SHARE, _CPU_DEFAULT_CAP)
    free, total = memory.free or 0, memory.total
    budget = int(total * config.cache.gpu_memory_utilization) - (total - free) - activation_bytes(config, model)
    if budget <= 0:
        raise ConfigError(
            f"no GPU memory is left for the KV cache: {free / _GIB:.1f} of {total / _GIB:.1f} GiB are free beside the "
            f"weights, and --gpu-memory-utilization {config.cache.gpu_memory_utilization} keeps "
            f"{(1 - config.cache.gpu_memory_utilization) * total / _GIB:.1f} GiB of them; raise it, or free the GPU"
        )
    return budget


def activation_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """An upper bound on what one step allocates: its widest intermediates, and float32 logits a few times over.

    Half a GiB is for what steps keep: libraries' workspaces, and the scratch of products with coded matrices.
    """
    tokens = config.max_num_batched_tokens or 8192
    rows = min(config.max_num_seqs or 256, tokens)
    widest = model.mlp_elements_per_token + 4 * model.hidden_size + model.attention_elements_per_token
    return tokens * widest * 4 + rows * model.vocab_size * 4 * 4 + _GIB // 2


def memory_of(device: torch.device) -> DeviceMemory:
    """What is free now."""
    if device.type != "cuda":
        return host_memory()
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, total)


def host_memory() -> DeviceMemory:
    return DeviceMemory(free_host_bytes())


def free_host_bytes() -> int | None:
    """Memory that can be had without swapping: the least of what the machine, this process's control groups and its own
    limits leave, and what is left of its share. None where the system does not say, which is not Linux."""
    machine = _kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    return min(
        (free for free in (machine, cgroup.free_memory_bytes(), *_own_limits()) if free is not None), default=None
    )


def keep_to(num_bytes: int) -> None:
    """From now on this process plans with so much memory at most: others have the rest."""
    _shares[:] = [num_bytes]


_shares: list[int] = []
"""Of this process, one or none: a fact of it, like its limits."""


def _own_limits() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    status = Path("/proc/self/status")
    for limit, used_key in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        allowed, _ = resource.getrlimit(limit)
        used = _kilobytes(status, used_key)
        if allowed != resource.RLIM_INFINITY and used is not None:
            yield max(allowed - used, 0)
    for share in _shares:
        yield max(share - (_kilobytes(status, "RssAnon:") or 0), 0)


def _kilobytes(file: Path, key: str) -> int | None:
    """The number behind `key`, in bytes."""
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None
