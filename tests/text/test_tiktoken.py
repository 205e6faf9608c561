"""The first Qwen's vocabulary file against tiktoken itself."""

from __future__ import annotations

import base64
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.errors import ModelError
from ingle.text.load import load_text_side, load_tokenizer
from ingle.text.pretokenizers import QWEN
from ingle.text.tiktoken_file import read_tiktoken
from ingle.text.tokenizer import Tokenizer
from tests.text import corpora

# As `tokenization_qwen.py` of Qwen-7B has them.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def trained_ranks(size: int = 1500) -> dict[bytes, int]:
    """Byte-pair encoding by its definition: the most frequent pair of the corpus becomes the next token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([b]) for b in sentence.encode()] for sentence in corpora.SENTENCES]
    while len(ranks) < size:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


RANKS = trained_ranks()
ORIGINAL = tiktoken.Encoding(
    "qwen", pat_str=PATTERN, mergeable_ranks=RANKS,
    special_tokens={token: i for i, token in enumerate(SPECIALS, len(RANKS))},
)  # fmt: skip


def write(folder: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("qwen")))


def test_encodes_and_decodes_as_tiktoken(ours: Tokenizer) -> None:
    for text in corpora.texts():
        composed = unicodedata.normalize("NFC", text)  # so does Qwen's own tokenizer
        expected = ORIGINAL.encode(composed, allowed_special="all")
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected, skip_special_tokens=False) == composed


def test_special_tokens(ours: Tokenizer) -> None:
    text = "<|im_start|>user\n你好<|im_end|><|extra_204|>"
    assert ours.encode(text) == ORIGINAL.encode(text, allowed_special="all")
    assert ours.encode("<|endoftext|>") == [len(RANKS)] and ours.eos_token_ids == (len(RANKS),)
    assert (ours.vocab_size, ours.bos_token_id) == (len(RANKS) + 208, None)
    assert ours.decode(ours.encode(text)) == "user\n你好"


def test_chat_format_of_the_first_qwen(tmp_path: Path) -> None:
    write(tmp_path)
    assert load_text_side(tmp_path).chat_template is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": len(RANKS)}))
    side = load_text_side(tmp_path)
    assert side.chat_template is not None
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": ""},
    ]
    assert side.chat_template.render(conversation) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert side.chat_template.render([{"role": "system", "content": "S"}, *conversation[:1]]).startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi"
    )
    assert side.tokenizer.eos_token_ids == (len(RANKS), len(RANKS) + 2)


SINGLES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    "raw, message",
    [
        ("", "ranks are not 0, 1, 2"),
        ("YQ==", "line 1 is not a token"),
        ("YQ== x", "line 1 is not a token"),
        ("YQ== 99999999999", "line 1 is not a token"),
        ("!! 0", "base64"),
        ("YQ== 1", "ranks are not 0, 1, 2"),
        ("YQ== 0\nYg== 0", "line 2 has the rank of another"),
        ("YQ== 0\nYQ== 1", "appear twice"),
        ("YQ== 0", "some single bytes are no tokens"),
    ],
)
def test_damaged_vocabularies(tmp_path: Path, raw: str, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_text(raw)
    with pytest.raises(ModelError, match=rf"qwen\.tiktoken: not a tiktoken vocabulary: .*{message}"):
        read_tiktoken(tmp_path / "qwen.tiktoken", QWEN, SPECIALS)


def test_tokens_longer_than_any_real_ones(tmp_path: Path) -> None:
    write(tmp_path, SINGLES | {b"x" * 20_000: 256})
    with pytest.raises(ModelError, match="longer than any"):
        load_tokenizer(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=2000)
def test_any_bytes_give_one_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "qwen.tiktoken"
    path.write_bytes(raw)
    with pytest.raises(ModelError):
        read_tiktoken(path, QWEN, SPECIALS)
