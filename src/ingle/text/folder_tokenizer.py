"""Tokenizers from Hugging Face model folders, read as transformers 5 reads them.

`tokenizer.json` is the tokenizer as it stands. Its own post-processor decides about BOS and EOS: `add_bos_token` in
`tokenizer_config.json` does not count beside it, as in `PreTrainedTokenizerBase._from_pretrained` of transformers 5.
A folder without it may have SentencePiece's `tokenizer.model`, the `qwen.tiktoken` of the first Qwen or Mistral's
`tekken.json`; only a folder with none of these is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from ingle.errors import ModelError
from ingle.text.chat_template import MAX_TEMPLATE_CHARS, SPECIAL_TOKEN_NAMES
from ingle.text.pretokenizers import QWEN
from ingle.text.sentencepiece import add_tokens, backend_of
from ingle.text.sentencepiece_file import read_sentencepiece
from ingle.text.sentencepiece_model import SentencePieceModel
from ingle.text.tekken_file import SPECIAL_NAMES, read_tekken
from ingle.text.tiktoken_file import read_tiktoken
from ingle.text.tokenizer import Tokenizer
from ingle.weights.pointer import refuse_pointer

# Several times the largest that models ship.
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_CONFIG_BYTES = 64 << 20

_OTHER_VOCABULARIES = ("vocab.json", "tiktoken.model")
_SENTENCE_PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "qwen.tiktoken", "tekken.json"),
    *_OTHER_VOCABULARIES,
    *_SENTENCE_PIECE_FILES,
)
_SENTENCE_PIECE_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As `make_context` of Qwen-7B-Chat puts a conversation together."""
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def tokenizer_from_folder(folder: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder; `chat_template` replaces the folder's own.

    Raises `ModelError` when the folder has none, or its files are damaged.
    """
    for name in _FILES:
        refuse_pointer(folder / name)
    config = _tokenizer_config(folder)
    special_tokens, symbols = _special_tokens(config), {}
    sentence_piece = next((name for name in _SENTENCE_PIECE_FILES if (folder / name).is_file()), None)
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
        older = {} if "added_tokens_decoder" in config else _read_json(folder / "added_tokens.json")
        _add_tokens(backend, config, special_tokens, folder / "added_tokens.json", older)
    elif sentence_piece is not None:
        model = _sentence_piece(folder / sentence_piece, config)
        backend, special_tokens = _from_sentence_piece(model, folder / sentence_piece, config, special_tokens)
        symbols = {symbol: model.tokens.index(symbol) for symbol in model.symbols_by_length}
    elif (folder / "qwen.tiktoken").is_file():
        backend = read_tiktoken(folder / "qwen.tiktoken", QWEN, _QWEN_SPECIALS)
        special_tokens = {"eos_token": "<|endoftext|>", **special_tokens}
    elif (folder / "tekken.json").is_file():
        backend = read_tekken(folder / "tekken.json")
        known = {name: token for name, token in SPECIAL_NAMES.items() if backend.token_to_id(token) is not None}
        special_tokens = known | special_tokens
    else:
        backend = _converted_by_transformers(folder)
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        eos_token_ids=_end_ids(folder),
        chat_template=chat_template or folder_chat_template(folder, config),
        symbols=symbols,
        response_template=config.get("response_template"),
    )


def _sentence_piece(path: Path, config: Mapping[str, Any]) -> SentencePieceModel:
    model = read_sentencepiece(path)
    if config.get("legacy") is False and model.space_prefix == "each":
        return replace(model, space_prefix="first")
    return model


def _from_sentence_piece(
    model: SentencePieceModel, path: Path, config: Mapping[str, Any], named: dict[str, str]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by name: those that the folder names, and Llama's where it names none."""
    try:
        backend = backend_of(model)
    except Exception as error:  # all that `tokenizers` raises
        raise ModelError(f"{path}: its tokenizer cannot be built: {error}") from error
    add_tokens(backend, model.tokens, model.added_types)
    specials = {name: token for name, token in _SENTENCE_PIECE_SPECIALS.items() if token in model.pieces} | named
    listed = path.with_name("added_tokens.json")
    _add_tokens(backend, config, specials, listed, _read_json(listed), normalized=False)
    backend.post_processor = _around_text(backend, config, specials)
    return backend, specials


def _around_text(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]
) -> processors.TemplateProcessing:
    """BOS before a text unless the folder says no, EOS after it if it says so, as for Llama."""
    pieces, added = ["$A"], []
    for name, wanted in (("bos", config.get("add_bos_token", True)), ("eos", config.get("add_eos_token", False))):
        token = specials.get(f"{name}_token")
        token_id = None if token is None else backend.token_to_id(token)
        if wanted and token_id is not None:
            pieces = [name, *pieces] if name == "bos" else [*pieces, name]
            added.append({"id": name, "ids": [token_id], "tokens": [token]})
    return processors.TemplateProcessing(single=pieces, special_tokens=added)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: damaged: it holds {type(value).__name__}, not an object")
    return value


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise ModelError(f"{path}: it has {size} bytes, more than the {max_bytes} that are taken")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # written before transformers 4.34
        config |= _read_json(folder / "special_tokens_map.json")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named tokens: the usual ones first, then a model's own such as `image_token`."""
    named = {name: config.get(name) for name in SPECIAL_TOKEN_NAMES}
    named |= {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    return {name: content for name, value in named.items() if (content := _content(value))}


def _content(token: Any) -> str | None:
    """The text of a token, which files write as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path, _MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # all that `tokenizers` raises
        raise ModelError(f"{path}: not a tokenizer: {error}") from error


def _add_tokens(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    older_file: Path,
    older: Mapping[str, Any],
    *,
    normalized: bool = True,
) -> None:
    """Tokens that `tokenizer_config.json` adds to the vocabulary, or whose flags it changes.

    `older` are those of `added_tokens.json`, which listed them by id before transformers 4.34; `normalized`: plain ones
    among these are looked for in normalized text. Raises `ModelError` when one of them cannot have its id.
    """
    named = list(dict.fromkeys([*special_tokens.values(), *_more_special(config)]))
    known = _added(backend)
    by_id = sorted((i, token) for token, i in older.items() if type(i) is int and token not in known)
    backend.add_tokens(
        [AddedToken(token, normalized=normalized and token not in named, special=token in named) for _, token in by_id]
    )
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        in_order = sorted((item for item in listed.items() if item[0].isdecimal()), key=lambda item: int(item[0]))
        backend.add_tokens([_added_token(token) for _, token in in_order if _content(token)])
    known = _added(backend)
    backend.add_tokens([AddedToken(token, special=True) for token in named if token not in known])
    for token_id, token in by_id:
        if backend.token_to_id(token) != token_id:
            raise ModelError(f"{older_file}: token {token[:100]!r} cannot have the id {token_id}")


def _added(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _more_special(config: Mapping[str, Any]) -> list[str]:
    """Special tokens that have no name."""
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return list(filter(None, map(_content, more if isinstance(more, list) else [])))


def _added_token(token: Any) -> AddedToken:
    flags = {flag: bool(token[flag]) for flag in _TOKEN_FLAGS if isinstance(token, dict) and flag in token}
    return AddedToken(_content(token), **flags)


def _end_ids(folder: Path) -> list[int]:
    """`eos_token_id` of `generation_config.json`, or of `config.json` in folders from before there was one."""
    name = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
    value = _read_json(folder / name).get("eos_token_id")
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if type(token_id) is int and token_id >= 0]


def folder_chat_template(folder: Path, config: Mapping[str, Any] | None = None) -> str | None:
    """The text of `find_chat_template`."""
    found = find_chat_template(folder, config)
    return None if found is None else found[0]


def find_chat_template(folder: Path, config: Mapping[str, Any] | None = None) -> tuple[str, str] | None:
    """The default template, and where it stands: in a file of its own, or `tokenizer_config.json`, or
    `chat_template.json`; or ChatML, of which the first Qwen's `generation_config.json` has only the name.

    The latter two may name several. `config` is what `tokenizer_config.json` holds, where it was read before.
    """
    for file in (folder / "additional_chat_templates" / "default.jinja", folder / "chat_template.jinja"):
        if file.is_file():
            return _read_text(file, 4 * MAX_TEMPLATE_CHARS), str(file.relative_to(folder))
    config = _tokenizer_config(folder) if config is None else config
    # Beside a processor of images or sound, transformers writes the template into a file that is read last here.
    if (template := _default_template(config)) is not None:
        return template, "tokenizer_config.json"
    if (template := _default_template(_read_json(folder / "chat_template.json"))) is not None:
        return template, "chat_template.json"
    if _read_json(folder / "generation_config.json").get("chat_format") == "chatml":
        return _CHATML, "ChatML, which generation_config.json names"
    return None


def _default_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) and template else None


def _converted_by_transformers(folder: Path) -> tokenizers.Tokenizer:
    """For folders from before `tokenizer.json`: transformers builds one, which takes seconds."""
    if not any((folder / name).is_file() for name in _OTHER_VOCABULARIES):
        raise ModelError(
            f"{folder}: no tokenizer: tokenizer.json is missing",
            alternative="download the tokenizer's files beside the weights: tokenizer.json and tokenizer_config.json",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what its many converters raise
        raise ModelError(f"{folder}: tokenizer.json is missing, and transformers cannot make it: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(f"{folder}: tokenizer.json is missing, and {type(tokenizer).__name__} has no equivalent")
    return backend
