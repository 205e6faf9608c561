"""From token ids to text, one token at a time: the joined pieces are exactly what `tokenizers` decodes from all ids.

What a decoder makes of a sequence follows the Rust sources of the `tokenizers` library (`tokenizers/src/decoders`), of
which two shapes matter for language models: byte-level BPE, and the SentencePiece-like chain of replaced spaces and
byte fallback. Any other decoder gives its text at the end.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

_UNFINISHED_BYTES = 3
"""Most that a text can end with of a character in UTF-8."""


class Detokenizer(Protocol):
    """The text of one growing sequence. No piece ends within a character."""

    @property
    def num_held(self) -> int:
        """Whole characters of the tokens so far that were not given out, since what follows may change them."""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""

    def settle(self) -> str:
        """What is held of whole characters, to stand as it is: a prompt ends here, and its answer begins."""

    def flush(self) -> str:
        """The rest, when no token follows. An unfinished character becomes U+FFFD."""


class Decoding(Protocol):
    """How the tokens of one vocabulary become text."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for amid a text; empty for an id that the vocabulary lacks."""

    def detokenizer(self, skipped: Set[int], after: Sequence[int] = ()) -> Detokenizer:
        """For a new sequence, or what follows a prompt. The tokens `skipped` leave no trace.

        The prompt's text and that of the detokenizer are together what all of the tokens decode to.
        """


def decoding_of(backend: Any) -> Decoding:
    """The decoding that a `tokenizers.Tokenizer` asks for."""
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteLevel(backend)
    rules = _SentencePieceRules()
    if steps and all(rules.take(step) for step in steps):
        return _SentencePiece(backend, rules)
    return _Opaque(backend)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


class _ByteLevel(dict[int, bytes]):
    """Token id to bytes, filled as ids are met: a whole vocabulary would cost tenths of a second at start."""

    def __init__(self, backend: Any) -> None:
        self._token_of: Callable[[int], str | None] = backend.id_to_token

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        if token is None:
            return b""
        try:
            value = bytes(map(BYTE_OF_CHAR.__getitem__, token))
        except KeyError:  # an added token, which stands for its own text
            value = token.encode()
        self[token_id] = value
        return value

    def token_bytes(self, token_id: int) -> bytes:
        return self[token_id]

    def detokenizer(self, skipped: Set[int], after: Sequence[int] = ()) -> Detokenizer:
        detokenizer = _ByteLevelDetokenizer(self, skipped)
        last: list[int] = []
        num_bytes = 0
        for token_id in reversed(after):
            if num_bytes >= _UNFINISHED_BYTES:
                break
            if token_id not in skipped:
                last.append(token_id)
                num_bytes += len(self[token_id])
        for token_id in reversed(last):
            detokenizer.push(token_id)
        return detokenizer


class _ByteLevelDetokenizer:
    num_held = 0

    def __init__(self, bytes_of: _ByteLevel, skipped: Set[int]) -> None:
        self._bytes_of = bytes_of
        self._skipped = skipped
        # Both this and Rust's `from_utf8_lossy` write one U+FFFD per maximal invalid subpart (Unicode 3.9, U+FFFD).
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decode(self._bytes_of[token_id])

    def settle(self) -> str:
        return ""

    def flush(self) -> str:
        return self._decode(b"", True)


class _SentencePieceRules:
    """What a decoder's steps come to, when they are those of SentencePiece-like models."""

    def __init__(self) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.byte_fallback = False
        self.metaspace: tuple[str, bool] | None = None
        """The mark of a space, and whether those of the first piece are dropped."""
        self.strip = ("", 0)
        """A character, and how many of it are taken off the start of the text."""
        self._fused = False

    def take(self, step: dict[str, Any]) -> bool:
        """Whether this step can follow those before it and still be done piece by piece."""
        kind = step["type"]
        if kind == "Fuse":
            self._fused = True
        elif kind == "Strip" and self._fused and step["stop"] == 0 and self.strip[1] == 0:
            self.strip = (step["content"], step["start"])
        elif self._fused or self.metaspace is not None:
            return False
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Metaspace":
            self.metaspace = (step["replacement"], step["prepend_scheme"] != "never")
        elif kind == "Replace" and step["pattern"].get("String") and not self.byte_fallback:
            self.replacements.append((step["pattern"]["String"], step["content"]))
        else:
            return False
        return True

    def piece(self, token: str) -> str | int:
        """The text of a token, or the value of a byte token such as `<0x0A>`."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            digits = token[3:5]
            if all(
                digit in "0123456789abcdefABCDEF" for digit in digits.removeprefix("+")
            ):  # as Rust parses: "+F" is 15
                return int(digits, 16)
        return token


class _SentencePiece(dict[int, "str | int | None"]):
    """Token id to piece, filled as ids are met."""

    def __init__(self, backend: Any, rules: _SentencePieceRules) -> None:
        self._token_of: Callable[[int], str | None] = backend.id_to_token
        self.rules = rules

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._token_of(token_id)
        if token is None:
            return None
        self[token_id] = piece = self.rules.piece(token)
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        piece = self[token_id]
        if isinstance(piece, int):
            return bytes([piece])
        if piece is not None and self.rules.metaspace is not None:
            piece = piece.replace(self.rules.metaspace[0], " ")
        return (piece or "").encode()

    def detokenizer(self, skipped: Set[int], after: Sequence[int] = ()) -> Detokenizer:
        detokenizer = _SentencePieceDetokenizer(self, skipped)
        begun = 0
        while begun < len(after) and not detokenizer.begun:
            detokenizer.push(after[begun])
            begun += 1
        run = len(after)
        while run > begun and self._goes_on(after[run - 1], skipped):
            run -= 1
        for token_id in after[run:]:
            detokenizer.push(token_id)
        detokenizer.settle()
        return detokenizer

    def _goes_on(self, token_id: int, skipped: Set[int]) -> bool:
        """Whether a run of byte tokens that comes before this token does not end with it."""
        return token_id in skipped or not isinstance(self[token_id], str)


class _SentencePieceDetokenizer:
    """A run of byte tokens is held until it ends: one invalid byte turns all of the run into U+FFFD, one per byte."""

    def __init__(self, pieces: _SentencePiece, skipped: Set[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._run = bytearray()
        self._num_settled = 0
        """Bytes of the run whose text was given out."""
        self._metaspace = pieces.rules.metaspace
        self._at_first_piece = True
        self._strip, self._strip_left = pieces.rules.strip

    @property
    def begun(self) -> bool:
        """Whether what stands before the next token no longer matters for it."""
        at_first_piece = self._at_first_piece and self._metaspace is not None
        return not (at_first_piece or self._strip_left or self._run)

    @property
    def num_held(self) -> int:
        return len(_whole_characters(self._run[self._num_settled :])[0])

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces[token_id]
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if piece is None:  # an id without a token
            return ""
        return self.flush() + self._finish(piece)

    def settle(self) -> str:
        text, num_bytes = _whole_characters(self._run[self._num_settled :])
        self._num_settled += num_bytes
        return self._finish(text) if text else ""

    def flush(self) -> str:
        rest = self._run[self._num_settled :]
        try:
            self._run.decode()
            text = rest.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(rest)
        self._run.clear()
        self._num_settled = 0
        return self._finish(text) if text else ""

    def _finish(self, piece: str) -> str:
        if self._metaspace is not None:
            mark, drop_first = self._metaspace
            piece = piece.replace(mark, "" if drop_first and self._at_first_piece else " ")
            self._at_first_piece = False
        if self._strip_left and piece:
            kept = piece
            while self._strip_left and kept.startswith(self._strip):
                kept = kept[1:]
                self._strip_left -= 1
            if kept:
                self._strip_left = 0
            return kept
        return piece


def _whole_characters(run: bytearray) -> tuple[str, int]:
    """What is certain of a run of byte tokens that may go on, and how many of its bytes that is."""
    try:
        return run.decode(), len(run)
    except UnicodeDecodeError as error:
        if error.end == len(run) and error.reason == "unexpected end of data":
            return run[: error.start].decode(), error.start
        return "\ufffd" * len(run), len(run)


class _Opaque:
    """A decoder that may change what it wrote earlier, for all that is known: the text comes whole."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def token_bytes(self, token_id: int) -> bytes:
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def detokenizer(self, skipped: Set[int], after: Sequence[int] = ()) -> Detokenizer:
        detokenizer = _WholeTextDetokenizer(self._backend, skipped, after)
        detokenizer.settle()
        return detokenizer


class _WholeTextDetokenizer:
    num_held = 0

    def __init__(self, backend: Any, skipped: Set[int], after: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._token_ids = [token_id for token_id in after if token_id not in skipped]
        self._settled = ""

    def push(self, token_id: int) -> str:
        if token_id not in self._skipped:
            self._token_ids.append(token_id)
        return ""

    def settle(self) -> str:
        text: str = self._backend.decode(self._token_ids, skip_special_tokens=False) if self._token_ids else ""
        # The decoder may write the end of a text otherwise once more follows.
        same = (ours == theirs for ours, theirs in zip(self._settled, text, strict=False))
        known = sum(itertools.takewhile(bool, same))
        self._settled = text
        return text[known:]

    def flush(self) -> str:
        text = self.settle()
        self._token_ids.clear()
        self._settled = ""
        return text


def _byte_to_char() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_OF_CHAR = {char: byte for byte, char in _byte_to_char().items()}
