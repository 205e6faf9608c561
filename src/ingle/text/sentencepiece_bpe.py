"""SentencePiece's own merging (`src/bpe_model.cc` of its project), for what the `tokenizers` library cannot do.

There every pair has a rank, and no two are equal. Here pieces have scores: of neighbours that make equally good pieces
those furthest to the left are joined first, wherever in the text the others stand. Vocabularies that were extended
with pieces of score 0 have thousands of such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from tokenizers import Token

from ingle.text.sentencepiece_model import BYTE, NORMAL, USER_DEFINED, SentencePieceModel

_MAX_CACHED = 1 << 16
_MAX_CACHED_CHARS = 64


class MergesByScore:
    """A pre-tokenizer for `PreTokenizer.custom` that does the model's work: the pieces it finds are the tokens."""

    def __init__(self, model: SentencePieceModel) -> None:
        pieces = list(zip(model.tokens, model.scores, model.types, strict=True))
        self._costs = {piece: -score for piece, score, kind in pieces if kind == NORMAL}
        self._ids = {piece: index for index, (piece, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
        byte_ids = {piece: index for index, (piece, _, kind) in enumerate(pieces) if kind == BYTE}
        spelled = [f"<0x{byte:02X}>" for byte in range(256)]
        self._bytes = [(byte_ids[name], name) for name in spelled] if byte_ids.keys() >= set(spelled) else []
        self._unknown = None if model.unknown_id is None else (model.unknown_id, model.tokens[model.unknown_id])
        self._symbols = re.compile(model.symbol_pattern) if model.symbols_within else None
        # No piece goes across two neighbours that stand beside each other in none: what lies between two such places
        # merges by itself, and words recur.
        self._neighbours = frozenset(pair for piece in self._costs for pair in map("".join, pairwise(piece)))
        self._known: dict[str, tuple[str, ...]] = {}

    def pre_tokenize(self, text: Any) -> None:
        text.tokenize(self.tokenize)

    def tokenize(self, text: str) -> list[Token]:
        """The tokens of normalized text. Their offsets are in bytes of it, as the library counts."""
        tokens: list[Token] = []
        end, after_unknown = 0, False
        for piece in self._pieces(text):
            start, end = end, end + len(piece.encode())
            token_id = self._ids.get(piece)
            if token_id is not None:
                tokens.append(Token(token_id, piece, (start, end)))
            elif self._bytes:
                tokens += [Token(*self._bytes[byte], (start, end)) for byte in piece.encode()]
            elif self._unknown is not None:
                if after_unknown:  # a run of them is one token
                    start = tokens.pop().offsets[0]
                tokens.append(Token(*self._unknown, (start, end)))
            after_unknown = token_id is None
        return tokens

    def _pieces(self, text: str) -> Iterator[str]:
        position = 0
        for symbol in self._symbols.finditer(text) if self._symbols is not None else ():
            yield from self._words(text[position : symbol.start()])
            yield symbol[0]
            position = symbol.end()
        yield from self._words(text[position:])

    def _words(self, text: str) -> Iterator[str]:
        start = 0
        for index in range(1, len(text) + 1):
            if text[index - 1 : index + 1] not in self._neighbours:
                yield from self._merged(text[start:index])
                start = index

    def _merged(self, word: str) -> tuple[str, ...]:
        if len(word) < 2:
            return (word,)
        merged = self._known.get(word)
        if merged is None:
            merged = self._merge(word)
            if len(word) <= _MAX_CACHED_CHARS:
                if len(self._known) >= _MAX_CACHED:
                    self._known.clear()
                self._known[word] = merged
        return merged

    def _merge(self, word: str) -> tuple[str, ...]:
        """Joins the neighbours that make the best piece until none do; time grows as n log n."""
        costs, pieces, last = self._costs, [*word], len(word) - 1
        before, after = [*range(-1, last)], [*range(1, last + 2)]
        best = [
            (costs[pair], index, index + 1, 2)
            for index, pair in enumerate(map("".join, pairwise(word)))
            if pair in costs
        ]
        heapify(best)
        while best:
            _, left, right, size = heappop(best)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != size:
                continue  # one of them has been joined to another since
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[left] <= last:
                before[after[left]] = left
            for first, second in ((before[left], left), (left, after[left])):
                if first >= 0 and second <= last:
                    joined = pieces[first] + pieces[second]
                    if joined in costs:
                        heappush(best, (costs[joined], first, second, len(joined)))
        return tuple(filter(None, pieces))
