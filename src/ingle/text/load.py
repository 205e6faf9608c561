"""Everything about a model that is text: tokenizer, chat template, and the sampling its makers recommend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.errors import ConfigError, ModelError, RequestError
from ingle.text.chat_template import ChatTemplate
from ingle.text.sandbox import sandboxes
from ingle.text.tokenizer import Tokenizer

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class TextSide:
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    default_sampling: dict[str, Any]
    """What generation_config.json sets among temperature, top_p, top_k, min_p and repetition_penalty."""


def load_text_side(path: Path, chat_template: str | None = None) -> TextSide:
    """Reads a model folder or .gguf file. `chat_template` is a file, or a template itself, that replaces the model's.

    Raises `ModelError` and `ConfigError`.
    """
    sandboxes.warm_up()
    tokenizer = load_tokenizer(path, None if chat_template is None else _given_template(chat_template))
    source = tokenizer.chat_template
    template = ChatTemplate(source, tokenizer.special_tokens) if source is not None else None
    if chat_template is not None and template is not None:
        _try(template)
    return TextSide(tokenizer, template, default_sampling(path))


def load_tokenizer(path: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or a `.gguf` file; `chat_template` replaces the model's own.

    Raises `ModelError` when there is none, or one that cannot be used.
    """
    if path.is_dir():
        from ingle.text.folder_tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(path, chat_template)
    from ingle.text.gguf_tokenizer import tokenizer_from_gguf
    from ingle.weights.gguf import GgufFile

    return tokenizer_from_gguf(GgufFile(path).metadata, path, chat_template)


def default_sampling(path: Path) -> dict[str, Any]:
    """The sampling parameters in the folder's generation_config.json; empty for a .gguf file or where there is none."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes()[:_MAX_BYTES])
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object")
    return {name: config[name] for name in _SAMPLING_FIELDS if isinstance(config.get(name), (int, float))}


def _try(template: ChatTemplate) -> None:
    """A template that the user gave fails at the start, not at the first request."""
    try:
        template.render([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        raise ConfigError(f"--chat-template cannot render a user's message: {error}") from error


def _given_template(text: str) -> str:
    """A template is told from a file name by its braces."""
    if "{" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {text!r} cannot be read: {error}") from error
