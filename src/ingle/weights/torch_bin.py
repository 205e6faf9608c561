"""Reader of PyTorch checkpoints, `pytorch_model.bin` and its shards: the zip archives that `torch.save` writes.

The archive holds a pickle that describes the tensors, read by `torch_pickle`, and one file of bytes for each storage.
Archives are mapped; nothing in them is executed, and every size is checked against the file.
"""

from __future__ import annotations

import mmap
import zipfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import NoReturn

import torch

from ingle.errors import ModelError
from ingle.weights.pointer import refuse_pointer
from ingle.weights.torch_pickle import PickleError, SavedTensor, read_state_dict

MAX_PICKLE_BYTES = 32 << 20
MAX_SHARING = 4
"""How often a storage may be held: tied tensors are the same one, and a slice may stand beside the whole."""

_LOCAL_HEADER_BYTES = 30
_TYPES = {
    "BFloat16Storage": (torch.bfloat16, "BF16"),
    "HalfStorage": (torch.float16, "F16"),
    "FloatStorage": (torch.float32, "F32"),
    "DoubleStorage": (torch.float64, "F64"),
}
_OTHER_TYPES = {
    "BoolStorage": (torch.bool, "BOOL"),
    "ByteStorage": (torch.uint8, "U8"),
    "CharStorage": (torch.int8, "I8"),
    "ShortStorage": (torch.int16, "I16"),
    "IntStorage": (torch.int32, "I32"),
    "LongStorage": (torch.int64, "I64"),
}
"""Of tensors that are copied, and never multiplied."""


class TorchFile:
    """One archive. Raises `ModelError` for a file that is missing, damaged, or more than a dict of plain tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # opening a named pipe would wait for a writer
            self.fail("no such file")
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                self._members = {member.filename: member for member in archive.infolist()}
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch wants writable memory
        except (OSError, ValueError, NotImplementedError) as error:
            self.fail(f"cannot be read: {error}")
        except zipfile.BadZipFile:
            refuse_pointer(path)
            self.fail(
                "not an archive of torch.save: it is damaged, or older than PyTorch 1.6; "
                "load it with a trusted tool and save it as safetensors"
            )
        self.tensors = self._read_tensors()
        self._refuse_overlaps()

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path}: {what}")

    def stored_types(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            name = _TYPES[tensor.storage_type][1] if tensor.storage_type in _TYPES else tensor.storage_type
            counts[name] += prod(tensor.shape)
        return counts

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `ModelError` for a tensor that is larger than what is stored of it."""
        saved = self.tensors[name]
        if saved.repeats:
            self.fail(f"tensor {name[:100]!r} of shape {saved.shape} repeats the same stored numbers")
        return saved.shape

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file. Raises `ModelError` when it is no tensor of floats, or lies outside the file."""
        return self._view(name, *self.check(name))

    def any_tensor(self, name: str) -> tuple[str, torch.Tensor]:
        """One of floats or of whole numbers, and its type as safetensors call it. Raises `ModelError` as `tensor`."""
        self.shape(name)
        kind = self.tensors[name].storage_type
        dtype, called = (_TYPES | _OTHER_TYPES)[kind]
        return called, self._view(name, dtype, *self._within(name, dtype))

    def _view(self, name: str, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
        saved = self.tensors[name]
        if count == 0:
            return torch.empty(saved.shape, dtype=dtype)
        values = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        return values.as_strided(saved.shape, saved.stride, saved.offset)

    def check(self, name: str) -> tuple[torch.dtype, int, int]:
        """Type of a tensor of floats, where its storage begins, and how many numbers of it the tensor needs.

        Raises `ModelError` when it is none, or lies outside the file.
        """
        saved = self.tensors[name]
        if saved.storage_type not in _TYPES:
            self.fail(f"tensor {name} is a {saved.storage_type}: quantized checkpoints are not supported here")
        dtype = _TYPES[saved.storage_type][0]
        return dtype, *self._within(name, dtype)

    def _within(self, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """Where a tensor's storage begins, and how many numbers of it the tensor needs."""
        saved = self.tensors[name]
        start, size = self._storage(saved.storage)
        count = saved.num_storage_elements
        if count * dtype.itemsize > size:
            self.fail(f"tensor {name} needs {count * dtype.itemsize} bytes, and its storage has {size}")
        return start, count

    def _read_tensors(self) -> dict[str, SavedTensor]:
        pickles = [name for name in self._members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            self.fail(f"not an archive of torch.save: it has {len(pickles)} files data.pkl instead of 1")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._bytes(f"{self._prefix}byteorder") if f"{self._prefix}byteorder" in self._members else b"little"
        if order != b"little":
            self.fail(f"its byte order is {order[:20]!r}; only little endian is supported")
        try:
            return read_state_dict(self._bytes(pickles[0]))
        except PickleError as error:
            self.fail(f"its pickle is refused: {error}")

    def _refuse_overlaps(self) -> None:
        """The storages of all tensors are parts of the file, and the tensors in one are little more than it is."""
        held: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if not tensor.repeats:
                itemsize = _TYPES[tensor.storage_type][0].itemsize if tensor.storage_type in _TYPES else 1
                held[tensor.storage] += prod(tensor.shape) * itemsize
        end = 0
        for start, size, key in sorted((*self._storage(key), key) for key in held):
            if start < end:
                self.fail(f"its storage {key[:100]!r} overlaps another one")
            if held[key] > MAX_SHARING * size:
                self.fail(f"in its storage {key[:100]!r} of {size} bytes tensors have {held[key]}: they overlap")
            end = start + size

    def _bytes(self, member: str) -> bytes:
        start, size = self._place(member)
        if size > MAX_PICKLE_BYTES:
            self.fail(f"{member} has {size} bytes, more than the {MAX_PICKLE_BYTES} that are taken")
        return self._map[start : start + size]

    def _storage(self, key: str) -> tuple[int, int]:
        return self._place(f"{self._prefix}data/{key}")

    def _place(self, name: str) -> tuple[int, int]:
        """Where a member's bytes lie in the file, and how many there are."""
        member = self._members.get(name)
        if member is None:
            self.fail(f"has no {name[:100]!r}, to which its pickle refers")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            self.fail(f"{name[:100]!r} is compressed or encrypted, which torch.save never does")
        header = self._map[member.header_offset : member.header_offset + _LOCAL_HEADER_BYTES]
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        within = member.header_offset >= 0 and start + member.file_size <= len(self._map)
        if header[:4] != b"PK\x03\x04" or not within:
            self.fail(f"damaged or truncated: {name[:100]!r} does not lie within the file; download it again")
        return start, member.file_size
