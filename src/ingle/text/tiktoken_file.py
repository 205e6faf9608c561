"""Reader of tiktoken vocabularies (https://github.com/openai/tiktoken): a line for each token, its bytes in base64 and
its rank. The ranks are the ids, and the pair that makes the token of the lowest rank is merged first."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ingle.errors import ModelError
from ingle.text.detokenizer import BYTE_OF_CHAR
from ingle.text.pretokenizers import PreTokenizer
from ingle.text.sentencepiece import MAX_SQUARED_LENGTHS

MAX_BYTES = 64 << 20

_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def read_tiktoken(path: Path, pre_tokenizer: PreTokenizer, special_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary; `special_tokens` have the ids after it, in their order.

    Raises `ModelError` for a file that cannot be read or whose ranks are not 0, 1, 2 and so on.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{path}: it has {size} bytes, more than the {MAX_BYTES} that are taken")
        backend = byte_level_bpe(_tokens(path.read_bytes()), pre_tokenizer)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not a tiktoken vocabulary: {error}") from error
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return backend


def byte_level_bpe(
    tokens: Sequence[bytes], pre_tokenizer: PreTokenizer, before: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """Of tokens in the order of their ranks, whose ids come after those of the special tokens `before`.

    Raises `ValueError` for tokens that cannot make one.
    """
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens) - len(set(tokens))} of its {len(tokens)} tokens appear twice")
    if sum(len(token) ** 2 for token in tokens) > MAX_SQUARED_LENGTHS:
        raise ValueError("its tokens are longer than any real vocabulary's")
    if not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ValueError("some single bytes are no tokens, so that not every text could be written")
    spelled = [_spelled(token) for token in tokens]
    vocabulary = {token: index for index, token in enumerate([*before, *spelled])}
    if len(vocabulary) != len(before) + len(tokens):
        raise ValueError("a special token is spelled as another token is")
    # A word that is a token is taken whole, as tiktoken does before it merges.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(spelled), ignore_merges=True))
    backend.normalizer = normalizers.NFC() if pre_tokenizer.nfc else None
    backend.pre_tokenizer = pre_tokenizer.build()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in before])
    return backend


def _tokens(raw: bytes) -> list[bytes]:
    """In the order of their ranks."""
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(filter(None, raw.splitlines()), 1):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
            raise ValueError(f"line {number} is not a token in base64 and its rank")
        if int(parts[1]) in by_rank:
            raise ValueError(f"line {number} has the rank of another")
        by_rank[int(parts[1])] = base64.b64decode(parts[0], validate=True)
    tokens = [by_rank.get(rank, b"") for rank in range(len(by_rank))]
    if not tokens or not all(tokens):
        raise ValueError("its ranks are not 0, 1, 2 and so on, a token to each")
    return tokens


def _spelled(token: bytes) -> str:
    return "".join(map(_CHAR_OF_BYTE.__getitem__, token))


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    """All cuts of tokens in two tokens, the lowest rank first."""
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]
