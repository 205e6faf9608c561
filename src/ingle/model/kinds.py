"""What kind of model a checkpoint holds. Only a decoder with a head for language modelling writes text, and only one
whose files say how makes vectors of texts; whatever else shares its layers would answer with noise, or with a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingle.errors import ModelError
from ingle.model.config_keys import shown
from ingle.model.registry import is_native
from ingle.pooling import ModelPooling, folder_pooling
from ingle.weights.source import WeightSource

_SERVES = "ingle serves models that write text, and decoders that make vectors of texts"

_WRITES = re.compile(r"CausalLM|LMHead|ForConditionalGeneration")
_OTHER_KINDS = (
    (re.compile(r"Reward"), "a reward model, which scores texts"),
    (re.compile(r"ForSequenceClassification"), "a classifier or reward model, which scores texts"),
    (re.compile(r"For\w+Classification|ForQuestionAnswering|ForMultipleChoice"), "a classifier"),
    (re.compile(r"MaskedLM|ForPreTraining|ForNextSentencePrediction"), "an encoder, which fills in words"),
    (
        re.compile(r"Encod|Embed|Bidirectional|ForFeatureExtraction|Retriev"),
        "an encoder, which turns texts into vectors",
    ),
)
_OTHER_HEADS = {
    "score.weight": "a head that scores texts",
    "classifier.weight": "a classifier's head",
    "classifier.out_proj.weight": "a classifier's head",
    "classification_head.weight": "a classifier's head",
    "qa_outputs.weight": "a head that finds answers in a text",
    "reward_head.weight": "a reward model's head",
    "regression_layer.weight": "a reward model's head",
    "v_head.weight": "a reward model's head",
    "v_head.summary.weight": "a reward model's head",
    "value_head.weight": "a reward model's head",
}
_TEXT_HEADS = ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight", "output.weight",
               "embed_out.weight", "cls.predictions.decoder.weight")  # fmt: skip


def check_kind(path: Path, config: Mapping[str, Any], folder: Path | None = None) -> ModelPooling | None:
    """How it makes vectors of texts, if it does; None for a model that writes them.

    Raises `ModelError` for a model that is by its own word neither. `path` is what it is called; its files are in
    `folder`, by default there too.
    """
    folder = path if folder is None else folder
    names = _architectures(config)
    for name in () if writes_text(config) else names:
        for pattern, kind in _OTHER_KINDS:
            if pattern.search(name):
                raise ModelError(f"{path}: holds {name}, {kind} and writes none", alternative=_SERVES)
    pooling = folder_pooling(folder, path) if folder.is_dir() else None
    if pooling is not None and not is_native(config):
        held = names[0] if names else f"model_type {shown(str(config.get('model_type')))}"
        raise ModelError(
            f"{path}: holds {held} with pooling (modules.json), an embedding model that is none of ingle's decoders",
            alternative=_SERVES,
        )
    return pooling


def writes_text(config: Mapping[str, Any]) -> bool:
    """Whether the name of its class says so; models with code of their own name another for the purpose."""
    auto_map = config.get("auto_map")
    names = [*_architectures(config), *(auto_map if isinstance(auto_map, Mapping) else ())]
    return any(map(_WRITES.search, names))


def check_head(path: Path, config: Mapping[str, Any], source: WeightSource, lm_head: str = "lm_head") -> None:
    """Raises `ModelError` for a checkpoint in which another head, or none, stands where that for text should."""
    if any(name in source for name in (f"{lm_head}.weight", *_TEXT_HEADS)):
        return
    for name, head in _OTHER_HEADS.items():
        if name in source:
            raise ModelError(f"{path}: has {name}, {head}, and none for text", alternative=_SERVES)
    names = _architectures(config)
    if names and not any(map(_WRITES.search, names)) and names[0].endswith("Model") and not _has_own_code(config):
        raise ModelError(
            f"{path}: holds {names[0]}, the layers without a head for text: an embedding model, or part of another",
            alternative=_SERVES,
        )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [shown(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether its own code has a class that writes text, whatever it is called."""
    auto_map = config.get("auto_map")
    return isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
