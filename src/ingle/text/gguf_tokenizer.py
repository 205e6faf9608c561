"""Tokenizers from the metadata of GGUF files, equal to those that the models were published with.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, the defaults those of
`src/llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from ingle.errors import ModelError
from ingle.text.pretokenizers import DEFAULT, NOT_BYTES, PRE_TOKENIZERS, PreTokenizer
from ingle.text.sentencepiece import add_tokens, backend_of
from ingle.text.sentencepiece_model import NORMAL, SentencePieceModel
from ingle.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_PHI3_KEEPS_SPACE_AFTER = ("<unk>", "<s>", "<|endoftext|>")


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
        self.tokens: list[str] = self.list_of("tokens", str)
        if "" in self.tokens:
            self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        self.types: list[int] = self.list_of("token_type", int) if "token_type" in self else [NORMAL] * len(self.tokens)
        self.scores: list[float] = self.list_of("scores", float, int) if "scores" in self else []
        for name, values in (("token types", self.types), ("scores", self.scores)):
            if values and len(values) != len(self.tokens):
                self.fail(f"it has {len(self.tokens)} tokens and {len(values)} {name}")
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
        if not isinstance(values, list) or not values or not set(map(type, values)).issubset(types):
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
                log.warning("%s: no token has the %s_token_id %s: ignored", self._path, key, reprlib.repr(token_id))
        return special_ids

    def special_tokens(self) -> dict[str, str]:
        """By the names that chat templates use."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        return {name: self.tokens[self.special_ids[key]] for key, name in names.items() if key in self.special_ids}

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.get("pre")
        if name in NOT_BYTES:
            self.fail(f"its merges are those of {name}, of characters, and ingle knows only those of bytes")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            log.warning(
                "%s: unknown pre-tokenizer %r: text is split as by llama.cpp's default, and answers may suffer",
                self._path,
                name,
            )
            return DEFAULT
        return PRE_TOKENIZERS[name]

    def strips_right(self) -> frozenset[int]:
        """Phi-3 swallows white space after its turn markers. The format has no word for it: llama.cpp knows it too."""
        if self.kind != "llama" or self._metadata.get("general.architecture") != "phi3":
            return frozenset()
        return frozenset(i for i, token in enumerate(self.tokens) if token not in _PHI3_KEEPS_SPACE_AFTER)

    def sentence_piece(self) -> SentencePieceModel:
        if not self.scores:
            self.fail("tokenizer.ggml.scores is missing")
        return SentencePieceModel(
            self.tokens,
            self.scores,
            self.types,
            unknown_id=self.special_ids.get("unknown"),
            space_prefix="each" if self.flag("add_space_prefix", True) else "none",
        )


def _backend(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    if vocabulary.kind == "gpt2":
        pre_tokenizer = vocabulary.pre_tokenizer()
        backend, tokens = _byte_level(vocabulary, pre_tokenizer), vocabulary.tokens
        add_bos = pre_tokenizer.add_bos
    else:
        model = vocabulary.sentence_piece()
        backend, tokens = backend_of(model), model.tokens
        add_bos = True
    ends, strips = frozenset(vocabulary.end_ids), vocabulary.strips_right()
    add_tokens(backend, tokens, vocabulary.types, also_special=ends, strip_right=strips)
    backend.post_processor = _post_processor(vocabulary, add_bos)
    return backend


def _byte_level(vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer) -> tokenizers.Tokenizer:
    # Two tokens with a space between; one that is a token's own would be its first character.
    pairs = [merge.partition(" ") for merge in vocabulary.list_of("merges", str)]
    merges = [(left, right) if left else _after_space(right) for left, _, right in pairs]
    bpe = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.NFC() if pre_tokenizer.nfc else None
    backend.pre_tokenizer = pre_tokenizer.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _after_space(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return " " + left, right


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
