"""Everything about a model that is text: tokenizer, chat template, and the sampling its makers recommend."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.config import TextConfig
from ingle.errors import Collected, ConfigError, ModelError, RequestError, printable
from ingle.request import SamplingParams
from ingle.text.bos import bos_notice
from ingle.text.chat_template import ChatTemplate
from ingle.text.formats.of_model import NO_FORMATS, Formats
from ingle.text.recommended import NOTHING, Recommended
from ingle.text.sandbox import sandboxes
from ingle.text.shipped import shipped_template, shipped_templates
from ingle.text.tokenizer import Tokenizer
from ingle.weights.pointer import refuse_pointer

log = logging.getLogger(__name__)

_MODELS_OWN = TextConfig()
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_GGUF_SAMPLING = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
"""llama.cpp's names under `general.sampling`, where they are others."""
_F32_DIGITS = 7
_MAX_BYTES = 1 << 20
_HELLO = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True)
class TextSide:
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    default_sampling: dict[str, Any]
    """What the model's files recommend of temperature, top_p, top_k, min_p and repetition_penalty."""
    sampling_source: str = ""
    """Where that stands, for people."""
    notices: tuple[str, ...] = ()
    """What the user should know of it."""
    formats: Formats = NO_FORMATS
    """In which the model writes thoughts and calls of tools."""


def load_text_side(path: Path, config: TextConfig = _MODELS_OWN, recommended: Recommended = NOTHING) -> TextSide:
    """Reads a model folder or .gguf file. What is recommended gives way to `config`, and its sampling to the model's.

    Raises `ModelError` and `ConfigError`, of all that is wrong with it.
    """
    sandboxes.warm_up()
    found, sampling = Collected(), dict[str, Any]()
    given = tokenizer = template = None
    with found.apart():
        given = _given_template(config, recommended)
    metadata = None
    if not path.is_dir():
        with found.apart():
            metadata = _gguf_metadata(path, texts=True)
        if metadata is None:
            found.raise_any()
    with found.apart():
        tokenizer = _folder_tokenizer(path, given) if metadata is None else _gguf_tokenizer(metadata, path, given)
    with found.apart():
        sampling = _folder_sampling(path) if metadata is None else _gguf_sampling(metadata, path)
    if tokenizer is not None and tokenizer.chat_template is not None:
        with found.apart():
            template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, merge_system=config.merge_system)
            if given is not None:
                _try(template)
    formats, notices = NO_FORMATS, list[str]()
    with found.apart():
        formats = _formats(config, tokenizer, template, notices)
    found.raise_any()
    assert tokenizer is not None, "nothing was refused"
    source = "" if not sampling else "generation_config.json" if metadata is None else "general.sampling of the file"
    if not sampling and (sampling := _usable(recommended.sampling, recommended.source)):
        source = recommended.source
    notices += [] if template is None else filter(None, [bos_notice(tokenizer, template)])
    if config.chat_template is None and recommended.chat_template is not None:
        notices.append(f"the chat template is {recommended.chat_template}, by {recommended.source}")
    return TextSide(tokenizer, template, sampling, source, tuple(notices), formats)


def _formats(
    config: TextConfig, tokenizer: Tokenizer | None, template: ChatTemplate | None, notices: list[str]
) -> Formats:
    """Raises `ConfigError` for a name that is not known."""
    from ingle.text.formats.detect import NONE, reasoning_of, tools_of

    if template is None or tokenizer is None:
        return NO_FORMATS
    declared = tokenizer.response_template
    if declared is not None and config.tool_call_parser is None and config.reasoning_parser is None:
        from ingle.text.formats.template import read_response_template

        try:
            own = read_response_template(declared)
        except ValueError as error:
            notices.append(
                f"{printable(str(error))}: calls of tools and thoughts are read as the chat template shows them"
            )
        else:
            special = map(tokenizer.token, sorted(tokenizer.special_token_ids))
            return Formats(template=own, template_marks=own.marks(special))
    try:
        tools = tools_of(template.source, config.tool_call_parser)
    except ValueError as error:
        raise ConfigError(f"--tool-call-parser: {error}") from None
    try:
        reasoning = reasoning_of(template.source, config.reasoning_parser)
    except ValueError as error:
        raise ConfigError(f"--reasoning-parser: {error}") from None
    if tools is not None and tools.name == "openai" and config.reasoning_parser != NONE:
        reasoning = reasoning_of("", tools.name)  # calls and thoughts are parts of one format
    return Formats(tools, reasoning)


def template_fault(template: ChatTemplate) -> str | None:
    """What to tell of a model's own template that cannot be used: the model still completes prompts."""
    try:
        template.prompt(_HELLO)
    except RequestError as error:
        return (
            f"the model's own chat template cannot render a user's message ({error}): /v1/chat/completions needs "
            "--chat-template"
        )
    return None


def load_tokenizer(path: Path, config: TextConfig = _MODELS_OWN) -> Tokenizer:
    """The tokenizer of a model folder or a `.gguf` file.

    Raises `ModelError` when there is none, or one that cannot be used.
    """
    given = _given_template(config)
    if path.is_dir():
        return _folder_tokenizer(path, given)
    return _gguf_tokenizer(_gguf_metadata(path, texts=True), path, given)


def has_chat_template(path: Path, config: TextConfig = _MODELS_OWN, recommended: Recommended = NOTHING) -> bool:
    """Whether there is one, given, recommended or the model's own, told without reading the tokenizer."""
    if config.chat_template is not None or recommended.chat_template is not None:
        return True
    if path.is_dir():
        from ingle.text.folder_tokenizer import folder_chat_template

        return folder_chat_template(path) is not None
    return "tokenizer.chat_template" in _gguf_metadata(path, texts=False)


def default_sampling(path: Path) -> dict[str, Any]:
    """The sampling parameters that the model's makers recommend: those of a folder's generation_config.json, or of
    `general.sampling` in a .gguf file. What no request could ask for is left out, with a warning.
    """
    return _folder_sampling(path) if path.is_dir() else _gguf_sampling(_gguf_metadata(path, texts=False), path)


def _folder_tokenizer(path: Path, chat_template: str | None) -> Tokenizer:
    from ingle.text.folder_tokenizer import tokenizer_from_folder

    return tokenizer_from_folder(path, chat_template)


def _gguf_tokenizer(metadata: Mapping[str, Any], path: Path, chat_template: str | None) -> Tokenizer:
    from ingle.text.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(metadata, path, chat_template)


def _gguf_metadata(path: Path, *, texts: bool) -> dict[str, Any]:
    from ingle.weights.gguf import GgufFile

    return GgufFile(path, texts=texts).metadata


def _folder_sampling(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes()[:_MAX_BYTES])
    except ValueError as error:
        refuse_pointer(file)
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object")
    return _usable({name: config.get(name) for name in _SAMPLING_FIELDS}, file)


def _gguf_sampling(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    named = {name: f"general.sampling.{_GGUF_SAMPLING.get(name, name)}" for name in _SAMPLING_FIELDS}
    given = {name: metadata.get(key) for name, key in named.items()}
    # They are stored in 32 bits: 0.6 as 0.60000002384.
    return _usable(
        {name: float(f"{v:.{_F32_DIGITS}g}") if isinstance(v, float) else v for name, v in given.items()}, path
    )


def _usable(given: Mapping[str, Any], file: Path | str) -> dict[str, Any]:
    usable = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            log.warning("%s: its sampling default is left out: %s", file, error)
        else:
            usable[name] = value
    return usable


def _try(template: ChatTemplate) -> None:
    """A template that the user gave fails at the start, not at the first request."""
    try:
        template.prompt(_HELLO)
    except RequestError as error:
        raise ConfigError(f"--chat-template cannot render a user's message: {error}") from error


def _given_template(config: TextConfig, recommended: Recommended = NOTHING) -> str | None:
    """A template is told from a name by its braces. A file of that name goes before a template that ingle brings."""
    text, who = config.chat_template, "--chat-template"
    if text is None:
        text, who = recommended.chat_template, f"{recommended.source}: chat_template"
    if text is None or "{" in text:
        return text
    if not Path(text).is_file() and (shipped := shipped_template(text)) is not None:
        return shipped
    try:
        return Path(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(shipped_templates())
        raise ConfigError(
            f"{who} {text!r} cannot be read: {error}; give a file, a template, or a name that ingle brings: {names}"
        ) from error
