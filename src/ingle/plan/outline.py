"""A model's outline: what its configuration and the headers of its weight files say, whether ingle runs it or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ingle.config import EngineConfig
from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig
from ingle.model.checkpoint import as_stored
from ingle.model.config_keys import check_keys
from ingle.model.count import num_parameters
from ingle.model.families.common import base_config
from ingle.model.kinds import check_head, check_kind
from ingle.model.registry import check_quantization, decoder_config, is_native
from ingle.plan.formats import Quantization, quantization_of
from ingle.weights.checked import Checked
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_source import READABLE_TYPES, GgufSource
from ingle.weights.hf_config import MAX_CONFIG_BYTES, normalize_config, read_config, read_json_object
from ingle.weights.quantized.config import read_quantization
from ingle.weights.quantized.source import QuantizedSource
from ingle.weights.safetensors_source import SafetensorsSource
from ingle.weights.source import WeightSource

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model", "dim", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("multi_query_group_num", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "intermediate_size": ("ffn_hidden_size", "n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "seq_length", "max_seq_len", "n_ctx"),
    "vocab_size": ("padded_vocab_size",),
}
"""What models outside ingle's families call what most call by the first name."""


@dataclass(frozen=True)
class Outline:
    path: Path
    decoder: DecoderConfig
    torch_dtype: str | None
    """The type that the configuration says its weights have."""
    quantization: Quantization | None
    """How a folder's weights are quantized; a GGUF file's types say so themselves."""
    hf_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    stored_types: Mapping[str, int] = field(default_factory=dict)
    """Numbers stored in each type, the most first; empty without weight files."""
    stored_bytes: int | None = None
    """Of all tensors in the weight files."""
    files: str = "no weight files"
    refusals: tuple[str, ...] = ()
    """Why ingle does not run the model, whatever the machine."""
    notices: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.decoder)

    @property
    def is_native(self) -> bool:
        """Whether one of ingle's own families."""
        return is_native(self.hf_config)

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"


def read_outline(path: Path, config: EngineConfig) -> Outline:
    """Of a Hugging Face folder, of its config.json alone, or of a GGUF file; weight files may be holes but for their
    headers and the beginnings of their tensors.

    Raises `ModelError` for files that cannot be read, or do not describe a decoder.
    """
    gguf = GgufFile(path, texts=False) if path.is_file() and path.suffix.lower() != ".json" else None
    hf_config = _read_config(path, gguf, config)
    refusals, notices = _Collected(), []
    for check in (check_kind, check_quantization):
        refusals.note(lambda check=check: check(path, hf_config))  # type: ignore[misc]
    if is_native(hf_config):
        notices += refusals.note(lambda: check_keys(hf_config)) or []
        decoder = decoder_config(hf_config)
    else:
        decoder = _other_decoder(path, hf_config)
        if gguf is None:
            notices.append(
                f"model_type {hf_config['model_type']!r} is none of ingle's families: transformers' code runs it if it "
                "has any, and its sizes are those of a usual decoder"
            )
    quantization = quantization_of(hf_config)
    outline = Outline(path, decoder, hf_config["torch_dtype"], quantization, hf_config)
    if config.weights.load_format != "dummy":
        outline = _with_files(outline, hf_config, gguf, refusals, notices)
    return replace(outline, refusals=tuple(refusals.told), notices=tuple(notices))


class _Collected:
    """Refusals, all of them."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, check: Callable[[], list[str] | None]) -> list[str] | None:
        try:
            return check()
        except ModelError as error:
            self.told.append(str(error))
            return None


def _read_config(path: Path, gguf: GgufFile | None, config: EngineConfig) -> dict[str, Any]:
    rope = {"rope_scaling": config.weights.rope_override(), "rope_theta": config.weights.rope_theta}
    if gguf is not None or path.is_dir():
        return read_config(path, gguf=gguf, **rope)  # type: ignore[arg-type]
    return normalize_config(path, read_json_object(path, MAX_CONFIG_BYTES), **rope)  # type: ignore[arg-type]


def _other_decoder(path: Path, hf_config: dict[str, Any]) -> DecoderConfig:
    """The sizes of a model of another family, as far as it names them like others do."""
    inner = hf_config.get("text_config")
    values = {**hf_config, **inner} if isinstance(inner, dict) and "hidden_size" not in hf_config else dict(hf_config)
    for name, others in _OTHER_NAMES.items():
        found = next((values[other] for other in others if values.get(other) is not None), None)
        if values.get(name) is None and found is not None:
            values[name] = found
    values = {key: value for key, value in values.items() if key != "rope_scaling"}
    hidden = values.get("hidden_size")
    if values.get("intermediate_size") is None and type(hidden) is int:
        values["intermediate_size"] = 4 * hidden
    return base_config(Checked(values, str(path)), str(hf_config["model_type"]), activation="silu")


def _with_files(
    outline: Outline,
    hf_config: dict[str, Any],
    gguf: GgufFile | None,
    refusals: _Collected,
    notices: list[str],
) -> Outline:
    path = outline.path
    if gguf is not None:
        types = gguf.parameters_by_type
        if unread := [kind for kind in types if kind not in READABLE_TYPES]:
            refusals.told.append(f"{path}: stores tensors as {', '.join(unread)}, which ingle does not read")
        outline = replace(
            outline, stored_types=types, stored_bytes=sum(each.nbytes for each in gguf.tensors.values()), files="GGUF"
        )
        return _as_stored(outline, hf_config, GgufSource(gguf), refusals=refusals, notices=notices)
    if path.is_dir() and SAFETENSORS_FILES.are_in(path):
        with contextlib.closing(SafetensorsSource(path)) as source:
            outline = replace(
                outline,
                stored_types=_stored_types(source, path, hf_config),
                stored_bytes=sum(file.stat().st_size for file in source.paths),
                files="safetensors",
            )
            if outline.quantization is not None:
                return outline
            return _as_stored(outline, hf_config, source, refusals=refusals, notices=notices)
    if path.is_dir() and TORCH_FILES.are_in(path):
        if outline.quantization is not None:
            refusals.told.append(f"{path}: quantized weights are read from safetensors alone, and these are PyTorch's")
        return _torch_files(outline)
    return outline


def _stored_types(files: SafetensorsSource, path: Path, hf_config: dict[str, Any]) -> dict[str, int]:
    """Numbers in each type, of codes those that they stand for; why such are not read is told elsewhere."""
    with contextlib.suppress(ModelError):
        quantization = read_quantization(path, hf_config)
        if quantization is not None:
            return QuantizedSource(files, quantization).stored_types
    return files.stored_types


def _as_stored(
    outline: Outline,
    hf_config: dict[str, Any],
    source: WeightSource,
    *,
    refusals: _Collected,
    notices: list[str],
) -> Outline:
    """With what the checkpoint has where the configuration says otherwise."""
    decoder = outline.decoder
    refusals.note(lambda: check_head(outline.path, hf_config, source, decoder.names.lm_head))
    if not is_native(hf_config):
        return outline
    decoder, told = as_stored(decoder, source)
    notices += told
    return replace(outline, decoder=decoder)


def _torch_files(outline: Outline) -> Outline:
    """Their headers are pickles at their ends: sizes say enough."""
    files = [outline.path / name for name in TORCH_FILES.names_in(outline.path)]
    total = sum(file.stat().st_size for file in files)
    per_number = total / outline.num_parameters
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(outline.torch_dtype or "", "F16") if per_number < 3 else "F32"
    stored = {} if outline.quantization is not None else {kind: outline.num_parameters}
    return replace(outline, stored_types=stored, stored_bytes=total, files="PyTorch .bin")
