"""Reader of GGUF, the model file of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The file is mapped, not read, and everything it says about itself is checked before it is used: each count, length,
dimension and offset against the file's own size. Whatever the bytes, opening a file gives a `GgufFile` or `ModelError`.
"""

from __future__ import annotations

import math
import mmap
import re
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ingle.errors import ModelError
from ingle.weights.pointer import refuse_pointer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Far above any real model (a vocabulary of 262k tokens has a header of some 15 MiB and 1.3M array elements). They bound
# the memory and the time that a crafted header can take.
MAX_HEADER_BYTES = 256 << 20
MAX_ARRAY_ELEMENTS = 1 << 23
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
MAX_DIM = 1 << 40
MAX_PARTS = 1000

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_MIN_KEY_VALUE_BYTES = 8 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8


@dataclass(frozen=True)
class BlockType:
    """How ggml stores a tensor type: every `elements` consecutive values of a row take `nbytes` bytes."""

    name: str
    elements: int
    nbytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
"""By the number that GGUF files carry (`enum ggml_type` in ggml.h)."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in its file. `data` stays valid for as long as any view of it is held."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order, rows first: (out_features, in_features) for a linear layer."""
    type: str
    """Name of the block type, such as Q4_1; `unknown-N` for a number that this reader does not know."""
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    """Bytes in the file; 0 for an unknown type."""
    path: Path = field(repr=False)
    _map: mmap.mmap = field(repr=False)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: int) -> GgufTensor:
        """One of the tensors that are stacked in this one, as experts are."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The stored bytes, uint8 `(nbytes,)`, read-only and not copied. Raises `ModelError` for an unknown type."""
        if self.nbytes == 0:
            raise ModelError(f"{self.path}: tensor {self.name} has {self.type}, which ingle does not know")
        import numpy as np

        return np.frombuffer(self._map, dtype=np.uint8, count=self.nbytes, offset=self.offset)


class GgufFile:
    """A GGUF file of version 2 or 3, little endian.

    `metadata` maps keys to bool, int, float, str, or lists of these; `tensors` maps names to `GgufTensor`s in file
    order. A model that is split into `NAME-00001-of-00003.gguf` and so on is read whole from its first file; the
    others add tensors. Strings must be UTF-8, as the format says: a vocabulary repaired with replacement characters
    would be wrong without anyone noticing. Without `texts`, lists of strings are passed over and stay empty: reading a
    vocabulary takes longer than all else, and who runs the model needs none. Raises `ModelError` when the file cannot
    be opened, is no GGUF, or contradicts itself.
    """

    def __init__(self, path: Path | str, *, texts: bool = True) -> None:
        self.path = Path(path)
        self.metadata, self.tensors = _read_file(self.path, texts=texts)
        for part in _other_parts(self.path, self.metadata):
            for name, tensor in _read_file(part, texts=texts)[1].items():
                if name in self.tensors:
                    raise ModelError(f"{part}: has tensor {_short(name)}, as {self.tensors[name].path.name} has")
                self.tensors[name] = tensor

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def parameters_by_type(self) -> dict[str, int]:
        """Elements stored in each type, most first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.num_elements
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def header_needs(path: Path, known: int) -> int:
    """How many bytes of a file's beginning have to be known, of a header that is read over a network.

    Only the first `known` of the file at `path`, which has its whole size, are looked at. They are enough where no more
    than `known` is returned; otherwise at least so many are needed. Raises `ModelError` for a header that is damaged.
    """
    try:
        _read_header(_Header(path, _map_file(path), texts=False, known=known))
    except _HeaderCut as cut:
        return cut.needed
    return known


class _HeaderCut(Exception):
    """The header goes on beyond what is known of the file: it is `needed` at least so far."""

    def __init__(self, needed: int) -> None:
        self.needed = needed


class _Header:
    """A cursor over the start of a mapped file. No read goes past its end, or past the bytes that are `known`; `fail`
    says where the reading stood."""

    def __init__(self, path: Path, mapped: mmap.mmap, *, texts: bool, known: int | None = None) -> None:
        self.path = path
        self.texts = texts
        self.map = mapped
        self.position = 0
        self.end = min(len(mapped), MAX_HEADER_BYTES)
        self.known = self.end if known is None else min(known, self.end)
        self.num_elements_left = MAX_ARRAY_ELEMENTS

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path}: damaged GGUF file: {what} (at byte {self.position} of {len(self.map)})")

    def advance(self, size: int, what: str) -> int:
        """Pass over `size` bytes and return where they start."""
        start = self.position
        if size > self.end - start:
            self.fail(f"{what} needs {size} bytes and {self.end - start} are left")
        if start + size > self.known:
            raise _HeaderCut(start + size)
        self.position = start + size
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.map, self.advance(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.map, self.advance(8, what))[0])

    def count(self, what: str, min_bytes_each: int) -> int:
        """A number of things, of which each takes at least so many of the bytes that are left."""
        count = self.u64(f"the number of {what}")
        if count > (self.end - self.position) // min_bytes_each:
            self.fail(f"it claims {count} {what}, more than its size can hold")
        return count

    def string(self, what: str) -> str:
        size = self.u64(what)
        start = self.advance(size, what)
        try:
            return self.map[start : start + size].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8 text")

    def name(self, what: str) -> str:
        name = self.string(what)
        if not name.isprintable() or not name:
            self.fail(f"{what} is empty or not printable")
        return name

    def read_version(self) -> None:
        if self.map[:4] != _MAGIC:
            refuse_pointer(self.path)
            raise ModelError(f"{self.path}: not a GGUF file: it starts with {self.map[:4]!r} instead of {_MAGIC!r}")
        self.position = 4
        version = self.u32("the version")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise ModelError(f"{self.path}: big-endian GGUF files are not supported; convert it to little endian")
        if version not in _VERSIONS:
            raise ModelError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3 are")

    def read_metadata(self, num_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.name("a metadata key")
            if key in metadata:
                self.fail(f"metadata key {_short(key)} appears twice")
            metadata[key] = self.value(self.u32(f"the type of {_short(key)}"), _short(key), MAX_ARRAY_DEPTH)
        return metadata

    def value(self, type_id: int, key: str, depth: int) -> Any:
        if type_id == _STRING:
            return self.string(key)
        if type_id == _ARRAY:
            return self.array(key, depth)
        return self.scalars(type_id, 1, key)[0]

    def array(self, key: str, depth: int) -> list[Any]:
        if depth == 0:
            self.fail(f"{key} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        type_id = self.u32(f"the element type of {key}")
        count = self.u64(f"the length of {key}")
        if count > self.num_elements_left or count > self.end - self.position:
            self.fail(f"{key} claims {count} elements, more than its size can hold or than any model has")
        self.num_elements_left -= count
        if type_id == _STRING:
            return self.strings(count, key)
        if type_id == _ARRAY:
            return [self.array(key, depth - 1) for _ in range(count)]
        return list(self.scalars(type_id, count, key))

    def strings(self, count: int, key: str) -> list[str]:
        """`string` for the hundreds of thousands of tokens and merges: one loop without calls."""
        data, known, position, wanted = self.map, self.known, self.position, self.texts
        read_size: Callable[[mmap.mmap, int], tuple[int]] = _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_size(data, position)[0]
                if position > known:
                    if known < self.end and (start > known or position <= self.end):
                        raise _HeaderCut(max(start, known + 1))
                    self.fail(f"{key} goes past the end of the file")
                if wanted:
                    strings.append(data[start:position].decode())
        except UnicodeDecodeError:
            self.fail(f"{key}: element {len(strings)} is not UTF-8 text")
        except struct.error:
            self.fail(f"{key} goes past the end of the file")
        self.position = position
        return strings

    def scalars(self, type_id: int, count: int, key: str) -> tuple[Any, ...]:
        if type_id not in _SCALAR_FORMATS:
            self.fail(f"{key} has a value of unknown type {type_id}")
        layout = struct.Struct(f"<{count}{_SCALAR_FORMATS[type_id]}")
        return layout.unpack_from(self.map, self.advance(layout.size, key))

    def read_tensors(self, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self.name("a tensor name")
            if name in infos:
                self.fail(f"tensor {_short(name)} appears twice")
            infos[name] = (self.shape(_short(name)), self.u32(_short(name)), self.u64(_short(name)))
        data_start = -(-self.position // alignment) * alignment
        tensors = {
            name: self.tensor(name, shape, type_id, data_start, offset, alignment)
            for name, (shape, type_id, offset) in infos.items()
        }
        self.refuse_overlaps(tensors)
        return tensors

    def refuse_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        """No byte is stored for two tensors: so together they are no larger than the file."""
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(in_order):
            if after.offset < before.offset + before.nbytes:
                self.fail(f"the tensors {_short(before.name)} and {_short(after.name)} overlap")

    def shape(self, name: str) -> tuple[int, ...]:
        num_dims = self.u32(f"the number of dimensions of {name}")
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"tensor {name} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
        dims = tuple(self.u64(f"a dimension of {name}") for _ in range(num_dims))
        if any(not 1 <= dim <= MAX_DIM for dim in dims):
            self.fail(f"tensor {name} has the impossible dimensions {dims}")
        return dims[::-1]

    def tensor(
        self, name: str, shape: tuple[int, ...], type_id: int, data_start: int, offset: int, alignment: int
    ) -> GgufTensor:
        if offset % alignment:
            self.fail(f"tensor {_short(name)} starts at {offset}, which is no multiple of the alignment {alignment}")
        block = BLOCK_TYPES.get(type_id, BlockType(f"unknown-{type_id}", 1, 0))
        if shape[-1] % block.elements:
            self.fail(f"tensor {_short(name)} has rows of {shape[-1]}, no multiple of {block.name}'s {block.elements}")
        start = data_start + offset
        nbytes = math.prod(shape) // block.elements * block.nbytes
        if start + nbytes > len(self.map):
            raise ModelError(
                f"{self.path}: truncated GGUF file: tensor {_short(name)} ends at byte {start + nbytes} "
                f"and the file at {len(self.map)}; download it again"
            )
        return GgufTensor(name, shape, block.name, start, nbytes, self.path, self.map)


def _read_file(path: Path, *, texts: bool) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors of one file."""
    return _read_header(_Header(path, _map_file(path), texts=texts))


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    header.read_version()
    num_tensors = header.count("tensors", _MIN_TENSOR_INFO_BYTES)
    num_keys = header.count("metadata keys", _MIN_KEY_VALUE_BYTES)
    metadata = header.read_metadata(num_keys)
    return metadata, header.read_tensors(num_tensors, _alignment(header, metadata))


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files beside the first one of a split model; none for a model in one file."""
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise ModelError(f"{path}: split.count is {reprlib.repr(count)}, not a number up to {MAX_PARTS}")
    if count <= 1:
        return []
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count or int(name["number"]) - 1 != metadata.get("split.no"):
        raise ModelError(
            f"{path}: one of {count} parts of a model, but not named so: expected NAME-00001-of-{count:05}.gguf"
        )
    parts = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if path != parts[0]:
        raise ModelError(f"{path}: part {name['number']} of a model in {count} files: give the first, {parts[0].name}")
    return parts[1:]


def _map_file(path: Path) -> mmap.mmap:
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            refuse_pointer(path)
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # what mmap says to an empty file
        raise ModelError(f"{path}: not a GGUF file: it is empty") from error


def _alignment(header: _Header, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        header.fail(f"general.alignment is {reprlib.repr(alignment)}, not a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"
