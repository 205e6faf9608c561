"""The headers of weight files that lie on a hub: what says which tensors they hold, and no more of them.

Beside the headers come the few numbers that decide what a model is: factors of rotary embeddings that GGUF keeps as
tensors, and the beginnings of head and embedding, which tell whether the two are one.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ingle.hub.pieces import Hollow, Pieces
from ingle.weights.gguf import GgufFile, header_needs
from ingle.weights.source import BEGINNING_BYTES
from ingle.weights.torch_pickle import PickleError, read_state_dict

MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""As the format's own reader has it."""
_MAX_PICKLE_BYTES = 32 << 20
_MAX_DIRECTORY_BYTES = 16 << 20
_MAX_MEMBERS = 50_000
_MEMBER_HEADER_BYTES = 1 << 10
_SAFETENSORS_PIECE, _GGUF_PIECE, _TAIL_PIECE = 128 << 10, 2 << 20, 64 << 10
"""What is asked for first: most headers are smaller."""
_MAX_FACTORS_BYTES = 1 << 20
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_HEADS_AND_EMBEDDINGS = (
    *("lm_head.weight", "output.weight", "embed_out.weight", "output_layer.weight"),
    *("embed_tokens.weight", "token_embd.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight",
      "tok_embeddings.weight"),
)  # fmt: skip


def take_safetensors(pieces: Pieces, file: Hollow) -> None:
    """What is wrong with a header is left to its reader to tell. Raises `HubError`."""
    head = pieces.take(file, 0, _SAFETENSORS_PIECE)
    assert file.size is not None
    end = 8 + int.from_bytes(head[:8], "little")
    if end > min(file.size, 8 + MAX_SAFETENSORS_HEADER_BYTES):
        return
    if end > len(head):
        head += pieces.take(file, len(head), end - len(head))
    for start, stop in _places(head[8:end]):
        if 0 <= start < stop <= file.size - end:
            pieces.take(file, end + start, min(stop - start, BEGINNING_BYTES))


def _places(header: bytes) -> list[tuple[int, int]]:
    """Of head and embedding, in the bytes after the header."""
    if not any(name.encode() in header for name in _HEADS_AND_EMBEDDINGS):
        return []
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return []
    places = [_offsets(entry) for name, entry in entries.items() if name.endswith(_HEADS_AND_EMBEDDINGS)]
    return [place for place in places if place is not None][: len(_HEADS_AND_EMBEDDINGS)]


def _offsets(entry: object) -> tuple[int, int] | None:
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return offsets[0], offsets[1]
    return None


def take_gguf_header(pieces: Pieces, file: Hollow, *, is_first: bool) -> None:
    """Raises `HubError`, and `ModelError` for a damaged one. Of a split model the first part holds the vocabulary."""
    known = len(pieces.take(file, 0, _GGUF_PIECE if is_first else _SAFETENSORS_PIECE))
    while (needed := header_needs(file.path, known)) > known:
        known += len(pieces.take(file, known, max(needed - known, known)))


def take_gguf_numbers(pieces: Pieces, files: Iterable[Hollow]) -> None:
    """Of a model all of whose headers are here; `files` are its parts, the first one first."""
    by_path = {file.path: file for file in files}
    tensors = GgufFile(next(iter(by_path)), texts=False).tensors
    for name in (*_FACTORS, "output.weight", "token_embd.weight"):
        tensor = tensors.get(name)
        if tensor is not None:
            most = _MAX_FACTORS_BYTES if name in _FACTORS else BEGINNING_BYTES
            pieces.take(by_path[tensor.path], tensor.offset, min(tensor.nbytes, most))


class _Member(NamedTuple):
    """Of an archive."""

    start: int
    name: str
    size: int


def take_torch(pieces: Pieces, file: Hollow) -> None:
    """Of an archive of torch.save: its directory, its pickle, and where each storage begins.

    What is wrong with it is left to its reader to tell. Raises `HubError`.
    """
    if file.size is None:
        pieces.take(file, 0, 1)
    size = file.size or 0
    tail = min(size, _TAIL_PIECE)
    pieces.take(file, size - tail, tail)
    begins = _directory_begins(file, size)
    if begins is None or not 0 < size - begins <= _MAX_DIRECTORY_BYTES:
        return
    if begins < size - tail:
        pieces.take(file, begins, size - tail - begins)
    members = sorted(_members(file))
    if len(members) > _MAX_MEMBERS:
        return
    ends = [*(member.start for member in members[1:]), begins]
    wanted = set[str]()
    for member, end in zip(members, ends, strict=True):
        base = member.name.rpartition("/")[2]
        if base in ("data.pkl", "byteorder") and member.start + member.size < end <= size:
            data = pieces.take(file, member.start, min(end - member.start, _MAX_PICKLE_BYTES))
            if base == "data.pkl":
                wanted = _storages_to_sample(data, member)
    for member in members:
        folder, _, key = member.name.rpartition("/")
        if folder.endswith("data") and 0 <= member.start < size:
            if key in wanted:
                pieces.take(file, member.start, _MEMBER_HEADER_BYTES + BEGINNING_BYTES)
            else:
                file.write(member.start, _local_header(member))


def _directory_begins(file: Hollow, size: int) -> int | None:
    """Where the archive's directory stands, by its last record, or by the one of archives beyond 4 GiB."""
    with file.path.open("rb") as opened:
        opened.seek(max(size - _TAIL_PIECE, 0))
        tail = opened.read(_TAIL_PIECE)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        return None
    begins = int.from_bytes(tail[at + 16 : at + 20], "little")
    wide = tail.rfind(b"PK\x06\x06", 0, at)
    if begins == 0xFFFFFFFF and wide >= 0:
        begins = int.from_bytes(tail[wide + 48 : wide + 56], "little")
    return begins


def _members(file: Hollow) -> list[_Member]:
    try:
        with zipfile.ZipFile(file.path) as archive:
            return [_Member(each.header_offset, each.filename, each.file_size) for each in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def _storages_to_sample(data: bytes, member: _Member) -> set[str]:
    """The storages of head and embedding, by the pickle and the archive's header before it."""
    begin = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    try:
        tensors = read_state_dict(data[begin : begin + member.size])
    except PickleError:
        return set()
    return {tensor.storage for name, tensor in tensors.items() if name.endswith(_HEADS_AND_EMBEDDINGS)}


def _local_header(member: _Member) -> bytes:
    """What stands before a member's bytes: only its length is ever asked for, and without the bytes it may be any."""
    return b"PK\x03\x04" + bytes(22) + len(member.name.encode()).to_bytes(2, "little") + bytes(2)
