"""Mistral's tekken.json against tiktoken, which its own reader stands on."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from ingle.errors import ModelError
from ingle.text.load import load_tokenizer
from tests.text import corpora
from tests.text.test_tiktoken import RANKS

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL, SIZE = 30, 1330
SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


def tekken(**changes: Any) -> dict[str, Any]:
    """As Mistral publishes it: with more ranks than the model has, and names for the first special tokens only."""
    config = {"pattern": PATTERN, "num_vocab_tokens": len(RANKS), "default_vocab_size": SIZE,
              "default_num_special_tokens": NUM_SPECIAL, "version": "v7"}  # fmt: skip
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in RANKS.items()
    ]
    special = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIALS)]
    return {"config": config | changes.pop("config", {}), "vocab": vocab, "special_tokens": special, **changes}


def write(folder: Path, content: Any) -> Path:
    (folder / "tekken.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


def test_encodes_and_decodes_as_tiktoken(tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path, tekken()))
    kept = {token: rank for token, rank in RANKS.items() if rank < SIZE - NUM_SPECIAL}
    original = tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=kept, special_tokens={})
    for text in corpora.texts():
        if any(token in text for token in SPECIALS):
            continue
        expected = [NUM_SPECIAL + rank for rank in original.encode(text)]
        assert ours.encode(text, add_special_tokens=False) == expected, repr(text)
        assert ours.encode(text) == [1, *expected]
        assert ours.decode(expected) == text
    assert ours.encode("[INST]</s><SPECIAL_29>", add_special_tokens=False) == [3, 2, 29]
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (SIZE, 1, (2,))
    assert ours.special_token_ids == set(range(NUM_SPECIAL))


def test_files_that_do_not_list_their_special_tokens(tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path, tekken(special_tokens=None)))
    ids = ours.encode("[SYSTEM_PROMPT][TOOL_CONTENT]<SPECIAL_20>", add_special_tokens=False)
    assert ids == [17, 19, 20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a tekken vocabulary"),
        ("[]", "not a tekken vocabulary"),
        ("{}", "has no 'config'"),
        (tekken(vocab=tekken()["vocab"][1:]), "ranks are not 0, 1, 2"),
        (tekken(vocab=[{"rank": 0, "token_bytes": "!"}]), "not a tekken vocabulary"),
        (tekken(vocab=[{"rank": 0, "token_bytes": "YQ=="}]), "single bytes"),
        (tekken(config={"default_num_special_tokens": 10**9}), "default_num_special_tokens is 1000000000"),
        (tekken(config={"default_vocab_size": 7}), "default_vocab_size is 7"),
        (tekken(config={"pattern": "("}), "cannot be built"),
        (tekken(special_tokens=[{"rank": 0, "token_str": 7}]), "no text"),
        (tekken(special_tokens=[{"rank": 0, "token_str": "th"}]), "spelled as another"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_give_one_error(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(write(tmp_path, content))
    assert "tekken.json" in str(caught.value)
