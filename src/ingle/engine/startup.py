"""What a start goes through: files that are read, types that are chosen, a model that is loaded on its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingle.config import EngineConfig
from ingle.device import Device
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import MemoryPlan
from ingle.kv import ITEMSIZES
from ingle.model.architecture import DecoderConfig
from ingle.model.config_keys import check_keys
from ingle.model.count import num_parameters
from ingle.model.kinds import check_kind
from ingle.model.registry import decoder_config, is_native, refuse_quantized
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from ingle.weights.open import open_source
from ingle.weights.source import WeightSource


@dataclass
class Startup:
    """Reports phases as they begin and keeps their seconds."""

    report: Callable[[str], None]
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, stage: str) -> Iterator[None]:
        self.report(stage)
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class ModelFiles:
    """A model that was looked at and not loaded."""

    path: Path
    gguf: GgufFile | None
    """The file at `path` if it is one."""
    hf_config: dict[str, Any]
    decoder: DecoderConfig | None
    """The model as one of ingle's own families; None leaves it to transformers' code."""
    notices: tuple[str, ...]

    @classmethod
    def read(cls, config: EngineConfig, path: Path) -> ModelFiles:
        """Raises `ModelError` for what ingle does not run."""
        gguf = None if path.is_dir() else GgufFile(path, texts=False)
        hf_config = read_config(
            path, gguf=gguf, rope_scaling=config.weights.rope_override(), rope_theta=config.weights.rope_theta
        )
        check_kind(path, hf_config)
        refuse_quantized(path, hf_config)
        decoder = decoder_config(hf_config) if is_native(hf_config) else None
        return cls(path, gguf, hf_config, decoder, () if decoder is None else tuple(check_keys(hf_config)))

    def open(self, config: EngineConfig) -> WeightSource:
        return open_source(self.path, config.weights.load_format, config.seed, gguf=self.gguf)


@dataclass(frozen=True)
class Numerics:
    """What is stored, held and computed in which type, by name."""

    kv_dtype: str
    product_dtype: str
    """The coarsest type to which factors of matrix products may be rounded."""
    float_itemsize: int
    """Bytes of a weight that is not held as it is stored."""
    kept_types: frozenset[str]
    """The quantized types that are held as they are stored."""
    kernels: str
    """What multiplies and attends, for people."""
    notices: tuple[str, ...] = ()

    @classmethod
    def of_floats(cls, dtype: str, kernels: str, notices: Sequence[str] = ()) -> Numerics:
        """All in one type, a key of `ITEMSIZES`."""
        return cls(dtype, dtype, ITEMSIZES[dtype], frozenset(), kernels, tuple(notices))

    def weight_bytes(self, config: DecoderConfig, stored_types: Mapping[str, int]) -> int:
        """That a model takes whose checkpoint stores so many numbers in each type; nothing is known of made-up ones."""
        total = sum(stored_types.values())
        per_number = sum(count * self._itemsize(kind) for kind, count in stored_types.items())
        return int(num_parameters(config) * (per_number / total if total else self.float_itemsize))

    def _itemsize(self, kind: str) -> float:
        if kind not in self.kept_types:
            return self.float_itemsize
        code = CODE_TYPES[kind]
        scales = (4 if code.wide_scales else 2) * (1 + code.has_minima)
        return code.bits / 8 + scales / code.group_size


def dtype_on_gpu(wanted: str, stored: str | None, *, computes_bfloat16: bool) -> tuple[str, list[str]]:
    """The type to compute in for what the user wants and what the configuration says, and what to tell of it.

    A GPU computes bfloat16 from compute capability 8.0 on.
    """
    if wanted != "auto":
        return {"half": "float16", "float": "float32"}.get(wanted, wanted), []
    if stored == "float16" or computes_bfloat16:
        return "float16" if stored == "float16" else "bfloat16", []
    return "float16", ["dtype bfloat16 -> float16: this GPU does not compute bfloat16"]


@dataclass(frozen=True)
class Loaded:
    """A model on its device."""

    device: Device
    device_name: str
    facts: EngineFacts
    memory: MemoryPlan
    stored_types: dict[str, int]
    """Numbers that the checkpoint stores in each type."""
    factors: frozenset[str]
    """The types that factors of matrix products have."""
    notices: tuple[str, ...] = ()
