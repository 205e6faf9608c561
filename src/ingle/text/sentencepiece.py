"""SentencePiece (https://arxiv.org/abs/1808.06226) as a tokenizer of the `tokenizers` library.

Vocabularies come from `tokenizer.model` files (`sentencepiece_file`) and from GGUF metadata (`gguf_tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, `ModelProto.SentencePiece.Type`; GGUF's token types are the same."""

SPACE = "▁"

# The pairs that a vocabulary is cut into take memory that grows with the squares of its pieces' lengths. Real ones of
# 256k pieces come to some 3e7.
MAX_SQUARED_LENGTHS = 1 << 28

_NEVER = -1e6


@dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary whose pieces, scores and types have the same length, and how text is prepared for it."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    unknown_id: int | None
    unigram: bool = False
    """The most likely pieces by their scores (https://arxiv.org/abs/1804.10959), not merges of the best neighbours."""
    space_prefix: Literal["each", "first", "none"] = "each"
    """A space is put before each stretch of text between special tokens, or only where the text begins, or nowhere."""
    trims_spaces: bool = False
    """Runs of spaces count for one, and for none at the ends."""
    charsmap: bytes = b""
    """Compiled normalization rules; empty for none. The library that applies them loses some combining marks, as it
    does in transformers."""

    @property
    def byte_fallback(self) -> bool:
        return BYTE in self.types

    @cached_property
    def tokens(self) -> list[str]:
        """The pieces, with user-defined runs of spaces spelled as they are looked for: in the text as it comes where
        that gets a prefix, else in the normalized text."""
        spelling = SPACE if self.space_prefix == "none" else " "
        return [
            spelling * len(piece) if kind == USER_DEFINED and not piece.strip(f"{SPACE} ") else piece
            for piece, kind in zip(self.pieces, self.types, strict=True)
        ]


def backend_of(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """Raises `ValueError` for a vocabulary that contradicts itself. Tokens to be found in text are added afterwards."""
    tokens = model.tokens
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens) - len(set(tokens))} of its {len(tokens)} pieces appear twice")
    backend = tokenizers.Tokenizer(_unigram(model) if model.unigram else _bpe(model))
    backend.normalizer = _normalizer(model)
    if model.space_prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    to_text: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.space_prefix != "none":
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trims_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.space_prefix == "each":
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def add_tokens(
    backend: tokenizers.Tokenizer,
    tokens: list[str],
    types: list[int],
    also_special: frozenset[int] = frozenset(),
    strip_right: frozenset[int] = frozenset(),
) -> None:
    """The tokens that are looked for in text before all others: control and user-defined ones.

    Control tokens, and the ids `also_special`, are left out of decoded text. After the ids `strip_right`, white space
    in the text counts for nothing.
    """
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        strip = index in strip_right
        if kind in (UNKNOWN, CONTROL) or index in also_special:
            special.append(AddedToken(token, normalized=False, special=True, rstrip=strip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=not token.strip(SPACE), special=False, rstrip=strip))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _bpe(model: SentencePieceModel) -> models.BPE:
    return models.BPE(
        vocab={token: index for index, token in enumerate(model.tokens)},
        merges=_merges(model),
        unk_token=None if model.unknown_id is None else model.tokens[model.unknown_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    # Control and byte pieces are never read from text by their spelling: it has to lose to every other reading.
    scores = [
        score if kind in (NORMAL, USER_DEFINED) else _NEVER
        for score, kind in zip(model.scores, model.types, strict=True)
    ]
    vocab = list(zip(model.tokens, scores, strict=True))
    return models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best-scored piece: all cuts of pieces in two, best first."""
    if sum(length**2 for length in map(len, model.pieces)) > MAX_SQUARED_LENGTHS:
        raise ValueError("its pieces are longer than any real vocabulary's")
    from ingle.text.merges import merges_of  # NumPy, which a tokenizer.json does without

    best_first = sorted(range(len(model.pieces)), key=model.scores.__getitem__, reverse=True)
    return merges_of([model.pieces[index] for index in best_first if model.types[index] == NORMAL])
