"""Loads a model onto the native CPU device, without PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.native.load import load_native_decoder
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import host_memory, kv_budget, plan_memory
from ingle.engine.startup import Loaded, ModelFiles, Numerics, Startup
from ingle.kernels.cpu import library
from ingle.model.architecture import DecoderConfig
from ingle.model.checkpoint import as_stored
from ingle.model.kinds import check_head
from ingle.weights.code_types import CODE_TYPES, CodeType, exact, kept

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
    return exact if _KV_TYPES[config.weights.dtype] == "float32" else kept


def numerics(config: EngineConfig) -> Numerics:
    kv_dtype = _KV_TYPES[config.weights.dtype]
    is_exact = kv_dtype == "float32"
    return Numerics(
        kv_dtype=kv_dtype,
        product_dtype="float32" if is_exact else "bfloat16",
        float_itemsize=4 if is_exact else 2,
        kept_types=frozenset() if is_exact else frozenset(CODE_TYPES),
        kernels=f"ingle's for {library.instructions()}" if library.started() else "ingle's",
    )


def load(
    config: EngineConfig, files: ModelFiles, decoder: DecoderConfig, numerics: Numerics, startup: Startup
) -> Loaded:
    """Plans memory, reads the weights, and allocates the KV cache."""
    with contextlib.closing(files.open(config)) as source:
        check_head(files.path, files.hf_config, source, decoder.names.lm_head)
        decoder, notices = as_stored(decoder, source)
        stored_types = source.stored_types
        left = host_memory().beside(numerics.weight_bytes(decoder, stored_types))
        kv = decoder.kv_spec(numerics.kv_dtype)
        budget = kv_budget(config, decoder, left)
        memory = plan_memory(config, decoder, kv, on_gpu=False, budget=budget, free=left.free)
        with startup.phase("weights", f"loading weights of {decoder.family} on cpu"):
            model = load_native_decoder(decoder, source, memory.limits.max_model_len, code_type_of(config))
    library.settle_memory()
    with startup.phase("kv_cache", "allocating the KV cache"):
        device = NativeDevice(model, memory.limits, memory.num_pages, numerics.kv_dtype)
    facts = EngineFacts(decoder, model.sizes(), on_gpu=False, kv=kv)
    return Loaded(device, "cpu", facts, memory, stored_types, model.factors, tuple(notices))
