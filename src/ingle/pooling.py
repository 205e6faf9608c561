"""How a model makes one vector of a text, as its files say: sentence-transformers' or the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingle.errors import ModelError, printable
from ingle.request import Pooling, PoolingKind

_MAX_BYTES = 1 << 20
_MAX_PROMPTS = 256
_MODES: Mapping[str, PoolingKind] = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean", "cls": "cls",
                                     "cls_token": "cls"}  # fmt: skip
"""Of sentence-transformers, also as `pooling_mode_…`; the others weigh tokens, or take a maximum."""
_OF_GGUF: Mapping[int, PoolingKind] = {1: "mean", 2: "cls", 3: "last"}
"""llama.cpp's numbers; 0 is none."""
_SERVES = "ingle serves embedding models that pool the last token, the mean or the first token"


@dataclass(frozen=True)
class ModelPooling:
    kind: PoolingKind = "last"
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What goes before a text, by the name of what the text is for, such as `query`."""
    default_prompt: str | None = None
    """The name of the one that holds where none is asked for."""
    max_tokens: int | None = None
    """Of a text; None for as many as the context holds."""
    declared: bool = True
    """The model was made for it, and writes no text."""

    def of(self, dimensions: int | None = None, normalize: bool | None = None) -> Pooling:
        """What a request asks of the engine."""
        normalize = self.normalize if normalize is None else normalize
        return Pooling(kind=self.kind, normalize=normalize, dimensions=dimensions)


def folder_pooling(folder: Path, shown: Path | None = None) -> ModelPooling | None:
    """What modules.json says; None where there is none that pools, as for models that write text.

    Raises `ModelError` for what ingle does not compute, naming the model as `shown`.
    """
    where = folder if shown is None else shown
    modules = _json(folder / "modules.json", where)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{where}: its modules.json holds no list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if not any("Pooling" in kind for kind in kinds):
        return None
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(
                f"{where}: its modules.json has {printable(f'{kind!r:.60}')} after the model, which ingle does not "
                "compute", alternative=_SERVES,
            )  # fmt: skip
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ModelError(f"{where}: its modules.json lists {', '.join(kinds)[:100]}: expected Transformer, Pooling")
    kind = _kind(folder, where, modules[1].get("path"))
    prompts, default = _prompts(folder, where)
    return ModelPooling(kind, "Normalize" in kinds, prompts, default, _max_tokens(folder, where))


def gguf_pooling(metadata: Mapping[str, Any]) -> ModelPooling | None:
    """What a GGUF file says; None for a model that writes text."""
    kind = _OF_GGUF.get(metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 0))
    return None if kind is None else ModelPooling(kind)


def _kind(folder: Path, where: Path, path: Any) -> PoolingKind:
    if path != "1_Pooling":  # no name from outside becomes a path
        raise ModelError(f"{where}: its modules.json has pooling in {printable(f'{path!r:.60}')}, expected 1_Pooling")
    config = _json(folder / "1_Pooling" / "config.json", where)
    if not isinstance(config, dict):
        raise ModelError(f"{where}: 1_Pooling/config.json is missing or holds no object")
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode")
    modes = [name.removeprefix("pooling_mode_") for name in modes] or ([named] if isinstance(named, str) else [])
    if len(modes) != 1 or modes[0] not in _MODES:
        said = printable(f"{' and '.join(modes) or 'nothing':.80}")
        raise ModelError(f"{where}: 1_Pooling/config.json pools by {said}", alternative=_SERVES)
    if config.get("include_prompt") is False and _MODES[modes[0]] == "mean":
        raise ModelError(f"{where}: 1_Pooling/config.json leaves prompts out of the mean (include_prompt false), which "
                         "ingle does not", alternative=_SERVES)  # fmt: skip
    return _MODES[modes[0]]


def _prompts(folder: Path, where: Path) -> tuple[Mapping[str, str], str | None]:
    config = _json(folder / "config_sentence_transformers.json", where)
    config = config if isinstance(config, dict) else {}
    prompts, default = config.get("prompts"), config.get("default_prompt_name")
    prompts = prompts if isinstance(prompts, dict) else {}
    if len(prompts) > _MAX_PROMPTS or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelError(f"{where}: the prompts of config_sentence_transformers.json are not all text")
    if default is not None and default not in prompts:
        raise ModelError(f"{where}: config_sentence_transformers.json has no prompt {printable(f'{default!r:.60}')}")
    return prompts, default


def _max_tokens(folder: Path, where: Path) -> int | None:
    config = _json(folder / "sentence_bert_config.json", where)
    most = config.get("max_seq_length") if isinstance(config, dict) else None
    return most if type(most) is int and most > 0 else None


def _json(file: Path, where: Path) -> Any:
    """None where there is no such file. Raises `ModelError` for one that is no JSON."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError:
        return None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {file.name} is not valid JSON: {error}") from error
