"""Reader of `tokenizer.model`, SentencePiece's file: a protocol buffer, `sentencepiece_model.proto` of its project.

Only the fields that decide how text is tokenized are kept. Nothing is allocated on a length's word: every length is
checked against the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from ingle.errors import ModelError
from ingle.text.sentencepiece_model import BYTE, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel

MAX_BYTES = 64 << 20
MAX_PIECES = 1 << 22

_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises `ModelError` for a file that cannot be read, is damaged, or holds a model that is not unigram or BPE."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"{path}: it has {size} bytes, more than the {MAX_BYTES} that are taken")
        return _model(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error


def _model(raw: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for field, value in _fields(raw):
        if field == 1:
            piece, score, piece_type = _piece(_as_bytes(value))
            pieces.append(piece)
            scores.append(score)
            types.append(piece_type)
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
        elif field == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"it has {len(pieces)} pieces and is of kind {kind!r}; unigram, 1, and BPE, 2, are known")
    if UNKNOWN not in types:
        raise ValueError("it has no piece for what it does not know")
    has_prefix, trims_spaces = bool(normalizer.get(3, True)), bool(normalizer.get(4, True))
    has_symbols = any(piece and kind == USER_DEFINED for piece, kind in zip(pieces, types, strict=True))
    return SentencePieceModel(
        pieces,
        scores,
        types,
        unknown_id=types.index(UNKNOWN),
        unigram=kind == _UNIGRAM,
        space_prefix="each" if has_prefix else "none",
        space_suffix=bool(trainer.get(24, False)),
        # Where neither adds nor takes spaces, text between symbols is prepared as well by itself, and faster.
        symbols_within=has_symbols and (has_prefix or trims_spaces),
        trims_spaces=trims_spaces,
        charsmap=_as_bytes(normalizer.get(2, b"")),
    )


def _piece(raw: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(raw))
    score, kind = fields.get(2, 0), fields.get(3, NORMAL)
    if not isinstance(kind, int) or not NORMAL <= kind <= BYTE:
        raise ValueError(f"it has a piece of type {kind!r}")
    return _as_bytes(fields.get(1, b"")).decode(), _float(score), kind


def _float(value: bytes | int) -> float:
    """A 32-bit field. NaN has no place among scores that are compared."""
    number: float = struct.unpack("<f", struct.pack("<I", value))[0] if isinstance(value, int) else float("nan")
    if number != number:
        raise ValueError("it has a piece whose score is no number")
    return number


def _as_bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("it has a number where text should be")
    return value


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message."""
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(raw, position)
            yield field, value
            continue
        size, position = _varint(raw, position) if wire_type == _BYTES else (_fixed_size(wire_type), position)
        if size > len(raw) - position:
            raise ValueError(f"it is cut off: {size} bytes should follow byte {position}, of {len(raw)}")
        payload = raw[position : position + size]
        yield field, payload if wire_type == _BYTES else int.from_bytes(payload, "little")
        position += size


def _fixed_size(wire_type: int) -> int:
    if wire_type not in (_FIXED32, _FIXED64):
        raise ValueError(f"it has a field of the unknown wire type {wire_type}")
    return 4 if wire_type == _FIXED32 else 8


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits to the byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        if position >= len(raw) or shift > 63:
            raise ValueError("it has a number that does not end")
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
