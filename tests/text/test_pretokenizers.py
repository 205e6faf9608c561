"""Byte-level BPE from GGUF metadata equals the tokenizers that models are published with.

One small vocabulary serves them all. It is trained without cutting text into words, so that its merges cross every
border that a pre-tokenizer may draw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer, Qwen3_5Tokenizer

from ingle.text.gguf_tokenizer import tokenizer_from_gguf
from ingle.text.pretokenizers import PRE_TOKENIZERS
from tests.text import corpora


@lru_cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpora.SENTENCES * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def published(*splits: Any, nfc: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """As a tokenizer.json has it: cut by each in turn, then bytes."""
    vocab, merges = vocabulary()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    backend.normalizer = normalizers.NFC() if nfc else None
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def by_transformers(kind: Any) -> Tokenizer:
    vocab, merges = vocabulary()
    backend: Tokenizer = kind(vocab=vocab, merges=merges).backend_tokenizer
    return backend


GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = [
    split(r"\p{N}{1,3}"),
    split("[一-龥\u3040-ゟ゠-ヿ]+"),
    split(
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
]
DEEPSEEK_CODER = [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-\ud7ff]+"), DIGITS]

ORIGINALS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: by_transformers(GPT2Tokenizer),
    "qwen2": lambda: by_transformers(Qwen2Tokenizer),
    "qwen35": lambda: by_transformers(Qwen3_5Tokenizer),
    "smollm": lambda: published(DIGITS, GPT2_WORDS_ONLY),
    "llama-bpe": lambda: published(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: published(split(LLAMA3)),
    "tekken": lambda: published(split(TEKKEN), ignore_merges=True),
    "deepseek-v3": lambda: published(*DEEPSEEK_V3),
    "deepseek-coder": lambda: published(*DEEPSEEK_CODER),
}
GPT2_WORDS_ONLY = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def from_gguf(pre: str) -> Any:
    vocab, merges = vocabulary()
    keys = {"model": "gpt2", "pre": pre, "tokens": list(vocab), "token_type": [1] * len(vocab),
            "merges": [" ".join(merge) for merge in merges], "add_bos_token": False}  # fmt: skip
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, Path("model.gguf"))


@pytest.mark.parametrize("pre", ORIGINALS)
def test_equal_to_the_published_tokenizer(pre: str) -> None:
    ours, original = from_gguf(pre), ORIGINALS[pre]()
    for text in corpora.texts():
        if "<|endoftext|>" in text:
            continue  # a token of its own to transformers, which the vocabulary here lacks
        expected = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, repr(text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pattern_compiles_and_loses_nothing(pre: str) -> None:
    ours = from_gguf(pre)
    for text in corpora.SENTENCES:
        composed = normalizers.NFC().normalize_str(text) if PRE_TOKENIZERS[pre].nfc else text
        assert ours.decode(ours.encode(text)) == composed
