"""What `build` brings together for models that PyTorch runs: on a GPU, by transformers' code, or as asked for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ingle.config import EngineConfig
from ingle.device.kernel_choice import multiplies_bfloat16
from ingle.device.torch.device import TorchDevice
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import free_bytes, kv_budget, plan_memory, wanted_length
from ingle.engine.parts import Parts, Startup
from ingle.errors import ConfigError
from ingle.kernels.cpu import library, threads
from ingle.model.architecture import DecoderConfig
from ingle.model.checkpoint import as_stored
from ingle.model.decoder import Decoder
from ingle.model.fallback import FallbackPlan, load_fallback, plan_fallback
from ingle.model.interface import Model
from ingle.model.kinds import check_head
from ingle.model.load import load_decoder
from ingle.model.sizes import WeightSizes
from ingle.weights.formats import PlainFormat, total_size
from ingle.weights.gguf import GgufFile
from ingle.weights.source import WeightSource, open_source

_DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


def build_parts(
    config: EngineConfig,
    path: Path,
    gguf: GgufFile | None,
    decoder: DecoderConfig | None,
    hf_config: dict[str, Any],
    device_type: str,
    startup: Startup,
) -> Parts:
    """`gguf` is the file at `path` if it is one.

    `decoder` is the model as one of ingle's own families; None leaves it to transformers' code.
    """
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.threads or threads.default_count())
    plan = decoder if decoder is not None else _plan_fallback(config, path, hf_config)
    dtype, dtype_notices = pick_dtype(config, hf_config, device)
    with startup.phase("weights", f"loading weights of {plan.family} on {device}"):
        source = open_source(path, config.load_format, config.seed, gguf=gguf)
        with contextlib.closing(source):
            check_head(path, hf_config, source, "lm_head" if decoder is None else decoder.names.lm_head)
            stored_types = source.stored_types
            model, stored_notices = _load(config, plan, source, dtype, device)
    if device.type == "cpu" and library.started():
        library.settle_memory()
    with startup.phase("kv_cache", "allocating the KV cache"):
        on_gpu, budget = device.type == "cuda", kv_budget(config, model.config, device)
        memory = plan_memory(
            config,
            model.config,
            kv_itemsize=dtype.itemsize,
            on_gpu=on_gpu,
            budget=budget,
            free=free_bytes(device),
        )
        if isinstance(model, Decoder) and memory.limits.max_model_len < model.max_model_len:
            model = model.with_length(memory.limits.max_model_len)
        runs_on = TorchDevice(
            model, memory.limits, memory.num_pages, device, dtype,
            use_graphs=on_gpu and not config.enforce_eager,
        )  # fmt: skip
    return Parts(
        runs_on=runs_on,
        facts=EngineFacts(model.config, _sizes(model), on_gpu=on_gpu, kv_itemsize=dtype.itemsize),
        memory=memory,
        stored_types=stored_types,
        kept_types=frozenset(),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=_name(dtype),
        product_dtype=_name(dtype),
        factors=frozenset((_name(dtype),)),
        kernels=_kernels(config, device, dtype),
        notices=(
            *((plan.notice, *plan.unknown_keys) if isinstance(plan, FallbackPlan) else ()),
            *stored_notices,
            *dtype_notices,
        ),
    )


def _plan_fallback(config: EngineConfig, path: Path, hf_config: dict[str, Any]) -> FallbackPlan:
    if config.rope_scaling is not None or config.rope_theta is not None:
        raise ConfigError(
            f"--rope-scaling and --rope-theta: model_type {hf_config['model_type']!r} is run by transformers' code, "
            "which they do not reach; write rope_scaling or rope_theta into its config.json"
        )
    return plan_fallback(path, hf_config, trust_remote_code=config.trust_remote_code)


def _load(
    config: EngineConfig,
    plan: DecoderConfig | FallbackPlan,
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Model, list[str]]:
    """The model, and what to tell the user of it."""
    if isinstance(plan, FallbackPlan):
        seed = config.seed if config.load_format == "dummy" else None
        return load_fallback(plan, dtype=dtype, device=device, max_model_len=config.max_model_len, dummy_seed=seed)
    plan, notices = as_stored(plan, source)
    length = wanted_length(config, plan, kv_budget(config, plan, device), dtype.itemsize)
    matrices = PlainFormat(dtype, device)
    return load_decoder(plan, source, matrices=matrices, dtype=dtype, device=device, max_model_len=length), notices


def _kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Whose run, for people."""
    if device.type == "cuda":
        return "PyTorch's and Triton's"
    beside = config.cpu_kernels == "auto" and library.started() and dtype == torch.float32
    return "PyTorch's and ingle's" if beside else "PyTorch's"


def _sizes(model: Model) -> WeightSizes:
    head, embedding = model.head, model.embedding
    return WeightSizes(
        total=total_size(model.parameters()),
        head=total_size([head]),
        looked_up=total_size([] if embedding is head else [embedding]),
        mixture=model.mixture,
    )


def pick_dtype(config: EngineConfig, hf_config: dict[str, Any], device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The type to compute in, and what to tell the user about it."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype], []
    stored = _DTYPES.get(str(hf_config.get("torch_dtype")), torch.bfloat16)
    if device.type == "cuda":
        if stored != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0):
            return (torch.bfloat16 if stored == torch.float32 else stored), []
        return torch.float16, ["dtype bfloat16 -> float16: this GPU does not compute bfloat16"]
    if multiplies_bfloat16():
        return torch.bfloat16, []
    if stored == torch.float32:
        return torch.float32, []
    return torch.float32, [f"dtype {_name(stored)} -> float32: this CPU does not multiply it natively"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
