"""`ingle show`: what a model is, read from its files without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ingle.cli.flags import parse
from ingle.errors import ModelError
from ingle.hub.resolve import ModelSource, resolve_model


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
        print(f"{key:<{width}}  {value}")


def _gguf(source: ModelSource) -> dict[str, str]:
    from ingle.weights.gguf import GgufFile

    file = GgufFile(source.path)
    architecture = str(file.metadata.get("general.architecture", "unknown"))
    types = file.parameters_by_type
    shares = (f"{kind} {count / file.num_parameters:.0%}" for kind, count in types.items() if file.num_parameters)
    return {
        "architecture": architecture,
        "parameters": _count(file.num_parameters),
        "context": f"{file.metadata.get(f'{architecture}.context_length', 'unknown')} tokens",
        "quantization": ", ".join(shares),
        "chat template": _yes_no("tokenizer.chat_template" in file.metadata),
        "size": _size([source.path]),
    }


def _folder(source: ModelSource) -> dict[str, str]:
    from ingle.text.folder_tokenizer import folder_chat_template
    from ingle.weights.hf_config import read_config

    config = read_config(source.path)
    weights = sorted(source.path.glob("*.safetensors"))
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    architectures = config.get("architectures")
    return {
        "architecture": str(architectures[0] if isinstance(architectures, list) and architectures else "unknown"),
        "parameters": _count(_safetensors_parameters(weights)) if weights else "unknown (no .safetensors file)",
        "context": f"{config.get('max_position_embeddings', 'unknown')} tokens",
        "quantization": str(method or f"none, {config.get('torch_dtype') or 'dtype unknown'}"),
        "chat template": _yes_no(folder_chat_template(source.path) is not None),
        "size": _size(weights),
    }


def _safetensors_parameters(files: list[Path]) -> int:
    import math

    from safetensors import SafetensorError, safe_open

    total = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    return total


def _count(parameters: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if parameters >= scale:
            return f"{parameters / scale:.1f}{unit}"
    return str(parameters)


def _size(files: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
