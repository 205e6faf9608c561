"""Sources that PyTorch reads: safetensors, `pytorch_model.bin`, and made-up weights."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ingle.errors import ModelError
from ingle.weights.ring import Ring
from ingle.weights.source import (
    FLOAT_TYPES,
    SAFETENSORS_FILES,
    TORCH_FILES,
    StoredRows,
    check_shape,
    check_size,
    check_stack,
    split_name,
)
from ingle.weights.torch_bin import TorchFile

_DUMMY_STD = 0.02
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class _ReadByTorch(ABC):
    """What such a source gives a CPU's kernels: matrices as bfloat16, vectors as float32."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None: ...

    @abstractmethod
    def load_into(self, name: str, out: torch.Tensor) -> None: ...

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        check_size(self.shape(name), name, num_rows * num_columns)
        values = torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
        self.load_into(name, values)
        return StoredRows("BF16", values.view(torch.uint8).numpy())

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        check_size(self.shape(name), name, size)
        values = torch.empty(size)
        self.load_into(name, values)
        return values.numpy()


class SafetensorsSource(_ReadByTorch):
    """A folder with model.safetensors, or with shards and their index. Files are mapped when first needed.

    To devices of the types `streamed`, tensors go through a `Ring`; to others they are copied out of the mapping.
    """

    def __init__(self, folder: Path, *, streamed: Collection[str] = ("cuda",)) -> None:
        self._folder = folder
        self._streamed = streamed
        self._handles: dict[Path, Any] = {}
        self._stored_bytes: dict[Path, _StoredBytes] = {}
        self._ring: Ring | None = None
        self._opening = Lock()
        files = SAFETENSORS_FILES.of_tensors(folder)
        self._files = self._read_single(folder / SAFETENSORS_FILES.single) if files is None else files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, file in self._files.items():
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

    def load_into(self, name: str, out: torch.Tensor) -> None:
        name, place = split_name(name)
        file = self._file_of(name)
        with _reading(file):
            stored = self._handle(file).get_slice(name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if dtype not in FLOAT_TYPES:
            raise ModelError(f"{file}: tensor {name} is {dtype}: quantized checkpoints are not supported yet")
        if place is not None:
            check_stack(file, name, shape, place)
        check_shape(file, name, shape if place is None else shape[1:], tuple(out.shape))
        if out.device.type in self._streamed and out.is_contiguous():
            self._stream_into(file, name, _DTYPES[dtype], 0 if place is None else place.at, out)
            return
        with _reading(file):
            out.copy_(self._handle(file).get_tensor(name) if place is None else stored[place.at])

    def _stream_into(self, file: Path, name: str, dtype: torch.dtype, at: int, out: torch.Tensor) -> None:
        try:
            with self._opening:
                ring = self._ring = self._ring or Ring(out.device)
                if file not in self._stored_bytes:
                    self._stored_bytes[file] = _StoredBytes.of(file)
            stored = self._stored_bytes[file]
            start = stored.starts[name] + at * out.numel() * dtype.itemsize
            ring.load(stored.file.fileno(), start, dtype, out)
        except OSError as error:
            raise ModelError(f"{file}: tensor {name} cannot be read: {error}") from error

    def close(self) -> None:
        self._handles.clear()
        self._ring = None
        for stored in self._stored_bytes.values():
            stored.file.close()

    def _file_of(self, name: str) -> Path:
        file = self._files.get(name)
        if file is None:
            if name.removesuffix("weight") + "qweight" in self._files:
                raise ModelError(f"{self._folder}: {name} is quantized (GPTQ or AWQ), which is not supported yet")
            raise ModelError(f"{self._folder}: has no tensor {name}, which the model needs")
        return file

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]

    def _read_single(self, file: Path) -> dict[str, Path]:
        with _reading(file):
            return dict.fromkeys(self._handle(file).keys(), file)


class _StoredBytes(NamedTuple):
    """Where a safetensors file has what. The file is one that `safe_open` has checked."""

    file: BinaryIO
    starts: dict[str, int]
    """Of each tensor's bytes."""

    @classmethod
    def of(cls, path: Path) -> _StoredBytes:
        file = path.open("rb")
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return cls(file, {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()})


class TorchSource(_ReadByTorch):
    """A folder with pytorch_model.bin, or with shards and their index. Nothing in them is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = lru_cache(maxsize=None)(TorchFile)
        files = TORCH_FILES.of_tensors(folder)
        single = folder / TORCH_FILES.single
        self._files = dict.fromkeys(self._open(single).tensors, single) if files is None else files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for file in sorted(set(self._files.values())):
            counts += self._open(file).stored_types()
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        name, place = split_name(name)
        shape = self._opened(name).tensors[name].shape
        return shape if place is None else shape[1:]

    def load_into(self, name: str, out: torch.Tensor) -> None:
        name, place = split_name(name)
        opened = self._opened(name)
        shape = opened.tensors[name].shape
        if place is not None:
            check_stack(opened.path, name, shape, place)
        check_shape(opened.path, name, shape if place is None else shape[1:], tuple(out.shape))
        out.copy_(opened.tensor(name) if place is None else opened.tensor(name)[place.at])

    def close(self) -> None:
        self._open.cache_clear()

    def _opened(self, name: str) -> TorchFile:
        """The file that has the tensor."""
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"{self._folder}: has no tensor {name}, which the model needs")
        opened = self._open(file)
        if name not in opened.tensors:
            raise ModelError(f"{file}: has no tensor {name}, which {TORCH_FILES.index} promises")
        return opened


class DummySource(_ReadByTorch):
    """Random weights of any shape, for speed without a checkpoint: the same for the same seed and device type."""

    def __init__(self, seed: int, *, tied: bool) -> None:
        self._seed = seed
        self._tied = tied

    def __contains__(self, name: str) -> bool:
        return not (self._tied and name == "lm_head.weight")

    @property
    def stored_types(self) -> dict[str, int]:
        return {}

    def shape(self, name: str) -> None:
        return None

    def load_into(self, name: str, out: torch.Tensor) -> None:
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(out.device).manual_seed(int.from_bytes(digest, "little"))
        out.normal_(1.0 if name.endswith("norm.weight") else 0.0, _DUMMY_STD, generator=generator)

    def close(self) -> None:
        pass


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or truncated safetensors file: {' '.join(str(error).split())}") from error
