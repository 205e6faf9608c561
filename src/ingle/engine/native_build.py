"""Loads a model onto the native CPU device, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.native.load import load_native_decoder
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import MemoryPlan, check_weights, host_memory, kv_budget, plan_memory
from ingle.engine.startup import Loaded, Numerics, OpenModel, Startup
from ingle.kernels.cpu import library
from ingle.kv import cache_dtype
from ingle.model.architecture import DecoderConfig
from ingle.weights.code_types import CODE_TYPES, CodeType, exact, kept, kept_for_bytes
from ingle.weights.quantized.source import CODED_BYTES

_KV_TYPES = {
    "auto": "float16",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""By the type that the user wants, the KV cache's. Matrices are kept as they are stored, but for float32, which is
exact."""


def code_type_of(config: EngineConfig) -> Callable[[str], CodeType]:
    """How a matrix is held whose type in the checkpoint is given."""
    if _KV_TYPES[config.weights.dtype] == "float32":
        return exact
    return kept_for_bytes if rounds(config) else kept


def rounds(config: EngineConfig) -> bool:
    """Whether activations lose more than 16-bit numbers do."""
    return config.parallel.cpu_activations == "int8" and _KV_TYPES[config.weights.dtype] != "float32"


def numerics(config: EngineConfig) -> Numerics:
    dtype = _KV_TYPES[config.weights.dtype]
    is_exact = dtype == "float32"
    return Numerics(
        dtype=dtype,
        kv_dtype=cache_dtype(config.cache.kv_cache_dtype, dtype),
        product_dtype="float32" if is_exact else "bfloat16",
        float_itemsize=4 if is_exact else 2,
        kept_types=frozenset() if is_exact else frozenset((*CODE_TYPES, *CODED_BYTES)),
        kernels=f"ingle's for {library.instructions()}" if library.started() else "ingle's",
    )


def plan(config: EngineConfig, model: OpenModel, decoder: DecoderConfig, numerics: Numerics) -> MemoryPlan:
    """By what is free now. Raises `ConfigError` when that is too little."""
    free, weight_bytes = host_memory(), numerics.weight_bytes(decoder, model.stored_types)
    check_weights(weight_bytes, free, on_gpu=False)
    left, kv = free.beside(weight_bytes), decoder.kv_spec(numerics.kv_dtype)
    budget = kv_budget(config, decoder, left)
    return plan_memory(config, decoder, kv, on_gpu=False, budget=budget, free=left.free)


def load(
    config: EngineConfig, opened: OpenModel, decoder: DecoderConfig, numerics: Numerics, startup: Startup
) -> Loaded:
    """Plans memory, reads the weights, and allocates the KV cache."""
    memory = plan(config, opened, decoder, numerics)
    stage = f"loading weights of {decoder.family} on cpu"
    with startup.phase("weights", stage):
        model = load_native_decoder(
            decoder,
            opened.source,
            memory.limits.max_model_len,
            code_type_of(config),
            startup.counter(stage, decoder.num_layers),
            rounds=rounds(config),
        )
    library.settle_memory()
    with startup.phase("kv_cache", "allocating the KV cache"):
        device = NativeDevice(model, memory.limits, memory.num_pages, numerics.kv_dtype)
    facts = EngineFacts(decoder, model.sizes(), on_gpu=False, kv=decoder.kv_spec(numerics.kv_dtype))
    return Loaded(device, "cpu", facts, memory, opened.stored_types, model.factors)
