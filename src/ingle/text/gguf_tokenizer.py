"""Tokenizers from the metadata of GGUF files, split and merged as llama.cpp does with the same file.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, the pre-tokenizers, defaults and
semantics those of `src/llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ingle.errors import ModelError
from ingle.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Token types, `enum llama_token_type`. A byte, 6, needs no care: its spelling `<0x0A>` tells."""

# Cutting a vocabulary into pairs takes time that grows with the squares of its tokens' lengths. Real ones of 256k
# tokens come to some 3e7.
_MAX_SQUARED_LENGTHS = 1 << 28
_SPACE = "▁"


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut into words before merging: by each pattern in turn."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is taken whole, whether merges lead to it or not."""
    add_bos: bool = False
    """Whether BOS comes first when the file does not say."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _ENGLISH_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_WORDS
_QWEN2 = _ENGLISH_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_WORDS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_AFTER_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _AFTER_CASED
_GPT4O = _CASED % (_ENGLISH_ENDINGS + "?", _ENGLISH_ENDINGS + "?") + r"|\p{N}{1,3}" + _AFTER_CASED
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_DEFAULT = _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_BY_NAMES = {
    ("default",): _DEFAULT,
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum"): _PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): _PreTokenizer(
        (r"\p{N}", _GPT2)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): _PreTokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): _PreTokenizer((_LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "kormo"): _PreTokenizer((_QWEN2,)),
    ("tekken",): _PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2"): _PreTokenizer((_GPT4O,)),
    ("deepseek-v3", "hunyuan-dense"): _PreTokenizer(_DEEPSEEK3),
    ("deepseek-coder",): _PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    ("falcon",): _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
}
_PRE_TOKENIZERS = {name: pre for names, pre in _BY_NAMES.items() for name in names}


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that a GGUF file carries; `chat_template` replaces the file's own.

    Raises `ModelError` when the file has none, or one of a kind that ingle does not know, or one that contradicts
    itself. `path` is for messages only.
    """
    vocabulary = _Vocabulary(metadata, path)
    try:
        backend = _backend(vocabulary)
    except ModelError:
        raise
    except Exception as error:  # all that `tokenizers` raises
        raise ModelError(f"{path}: its tokenizer cannot be built: {error}") from error
    own_template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens=vocabulary.special_tokens(),
        eos_token_ids=vocabulary.end_ids,
        chat_template=chat_template or (own_template if isinstance(own_template, str) else None) or None,
    )


class _Vocabulary:
    """The checked `tokenizer.ggml.*` keys of one file."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path
        self.kind = self.get("model")
        if self.kind not in ("gpt2", "llama"):
            self.fail(f"it is of kind {self.kind!r}, and ingle knows gpt2 and llama")
        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.list_of("tokens", str))]
        self.types: list[int] = (
            self.list_of("token_type", int) if "token_type" in self else [_NORMAL] * len(self.tokens)
        )
        self.scores: list[float] = self.list_of("scores", float, int) if "scores" in self else []
        for name, values in (("token types", self.types), ("scores", self.scores)):
            if values and len(values) != len(self.tokens):
                self.fail(f"it has {len(self.tokens)} tokens and {len(values)} {name}")
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            self.fail(f"{len(self.tokens) - len(self.ids)} of its {len(self.tokens)} tokens appear twice")
        self.special_ids = self._special_ids()
        self.end_ids = [self.special_ids[key] for key in ("eos", "eot", "eom") if key in self.special_ids]

    def __contains__(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self._metadata

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self._path}: its tokenizer cannot be used: {what}")

    def list_of(self, key: str, *types: type) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(value, types) for value in values):
            self.fail(f"tokenizer.ggml.{key} is missing, empty or of the wrong type")
        return values

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def _special_ids(self) -> dict[str, int]:
        """By the keys of the file. As in llama.cpp, an id out of range counts for none."""
        defaults = {"unknown": 0, "bos": 1, "eos": 2} if self.kind == "llama" else {}
        special_ids = {}
        for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            token_id = self.get(f"{key}_token_id")
            token_id = defaults.get(key) if token_id is None else token_id
            if isinstance(token_id, int) and 0 <= token_id < len(self.tokens):
                special_ids[key] = token_id
            elif token_id is not None:
                log.warning("%s: no token has the %s_token_id %s: ignored", self._path, key, token_id)
        return special_ids

    def special_tokens(self) -> dict[str, str]:
        """By the names that chat templates use."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        return {name: self.tokens[self.special_ids[key]] for key, name in names.items() if key in self.special_ids}

    def pre_tokenizer(self) -> _PreTokenizer:
        name = self.get("pre")
        if name not in _PRE_TOKENIZERS:
            log.warning(
                "%s: unknown pre-tokenizer %r: text is split as by llama.cpp's default, and answers may suffer",
                self._path,
                name,
            )
        return _PRE_TOKENIZERS.get(name, _DEFAULT)


def _backend(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    if vocabulary.kind == "gpt2":
        pre_tokenizer = vocabulary.pre_tokenizer()
        backend = _byte_level(vocabulary, pre_tokenizer)
        add_bos = pre_tokenizer.add_bos
    else:
        backend = _sentence_piece(vocabulary)
        add_bos = True
    special, plain = [], []
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_UNKNOWN, _CONTROL) or token_id in vocabulary.end_ids:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    backend.post_processor = _post_processor(vocabulary, add_bos)
    return backend


def _byte_level(vocabulary: _Vocabulary, pre_tokenizer: _PreTokenizer) -> tokenizers.Tokenizer:
    merges = []
    for merge in vocabulary.list_of("merges", str):
        middle = merge.find(" ", 1)
        merges.append((merge[:middle], merge[middle + 1 :]))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
    )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre_tokenizer.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=vocabulary.special_tokens().get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_text: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if vocabulary.flag("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))  # to each stretch of text between special tokens
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best-scored token: all cuts of tokens in two, best first."""
    if not vocabulary.scores:
        vocabulary.fail("tokenizer.ggml.scores is missing")
    if sum(len(token) ** 2 for token in vocabulary.tokens) > _MAX_SQUARED_LENGTHS:
        vocabulary.fail("its tokens are longer than any real vocabulary's")
    normal = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _NORMAL}
    merges = []
    for token_id in sorted(range(len(vocabulary.tokens)), key=vocabulary.scores.__getitem__, reverse=True):
        token = vocabulary.tokens[token_id]
        if token in normal:
            for cut in range(len(token) - 1, 0, -1):
                if token[:cut] in normal and token[cut:] in normal:
                    merges.append((token[:cut], token[cut:]))
    return merges


def _post_processor(vocabulary: _Vocabulary, add_bos: bool) -> processors.TemplateProcessing:
    """Puts BOS before and EOS after a text, as the file's flags say."""
    pieces, added = ["$A"], []
    for key, default in (("bos", add_bos), ("eos", False)):
        if not vocabulary.flag(f"add_{key}_token", default):
            continue
        if key in vocabulary.special_ids:
            token_id = vocabulary.special_ids[key]
            pieces = [key, *pieces] if key == "bos" else [*pieces, key]
            added.append({"id": key, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]})
        elif f"add_{key}_token" in vocabulary:
            vocabulary.fail(f"tokenizer.ggml.add_{key}_token is set and there is no usable {key}_token_id")
    return processors.TemplateProcessing(single=pieces, special_tokens=added)
