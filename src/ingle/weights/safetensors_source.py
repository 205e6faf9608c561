"""Checkpoints of safetensors: https://huggingface.co/docs/safetensors, whose own reader checks the files."""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ingle.errors import ModelError
from ingle.weights.checkpoint_files import SAFETENSORS_FILES
from ingle.weights.pointer import refuse_pointer
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import StoredTensor
from ingle.weights.source import (
    FLOAT_TYPES,
    FLOATS,
    Region,
    StoredRows,
    check_shape,
    check_size,
    check_stack,
    compared,
    same_bytes,
    split_name,
)

if TYPE_CHECKING:
    import torch

    from ingle.weights.ring import Ring

_ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_NUMPY_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "F8_E4M3": "u1", "F8_E8M0": "u1", "U8": "u1",
                "I8": "i1", "I32": "<i4", "I64": "<i8"}  # fmt: skip
"""By safetensors' names; of floats that NumPy does not know the bits."""


class SafetensorsSource:
    """A folder with model.safetensors, or with shards. Files are mapped when first needed.

    A CPU's kernels take what they need from the mapping. For PyTorch, tensors go through a `Ring` to devices of the
    types `streamed`; to others they are copied.
    """

    def __init__(self, folder: Path, *, streamed: Collection[str] = ("cuda",)) -> None:
        self._folder = folder
        self._streamed = streamed
        self._handles: dict[Path, Any] = {}
        self._torch_handles: dict[Path, Any] = {}
        self._stored_bytes: dict[Path, _StoredBytes] = {}
        self._ring: Ring | None = None
        self._opening = Lock()
        self._located = SAFETENSORS_FILES.locate(folder, self._names_in)

    def __contains__(self, name: str) -> bool:
        return name in self._located.files

    @property
    def names(self) -> Collection[str]:
        return self._located.files.keys()

    @property
    def paths(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._located.files.values()))

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, file in self._located.files.items():
            with _reading(file):
                stored = self._handle(file).get_slice(name)
                counts[stored.get_dtype()] += math.prod(stored.get_shape())
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        name, place = split_name(name)
        file = self._file_of(name)
        with _reading(file):
            shape = tuple(self._handle(file).get_slice(name).get_shape())
        return shape if place is None else shape[1:]

    def check(self, name: str, num_elements: int) -> None:
        check_size(self.shape(name), name, num_elements)
        self._find(name, self.shape(name))

    def is_coded(self, name: str) -> bool:
        return False

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        raise AssertionError(f"{name} is not stored as codes with scales")

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        dtype, stored = self._mapped(name, (num_rows, num_columns))
        if dtype == "F64":  # which the kernels do not read
            dtype, stored = "F32", stored.view("<f8").astype("<f4").view(np.uint8)
        return StoredRows(dtype, stored.reshape(num_rows, -1))

    def stored(self, name: str) -> StoredTensor:
        """Any tensor, as it lies in its file's mapping: slices of it read no more than they are."""
        file = self._file_of(name)
        with _reading(file):
            header = self._handle(file).get_slice(name)
            shape, kind = tuple(header.get_shape()), str(header.get_dtype())

        def read() -> npt.NDArray[np.generic]:
            if kind not in _NUMPY_TYPES:
                raise ModelError(f"{file}: tensor {name} is {kind}, which ingle does not read")
            with _reading(file):
                stored = self._bytes_of(file)
                flat = np.frombuffer(stored.mapped, _NUMPY_TYPES[kind], math.prod(shape), stored.starts[name])
            return flat.reshape(shape)

        return StoredTensor(kind, shape, read)

    def where(self, name: str) -> str:
        """The file that has it."""
        return str(self._file_of(name))

    def alike(self, name: str, other: str) -> bool:
        shape = self.shape(name)
        if shape != self.shape(other):
            return False
        (dtype, one), (other_dtype, two) = self._mapped(name, shape), self._mapped(other, shape)
        part = compared(self._file_of(name), self._file_of(other))
        return dtype == other_dtype and same_bytes(one[part], two[part])

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        dtype, stored = self._mapped(name, (size,))
        return FLOATS[dtype](stored)

    def _mapped(self, name: str, wanted: tuple[int, ...]) -> tuple[str, npt.NDArray[np.uint8]]:
        """Type and bytes of a tensor, in its file's mapping."""
        file, name, dtype, at = self._find(name, wanted)
        count = math.prod(wanted) * _ITEMSIZES[dtype]
        with _reading(file):
            stored = self._bytes_of(file)
            return dtype, np.frombuffer(stored.mapped, np.uint8, count, stored.starts[name] + at * count)

    def _find(self, name: str, wanted: tuple[int, ...]) -> tuple[Path, str, str, int]:
        """File, name and type of a stored tensor of floats, and the place in it of the one that is wanted."""
        name, place = split_name(name)
        file = self._file_of(name)
        with _reading(file):
            stored = self._handle(file).get_slice(name)
            shape, dtype = tuple(stored.get_shape()), str(stored.get_dtype())
        if dtype not in FLOAT_TYPES:
            raise ModelError(
                f"{file}: tensor {name} is {dtype}, and the configuration does not say how that is quantized",
                alternative="take the config.json, or quantize_config.json, that belongs to these files",
            )
        if place is not None:
            check_stack(file, name, shape, place)
        check_shape(file, name, shape if place is None else shape[1:], wanted)
        return file, name, dtype, 0 if place is None else place.at

    def load_into(self, name: str, out: torch.Tensor) -> None:
        stacked = split_name(name)[1] is not None
        file, name, dtype, at = self._find(name, tuple(out.shape))
        if out.device.type in self._streamed and out.is_contiguous():
            self._stream_into(file, name, dtype, at * out.numel(), out)
            return
        with _reading(file):
            handle = self._opened_by_torch(file)
            out.copy_(handle.get_slice(name)[at] if stacked else handle.get_tensor(name))

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        stacked = split_name(name)[1] is not None
        file, name, dtype, at = self._find(name, region.shape)
        first, last, step = region.rows.indices(region.shape[0])
        if out.device.type in self._streamed and out.is_contiguous() and out.shape[1:] == region.shape[1:]:
            row = math.prod(region.shape[1:])
            self._stream_into(file, name, dtype, at * region.shape[0] * row + first * row, out)
            return
        places = slice(first, last, step), *([region.columns] if len(region.shape) > 1 else [])
        with _reading(file):
            stored = self._opened_by_torch(file).get_slice(name)
            out.copy_(stored[(at, *places) if stacked else places])

    def columns_unit(self, name: str) -> int:
        return 1

    def _stream_into(self, file: Path, name: str, dtype: str, first: int, out: torch.Tensor) -> None:
        """From the stored tensor's number `first` on."""
        import torch

        from ingle.weights.ring import Ring

        numbers = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
        try:
            with self._opening:
                ring = self._ring = self._ring or Ring(out.device)
            stored = self._bytes_of(file)
            start = stored.starts[name] + first * numbers.itemsize
            ring.load(stored.file.fileno(), start, numbers, out)
        except OSError as error:
            raise ModelError(f"{file}: tensor {name} cannot be read: {error}") from error

    def close(self) -> None:
        self._handles.clear()
        self._torch_handles.clear()
        self._ring = None
        for stored in self._stored_bytes.values():
            stored.file.close()
        self._stored_bytes.clear()

    def _file_of(self, name: str) -> Path:
        if name not in self._located.files and name.removesuffix("weight") + "qweight" in self._located.files:
            raise ModelError(
                f"{self._folder}: {name} is quantized (GPTQ or AWQ), and the configuration does not say how",
                alternative="take the config.json, or quantize_config.json, that belongs to these files",
            )
        return self._located.file_of(name, self._folder)

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="np")
        return self._handles[file]

    def _opened_by_torch(self, file: Path) -> Any:
        if file not in self._torch_handles:
            self._torch_handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._torch_handles[file]

    def _bytes_of(self, file: Path) -> _StoredBytes:
        with self._opening:
            if file not in self._stored_bytes:
                self._handle(file)  # checks it
                self._stored_bytes[file] = _StoredBytes.of(file)
            return self._stored_bytes[file]

    def _names_in(self, file: Path) -> Collection[str]:
        with _reading(file):
            return frozenset(self._handle(file).keys())


class _StoredBytes(NamedTuple):
    """Where a safetensors file has what. The file is one that `safe_open` has checked."""

    file: BinaryIO
    mapped: mmap.mmap
    starts: dict[str, int]
    """Of each tensor's bytes."""

    @classmethod
    def of(cls, path: Path) -> _StoredBytes:
        file = path.open("rb")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return cls(file, mapped, {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()})


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        refuse_pointer(file)
        raise ModelError(f"{file}: damaged or truncated safetensors file: {' '.join(str(error).split())}") from error
