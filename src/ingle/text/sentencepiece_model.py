"""A SentencePiece vocabulary and how text is prepared for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, `ModelProto.SentencePiece.Type`; GGUF's token types are the same."""

SPACE = "▁"


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
    space_suffix: bool = False
    """That space is put behind the text instead, as words end in their spaces."""
    symbols_within: bool = False
    """User-defined pieces are looked for in the prepared text, as SentencePiece does, and get no space of their own;
    else in the text as it comes, as llama.cpp does."""
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
        spelling = SPACE if self.space_prefix == "none" or self.symbols_within else " "
        return [
            spelling * len(piece) if kind == USER_DEFINED and not piece.strip(f"{SPACE} ") else piece
            for piece, kind in zip(self.pieces, self.types, strict=True)
        ]

    @property
    def added_types(self) -> list[int]:
        """The types by which `add_tokens` knows what is looked for in text before it is prepared."""
        within = self.symbols_within
        return [NORMAL if within and kind == USER_DEFINED else kind for kind in self.types]

    @cached_property
    def symbols_by_length(self) -> list[str]:
        """The user-defined pieces, the longest first: of those that begin in one place, that one counts."""
        symbols = [piece for piece, kind in zip(self.tokens, self.types, strict=True) if kind == USER_DEFINED]
        return sorted(filter(None, symbols), key=len, reverse=True)

    @property
    def symbol_pattern(self) -> str:
        """Of a regular expression for the user-defined pieces."""
        return "|".join(map(re.escape, self.symbols_by_length))
