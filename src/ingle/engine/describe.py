"""Finds out what a model on this machine is, and whether it runs here, from its files without loading it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingle.config import EngineConfig, TextConfig
from ingle.description import Description, Template
from ingle.engine.check import Report, check_model
from ingle.errors import ModelError, RequestError
from ingle.model.count import num_parameters
from ingle.model.registry import decoder_config, is_native
from ingle.text.recommended import NOTHING, Recommended
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_hf import ARCHITECTURES
from ingle.weights.hf_config import config_file, normalize_config, read_raw
from ingle.weights.open import open_source
from ingle.weights.quantized.config import read_quantization

if TYPE_CHECKING:
    from ingle.text.chat_template import ChatTemplate

_README_BYTES, _LICENSE_BYTES = 1 << 16, 400
_MAX_ADAPTER_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "License", "USE_POLICY.md")
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "exl2": "EXL2", "exl3": "EXL3", "bitsandbytes": "bitsandbytes"}
_TOOL = {"type": "function", "function": {"name": "zqtoolzq", "description": "x", "parameters": {"type": "object",
         "properties": {"a": {"type": "string", "description": "x"}}, "required": ["a"]}}}  # fmt: skip


def describe(
    name: str, path: Path, config: EngineConfig, text: TextConfig, recommended: Recommended = NOTHING
) -> Description:
    """Of the model at `path`, a folder with config.json or a .gguf file.

    Raises `ModelError` when its configuration cannot be read.
    """
    is_gguf = not path.is_dir()
    facts = _gguf_facts(path) if is_gguf else _folder_facts(path)
    report = check_model(config, text, path, recommended)
    side = report.text
    return Description(
        model=name,
        template=_template(report, text, path, recommended),
        sampling={} if side is None else side.default_sampling,
        sampling_source="" if side is None else side.sampling_source,
        runs=report.runs,
        findings=report.findings,
        need=report.need,
        path=str(path),
        **facts,
    )


def describe_adapter(name: str, folder: Path) -> Description | None:
    """Of a folder with an adapter and no model, which does not run by itself; None for any other folder."""
    file = folder / "adapter_config.json"
    if (folder / "config.json").exists() or not file.is_file():
        return None
    settings = _json(file, _MAX_ADAPTER_BYTES)
    base, rank = settings.get("base_model_name_or_path"), settings.get("r")
    parts = [f"adapter ({settings.get('peft_type') or 'LoRA'}", f" of rank {rank}" if isinstance(rank, int) else ""]
    weights = [each for each in folder.glob("adapter_model.*") if each.is_file()]
    return Description(
        model=name,
        format=f"{''.join(parts)}) for {base if isinstance(base, str) and base else 'a model that it does not name'}",
        num_bytes=sum(each.stat().st_size for each in weights),
        license=_folder_license(folder),
        runs=False,
        path=str(folder.absolute()),
    )


def _gguf_facts(path: Path) -> dict[str, Any]:
    file = GgufFile(path, texts=False)
    metadata, name = file.metadata, str(file.metadata.get("general.architecture", "unknown"))
    known, context = ARCHITECTURES.get(name), metadata.get(f"{name}.context_length")
    stated = metadata.get("general.license.name") or metadata.get("general.license")
    paths = sorted({path, *(tensor.path for tensor in file.tensors.values())})
    return {
        "format": "GGUF" + (f", {len(paths)} files" if len(paths) > 1 else ""),
        "architecture": name,
        "family": known.model_type if known is not None else "unknown to ingle",
        "num_parameters": file.num_parameters,
        "stored_types": file.parameters_by_type,
        "context": context if isinstance(context, int) else None,
        "num_bytes": sum(each.stat().st_size for each in paths),
        "license": f"{stated} (general.license)"
        if isinstance(stated, str) and stated
        else _folder_license(path.parent),
    }


def _folder_facts(folder: Path) -> dict[str, Any]:
    raw = read_raw(folder)
    try:
        config: Mapping[str, Any] = normalize_config(config_file(folder), dict(raw))
    except ModelError:  # the findings say why
        config = raw
    stored, files = _stored(folder, config)
    quantization = _quantization(config)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    context = config.get("max_position_embeddings")
    return {
        "format": _format(folder, files),
        "architecture": architecture if isinstance(architecture, str) else None,
        "family": _family(config),
        "num_parameters": _num_parameters(config, stored, quantized=quantization is not None),
        "stored_types": stored,
        "quantization": quantization,
        "context": context if isinstance(context, int) else None,
        "num_bytes": sum(file.stat().st_size for file in files) or None,
        "license": _folder_license(folder),
    }


def _format(folder: Path, files: list[Path]) -> str:
    kinds = {".safetensors": "safetensors", ".bin": "PyTorch (.bin)"}
    if files:
        return kinds[files[0].suffix] + (f", {len(files)} files" if len(files) > 1 else "")
    if next(folder.glob("*.onnx"), None) or next(folder.glob("onnx/*.onnx"), None):
        return "ONNX"
    return "Hugging Face folder without weights"


def _family(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    return kind if is_native(config) else f"{kind}, by transformers' code if it has any"


def _num_parameters(config: Mapping[str, Any], stored: Mapping[str, int], *, quantized: bool) -> int | None:
    """As they are stored; of those that are packed, as the configuration has them."""
    if quantized or not stored:
        with contextlib.suppress(ModelError):
            return num_parameters(decoder_config(config))
        return None
    return sum(stored.values())


def _stored(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, int], list[Path]]:
    """Numbers stored in each type, the most first, and the files that hold them."""
    found = next((files for files in (SAFETENSORS_FILES, TORCH_FILES) if files.are_in(folder)), None)
    if found is None:
        return {}, []
    paths = found.paths(folder)
    try:
        quantization = read_quantization(folder, config)
        with contextlib.closing(open_source(folder, "auto", 0, quantization=quantization)) as source:
            return source.stored_types, paths
    except ModelError:  # the findings say why
        return {}, paths


def _quantization(config: Mapping[str, Any]) -> str | None:
    """Method and bits of a folder whose weights are packed."""
    settings = next((config[key] for key in ("quantization_config", "compression_config") if config.get(key)), None)
    method = "MLX"
    if settings is None:
        settings = config.get("quantization")
        if not isinstance(settings, Mapping) or "bits" not in settings:
            return None
    elif isinstance(settings, Mapping):
        named = str(settings.get("quant_method") or "a method without a name")
        method = _METHODS.get(named.lower(), named)
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    if bits is None and isinstance(settings, Mapping) and settings.get("load_in_4bit"):
        bits = 4
    return f"{method}, {bits:g} bits" if isinstance(bits, int | float) else method


def _folder_license(folder: Path) -> str | None:
    """As the model card's front matter says, or the heading of a file with the licence's text."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        card = (folder / "README.md").read_bytes()[:_README_BYTES].decode(errors="replace")
        if (matter := _FRONT_MATTER.match(card)) is not None:
            said = dict(re.findall(r"^(license(?:_name|_link)?):[ \t]*([^\n#]+)", matter[1], re.MULTILINE))
            name = said.get("license_name") if said.get("license", "").strip() in ("", "other") else said["license"]
            if name and (name := name.strip(" '\"")):
                link = said.get("license_link", "").strip(" '\"")
                return f"{name}{f', {link}' if link else ''} (README.md)"
    for file in _LICENSES:
        with contextlib.suppress(OSError):
            with (folder / file).open("rb") as opened:
                head = opened.read(_LICENSE_BYTES).decode(errors="replace")
            lines = [line.strip(" #*") for line in head.splitlines() if line.strip(" #*")]
            if lines:
                return f"{' '.join(lines[:2])[:80]} ({file})"
    return None


def _template(report: Report, text: TextConfig, path: Path, recommended: Recommended) -> Template | None:
    if report.text is None or report.text.chat_template is None:
        return None
    template = report.text.chat_template
    system = _renders(template, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]) is not None
    with_tools = _renders(template, [{"role": "user", "content": "y"}], tools=True)
    return Template(_where(text, path, recommended), system, with_tools is not None and "zqtoolzq" in with_tools)


def _where(text: TextConfig, path: Path, recommended: Recommended) -> str:
    if text.chat_template is not None:
        return "--chat-template"
    if recommended.chat_template is not None:
        return f"{recommended.chat_template}, by {recommended.source}"
    if not path.is_dir():
        return "tokenizer.chat_template of the file"
    from ingle.text.folder_tokenizer import find_chat_template

    found = find_chat_template(path)
    return "" if found is None else found[1]


def _renders(template: ChatTemplate, messages: list[dict[str, str]], *, tools: bool = False) -> str | None:
    try:
        if tools:
            return template.render(messages, tools=[_TOOL])
        return template.prompt(messages)
    except RequestError:
        return None


def _json(file: Path, max_bytes: int) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes()[:max_bytes])
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
