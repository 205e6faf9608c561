"""What a start goes through: files that are read, types that are chosen, a model that is loaded on its device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingle.config import EngineConfig
from ingle.device import Device
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import MemoryPlan
from ingle.errors import Collected, ConfigError
from ingle.kv import ITEMSIZES
from ingle.model.architecture import DecoderConfig
from ingle.model.checkpoint import as_stored
from ingle.model.config_keys import check_keys
from ingle.model.count import num_parameters
from ingle.model.kinds import check_head, check_kind
from ingle.model.mixture_names import mixture_names
from ingle.model.registry import check_quantization, decoder_config, is_native
from ingle.model.rounding import TARGETS, plan_rounding
from ingle.model.tensors import check_tensors
from ingle.pooling import ModelPooling, gguf_pooling
from ingle.weights.code_types import BITS_ON_GPU, CODE_TYPES
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import config_file, normalize_config, read_raw
from ingle.weights.open import open_source
from ingle.weights.quantized.config import cache_made_for
from ingle.weights.quantized.flag import check_flag
from ingle.weights.quantized.rounding_source import RoundingPlan, RoundingSource
from ingle.weights.quantized.scheme import Quantization, Target
from ingle.weights.quantized.source import CODED_BYTES
from ingle.weights.source import WeightSource

if TYPE_CHECKING:
    from ingle.model.fallback import FallbackPlan

_REPORT_S = 0.5
"""Between two words on how far a stage is."""
_PUBLISHED = "take the file as the model's makers published it"


@dataclass
class Startup:
    """Reports phases as they begin and keeps their seconds."""

    report: Callable[[str], None]
    timings_s: dict[str, float] = field(default_factory=dict)
    meanwhile: Callable[[], None] = lambda: None
    """Called between parts of a phase: what it raises ends the start."""

    @contextmanager
    def phase(self, name: str, stage: str) -> Iterator[None]:
        self.report(stage)
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 3)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """To be told how much of `total` is done, from any thread; reports that now and then, as `STAGE: 40 %`."""
        told_s = time.monotonic()

        def count(done: int) -> None:
            nonlocal told_s
            self.meanwhile()
            now_s = time.monotonic()
            if now_s - told_s >= _REPORT_S:
                told_s = now_s
                self.report(f"{stage}: {100 * done // max(total, 1)} %")

        return count


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
    pooling: ModelPooling | None = None
    """Of a model that makes vectors of texts and writes none."""
    quantization: Quantization | None = None
    """How a folder's weights are quantized; a GGUF file's types say so themselves."""
    rounded_to: Target | None = None
    """What a folder's floats become."""

    @classmethod
    def read(cls, config: EngineConfig, path: Path) -> ModelFiles:
        """Raises `ModelError` for what ingle does not run."""
        found = Collected()
        files = cls.looked_at(config, path, found)
        found.raise_any()
        assert files is not None, "nothing was refused"
        return files

    @classmethod
    def looked_at(cls, config: EngineConfig, path: Path, found: Collected) -> ModelFiles | None:
        """None where what is `found` leaves nothing to go on with; otherwise what else is wrong can be looked for."""
        gguf = raw = hf_config = decoder = pooling = quantization = rounded_to = None
        notices: tuple[str, ...] = ()
        with found.apart():
            gguf = None if path.is_dir() else GgufFile(path, texts=False)
            raw = read_raw(path, gguf)
        if raw is None:
            return None
        override, theta = config.weights.rope_override(), config.weights.rope_theta
        with found.apart():
            hf_config = normalize_config(config_file(path), raw, rope_scaling=override, rope_theta=theta)
        if hf_config is None and (override is not None or theta is not None):  # which hides all else that is wrong
            with found.apart():
                hf_config = normalize_config(config_file(path), raw)
        said = raw if hf_config is None else hf_config
        with found.apart():
            pooling = check_kind(path, said) if gguf is None else gguf_pooling(gguf.metadata)
        with found.apart():
            quantization = check_quantization(path, said) if gguf is None else None
            rounded_to = check_flag(config.weights.quantization, path, quantization)
        if hf_config is None:
            return None
        if is_native(hf_config):
            with found.apart(_PUBLISHED):
                decoder = decoder_config(hf_config)
            with found.apart():
                notices = tuple(check_keys(hf_config))
            if decoder is None:
                return None
        elif rounded_to is not None:
            with found.apart("leave the flag out"):
                raise ConfigError(
                    f"--quantization {config.weights.quantization}: model_type {hf_config['model_type']!r} is run by "
                    "transformers' code, for which no weights are rounded"
                )
        notices += _cache_notices(config, None if gguf is not None else cache_made_for(path, hf_config))
        return cls(path, gguf, hf_config, decoder, notices, pooling, quantization, rounded_to)

    def open(self, config: EngineConfig) -> WeightSource:
        load_format = config.weights.load_format
        return open_source(self.path, load_format, config.seed, gguf=self.gguf, quantization=self.quantization)

    def opened(self, config: EngineConfig) -> OpenModel:
        """With the files of its weights, whose headers say whether they hold all that it needs.

        Raises `ModelError` and `ConfigError`.
        """
        with contextlib.ExitStack() as undo:
            source = undo.enter_context(contextlib.closing(self.open(config)))
            names = None if self.decoder is None else self.decoder.names
            if self.pooling is None:
                check_head(self.path, self.hf_config, source, "lm_head" if names is None else names.lm_head)
            decoder, notices = (None, []) if self.decoder is None else as_stored(self.decoder, source)
            if decoder is not None:
                check_tensors(decoder, source)
            rounding = None
            if decoder is not None and self.rounded_to is not None:
                rounding = plan_rounding(decoder, source, TARGETS[self.rounded_to])
                source = RoundingSource(source, rounding)
                notices = [*notices, *rounding.notices]
            undo.pop_all()
        types = source.stored_types
        if decoder is not None and config.weights.load_format == "dummy":
            types = _made_up(decoder, source, rounding)
        return OpenModel(self, source, decoder, types, (*self.notices, *notices), rounding=rounding)


def _made_up(decoder: DecoderConfig, source: WeightSource, rounding: RoundingPlan | None) -> dict[str, int]:
    """What is known of the types of weights that nothing is read for: nothing where all are floats."""
    types, moe = source.stored_types, decoder.moe
    if rounding is not None:
        return {**types, "BF16": max(num_parameters(decoder) - rounding.num_rounded, 0)}
    if moe is None or not source.is_coded(mixture_names(source, moe, decoder.names.layers).experts[0].down):
        return types
    coded = 3 * len(moe.layers) * moe.router.num_experts * moe.intermediate_size * decoder.hidden_size
    return {"mxfp4": coded, "BF16": num_parameters(decoder) - coded}


def _cache_notices(config: EngineConfig, made_for: str | None) -> tuple[str, ...]:
    """Of a checkpoint that was made for keys and values of few bits, which nobody has unasked."""
    if made_for is None:
        return ()
    own = "with a scale for each token in place of the checkpoint's"  # which is at least as exact
    held = config.cache.kv_cache_dtype
    if held.startswith(("fp8", "int8")):
        return (f"keys and values are held as {held}, {own}",)
    offered = made_for if made_for in ("fp8", "int8") else "fp8"
    return (f"the checkpoint is made for keys and values as {made_for}: --kv-cache-dtype {offered} holds them {own}",)


@dataclass(frozen=True)
class OpenModel:
    """A model whose files hold what it needs. Whoever has it closes it."""

    files: ModelFiles
    source: WeightSource
    decoder: DecoderConfig | None
    """As the checkpoint has it; None leaves it to transformers' code."""
    stored_types: dict[str, int]
    """Numbers that the checkpoint stores in each type; none of made-up ones."""
    notices: tuple[str, ...]
    fallback: FallbackPlan | None = None
    """How transformers' code runs it."""
    rounding: RoundingPlan | None = None
    """What of it is rounded while it is loaded; `source` does so."""

    def close(self) -> None:
        self.source.close()


@dataclass(frozen=True)
class Numerics:
    """What is stored, held and computed in which type, by name."""

    dtype: str
    """Of activations, a key of `ITEMSIZES`; where others are computed with, of keys and values that are no codes."""
    kv_dtype: str
    """Of cached keys and values, as `ingle.kv.KvSpec` has it."""
    product_dtype: str
    """The coarsest type to which factors of matrix products may be rounded."""
    float_itemsize: int
    """Bytes of a weight that is not held as it is stored."""
    kept_types: frozenset[str]
    """The quantized types that are held as they are stored."""
    kernels: str
    """What multiplies and attends, for people."""
    notices: tuple[str, ...] = ()
    held_bits: Mapping[str, float] = field(default_factory=dict)
    """That a number of a kept type takes, where it is not held as the CPU's kernels do."""

    @classmethod
    def of_floats(cls, dtype: str, kv_dtype: str, kernels: str, notices: Sequence[str] = ()) -> Numerics:
        """All in one type, a key of `ITEMSIZES`, but for codes with scales."""
        return cls(dtype, kv_dtype, dtype, ITEMSIZES[dtype], frozenset(CODED_BYTES), kernels, tuple(notices))

    def keeping_blocks(self) -> Numerics:
        """With GGUF's blocks held as products on a GPU take them."""
        return replace(self, kept_types=self.kept_types | BITS_ON_GPU.keys(), held_bits=BITS_ON_GPU)

    def weight_bytes(self, config: DecoderConfig, stored_types: Mapping[str, int]) -> int:
        """That a model takes whose checkpoint stores so many numbers in each type; nothing is known of made-up ones."""
        total = sum(stored_types.values())
        per_number = sum(count * self._itemsize(kind) for kind, count in stored_types.items())
        return int(num_parameters(config) * (per_number / total if total else self.float_itemsize))

    def _itemsize(self, kind: str) -> float:
        if kind not in self.kept_types:
            return self.float_itemsize
        if kind in self.held_bits:
            return self.held_bits[kind] / 8
        if kind in CODED_BYTES:
            return CODED_BYTES[kind]
        return CODE_TYPES[kind].bytes_each


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
