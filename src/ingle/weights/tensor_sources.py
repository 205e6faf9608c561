"""Sources that PyTorch reads: `pytorch_model.bin`, and made-up weights."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ingle.weights.checkpoint_files import TORCH_FILES
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import StoredTensor
from ingle.weights.quantized.scheme import Quantization
from ingle.weights.source import (
    Region,
    StoredRows,
    check_shape,
    check_size,
    check_stack,
    compared,
    same_bytes,
    split_name,
)
from ingle.weights.torch_bin import TorchFile

_DUMMY_STD = 0.02
_DUMMY_SCALE = 2.0**-7
"""With which random codes of MXFP4 are about as large."""
_SOME_CODES = (1 << 20) - 1
"""Random bytes that all matrices repeat, at an odd distance, from a place of their own on: to draw all would take
longer than to read others."""
_EXPERT = re.compile(r"\.experts\.(?:gate_up|gate|up|down)_proj(?:\.weight)?(?:\[|$)|\.experts\.\d+\.\w+\.weight$")
"""A matrix of experts, of several or of one."""
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class _ReadByTorch(ABC):
    """What such a source gives a CPU's kernels: matrices in the type that they are stored in, vectors as float32."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None: ...

    @abstractmethod
    def load_into(self, name: str, out: torch.Tensor) -> None: ...

    def columns_unit(self, name: str) -> int:
        return 1

    def is_coded(self, name: str) -> bool:
        return False

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        raise AssertionError(f"{name} is not stored as codes with scales")

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        check_size(self.shape(name), name, num_rows * num_columns)
        dtype = self.dtype(name)
        values = torch.empty(num_rows, num_columns, dtype=dtype if dtype in _TYPES else torch.float32)
        self.load_into(name, values)
        return StoredRows(_TYPES[values.dtype], values.view(torch.uint8).numpy())

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        check_size(self.shape(name), name, size)
        values = torch.empty(size)
        self.load_into(name, values)
        return values.numpy()


class TorchSource(_ReadByTorch):
    """A folder with pytorch_model.bin, or with shards. Nothing in them is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = lru_cache(maxsize=None)(TorchFile)
        self._located = TORCH_FILES.locate(folder, lambda file: self._open(file).tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._located.files

    @property
    def names(self) -> Collection[str]:
        return self._located.files.keys()

    def alike(self, name: str, other: str) -> bool:
        one, two = (self._opened(each).tensor(each) for each in (name, other))
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        tied = (one.data_ptr(), one.stride()) == (two.data_ptr(), two.stride())
        part = compared(self._opened(name).path, self._opened(other).path)
        return tied or same_bytes(*(each.contiguous().view(-1).view(torch.uint8).numpy()[part] for each in (one, two)))

    def check(self, name: str, num_elements: int) -> None:
        check_size(self.shape(name), name, num_elements)
        self._opened(split_name(name)[0]).check(split_name(name)[0])

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for file in self.paths:
            counts += self._open(file).stored_types()
        return dict(counts.most_common())

    def dtype(self, name: str) -> torch.dtype:
        name, _ = split_name(name)
        return self._opened(name).tensor(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        name, place = split_name(name)
        shape = self._opened(name).shape(name)
        return shape if place is None else shape[1:]

    def load_into(self, name: str, out: torch.Tensor) -> None:
        name, place = split_name(name)
        opened = self._opened(name)
        shape = opened.shape(name)
        if place is not None:
            check_stack(opened.path, name, shape, place)
        check_shape(opened.path, name, shape if place is None else shape[1:], tuple(out.shape))
        out.copy_(opened.tensor(name) if place is None else opened.tensor(name)[place.at])

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        name, place = split_name(name)
        opened = self._opened(name)
        shape = opened.shape(name)
        if place is not None:
            check_stack(opened.path, name, shape, place)
        check_shape(opened.path, name, shape if place is None else shape[1:], region.shape)
        whole = opened.tensor(name) if place is None else opened.tensor(name)[place.at]
        out.copy_(_part(whole, region))

    @property
    def paths(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._located.files.values()))

    def stored(self, name: str) -> StoredTensor:
        """Any tensor; what lies in its file otherwise than row by row is copied when it is read."""
        opened = self._opened(name)
        kind, tensor = opened.any_tensor(name)

        def read() -> npt.NDArray[np.generic]:
            values = tensor.contiguous()
            return (values.view(torch.uint16) if kind == "BF16" else values).numpy()

        return StoredTensor(kind, tuple(tensor.shape), read)

    def where(self, name: str) -> str:
        """The file that has it."""
        return str(self._opened(name).path)

    def close(self) -> None:
        self._open.cache_clear()

    def _opened(self, name: str) -> TorchFile:
        """The file that has the tensor."""
        return self._open(self._located.file_of(name, self._folder))


class DummySource(_ReadByTorch):
    """Random weights of any shape, for speed without a checkpoint: the same for the same seed and device type.

    Floats, but for the experts of a model that is published with those in MXFP4.
    """

    def __init__(self, seed: int, quantization: Quantization | None = None) -> None:
        self._seed = seed
        self._codes_experts = quantization is not None and any(each.table == "mxfp4" for each in quantization.schemes)

    def __contains__(self, name: str) -> bool:
        return True

    @property
    def names(self) -> Collection[str]:
        return ()

    def alike(self, name: str, other: str) -> bool:
        return name == other

    def check(self, name: str, num_elements: int) -> None:
        pass

    @property
    def stored_types(self) -> dict[str, int]:
        return {}

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def shape(self, name: str) -> None:
        return None

    def is_coded(self, name: str) -> bool:
        return self._codes_experts and _EXPERT.search(name) is not None

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        size, first = num_rows * num_columns // 2, self._seed_of(name) % _SOME_CODES
        codes = _dummy_codes(self._seed, size)[first : first + size].reshape(num_rows, -1)
        scales = np.full((num_rows, -(-num_columns // 32)), _DUMMY_SCALE, np.float32)
        return Groups("int4", codes, scales, None, 32, True, table="mxfp4")

    def _seed_of(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest(), "little")

    def load_into(self, name: str, out: torch.Tensor) -> None:
        if self.is_coded(name):
            out.copy_(torch.from_numpy(self.groups(name, *out.shape).decoded()))
            return
        generator = torch.Generator(out.device).manual_seed(self._seed_of(name))
        out.normal_(1.0 if name.endswith("norm.weight") else 0.0, _DUMMY_STD, generator=generator)

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        whole = torch.empty(region.shape, dtype=out.dtype, device=out.device)
        self.load_into(name, whole)
        out.copy_(_part(whole, region))

    def close(self) -> None:
        pass


@lru_cache(maxsize=2)
def _dummy_codes(seed: int, size: int) -> npt.NDArray[np.uint8]:
    """So many bytes, and as many more as they may begin at."""
    return np.resize(np.frombuffer(np.random.default_rng(seed).bytes(_SOME_CODES), np.uint8), size + _SOME_CODES)


def _part(whole: torch.Tensor, region: Region) -> torch.Tensor:
    return whole[region.rows] if whole.dim() == 1 else whole[region.rows, region.columns]
