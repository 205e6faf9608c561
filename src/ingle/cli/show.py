"""`ingle show`: what a model is, read from its files without loading it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle import facts
from ingle.cli.flags import parse
from ingle.errors import printable
from ingle.hub.resolve import ModelSource, resolve_model

_MAX_CHARS = 4096
"""Of a fact: a path is no longer."""


@dataclass(frozen=True)
class Show:
    """Show what a model is, read from its files without loading it."""

    model: str
    """Short name of a stored model, a Hugging Face model folder, or a .gguf file."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Show, argv, command="show")
    source = resolve_model(flags.model)
    facts = {"model": source.name, **(_gguf(source) if source.kind == "gguf" else _folder(source))}
    facts["path"] = str(source.path)
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {printable(value[:_MAX_CHARS])}")


def _gguf(source: ModelSource) -> dict[str, str]:
    from ingle.text.load import default_sampling
    from ingle.weights.gguf import GgufFile
    from ingle.weights.gguf_hf import ARCHITECTURES

    file = GgufFile(source.path)
    architecture = str(file.metadata.get("general.architecture", "unknown"))
    known = ARCHITECTURES.get(architecture)
    return {
        "architecture": architecture,
        "family": known.model_type if known is not None else "unknown to ingle",
        "parameters": facts.count(file.num_parameters),
        "stored as": facts.types(file.parameters_by_type),
        "context": f"{file.metadata.get(f'{architecture}.context_length', 'unknown')} tokens",
        "chat template": _yes_no("tokenizer.chat_template" in file.metadata),
        "sampling": facts.sampling_defaults(default_sampling(source.path)),
        "size": _size([source.path]),
    }


def _folder(source: ModelSource) -> dict[str, str]:
    from ingle.text.folder_tokenizer import folder_chat_template
    from ingle.text.load import default_sampling
    from ingle.weights.hf_config import read_config

    config = read_config(source.path)
    stored, weights = _stored(source.path)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    architectures = config.get("architectures")
    return {
        "architecture": str(architectures[0] if isinstance(architectures, list) and architectures else "unknown"),
        "family": _family(config),
        "parameters": facts.count(sum(stored.values())) if weights else "unknown (no .safetensors file)",
        "stored as": (facts.types(stored) or "unknown") + (f", {method}" if method else ""),
        "context": f"{config.get('max_position_embeddings', 'unknown')} tokens",
        "chat template": _yes_no(folder_chat_template(source.path) is not None),
        "sampling": facts.sampling_defaults(default_sampling(source.path)),
        "size": _size(weights),
    }


def _family(config: Mapping[str, Any]) -> str:
    from ingle.model.registry import is_native

    kind = config["model_type"]
    return kind if is_native(config) else f"{kind}, by transformers' code if it has any"


def _stored(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """Numbers stored in each type, the most first, and the files that hold them."""
    from ingle.weights.checkpoint_files import SAFETENSORS_FILES
    from ingle.weights.safetensors_source import SafetensorsSource

    if not SAFETENSORS_FILES.are_in(folder):
        return {}, []
    with contextlib.closing(SafetensorsSource(folder)) as source:
        return source.stored_types, source.paths


def _size(files: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
