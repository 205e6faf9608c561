"""How much memory the KV cache gets, and what fits into it. Plain arithmetic, printed as it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ingle.config import EngineConfig, parse_bytes
from ingle.engine.scheduler import Limits
from ingle.errors import ConfigError
from ingle.model.sizes import ModelConfig

if TYPE_CHECKING:
    import torch

_GIB = 1 << 30
_CPU_DEFAULT_SHARE = 4
_CPU_DEFAULT_CAP = 4 * _GIB


@dataclass(frozen=True)
class MemoryPlan:
    limits: Limits
    num_pages: int
    """Reserved page included."""
    kv_cache_bytes: int
    notices: tuple[str, ...]


def wanted_length(config: EngineConfig, model: ModelConfig, budget: int, kv_itemsize: int) -> int:
    """The longest sequence, as far as that is known before the weights are loaded: some tables are made for it.

    Whatever the model claims, it is not longer than a KV cache of all the memory that is left now.
    """
    length = config.max_model_len or model.max_position_embeddings
    if config.num_gpu_blocks_override is not None:
        return length
    return max(min(length, budget // (model.kv_elements_per_token * kv_itemsize)), 1)


def plan_memory(config: EngineConfig, model: ModelConfig, *, kv_itemsize: int, on_gpu: bool, budget: int) -> MemoryPlan:
    """Pages and limits for `budget` bytes of KV cache, whose numbers take `kv_itemsize` bytes each.

    Raises `ConfigError` when not even one page per step fits.
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
    page_size = config.block_size
    page_bytes = page_size * model.kv_elements_per_token * kv_itemsize
    pages_per_seq = -(-max_model_len // page_size)
    num_pages = config.num_gpu_blocks_override or min(budget // page_bytes, 1 + max_num_seqs * pages_per_seq)
    if num_pages < 2:
        raise ConfigError(
            f"the KV cache gets {budget / _GIB:.2f} GiB and one page takes {page_bytes / _GIB:.3f} GiB: give it more "
            + "with "
            + ("--gpu-memory-utilization" if on_gpu else "--kv-cache-memory")
        )
    capacity = (num_pages - 1) * page_size
    if capacity < max_model_len:
        notices.append(
            f"max_model_len {max_model_len} -> {capacity}: {num_pages - 1} pages of {page_size} tokens, "
            f"{page_bytes} bytes each, fit {num_pages * page_bytes / _GIB:.2f} GiB of KV cache"
        )
        max_model_len = capacity
    limits = Limits(max_num_seqs, max_num_batched_tokens, max_model_len, page_size, config.enable_prefix_caching)
    return MemoryPlan(limits, num_pages, num_pages * page_bytes, tuple(notices))


def host_kv_budget(config: EngineConfig) -> int:
    """Bytes the KV cache may take in a CPU's memory."""
    if config.kv_cache_memory is not None:
        return parse_bytes("--kv-cache-memory", config.kv_cache_memory)
    return min(available_host_bytes() // _CPU_DEFAULT_SHARE, _CPU_DEFAULT_CAP)


def kv_budget(config: EngineConfig, model: ModelConfig, device: torch.device) -> int:
    """Bytes the KV cache may take on a device, asked once the weights are loaded."""
    if config.kv_cache_memory is not None or device.type != "cuda":
        return host_kv_budget(config)
    free, total = _gpu_memory(device)
    budget = int(total * config.gpu_memory_utilization) - (total - free) - _activation_bytes(config, model)
    if budget <= 0:
        raise ConfigError(
            f"no GPU memory is left for the KV cache: {free / _GIB:.1f} of {total / _GIB:.1f} GiB are free with the "
            f"weights loaded, and --gpu-memory-utilization {config.gpu_memory_utilization} keeps "
            f"{(1 - config.gpu_memory_utilization) * total / _GIB:.1f} GiB of them; raise it, or free the GPU"
        )
    return budget


def _activation_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """An upper bound on what one step allocates: its widest intermediates, and float32 logits a few times over."""
    tokens = config.max_num_batched_tokens or 8192
    rows = min(config.max_num_seqs or 256, tokens)
    widest = model.mlp_elements_per_token + 4 * model.hidden_size + 2 * model.q_size + 2 * model.kv_size
    return tokens * widest * 4 + rows * model.vocab_size * 4 * 4 + _GIB // 2


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free now."""
    return _gpu_memory(device)[0] if device.type == "cuda" else available_host_bytes()


def _gpu_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes."""
    import torch

    return torch.cuda.mem_get_info(device)


def available_host_bytes() -> int:
    """Memory that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _CPU_DEFAULT_SHARE * _GIB  # not Linux: a modest cache, to be raised with --kv-cache-memory
