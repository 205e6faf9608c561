"""Where weights come from. Model code asks for tensors by Hugging Face name and never learns how they are stored.

`ingle.weights.open` has the readers by format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import StoredTensor

if TYPE_CHECKING:
    import torch

_IN_STACK = re.compile(r"(.+)\[(\d+)/(\d+)\]")
BEGINNING_BYTES = 16 << 10
_BLOCK_BYTES = 512
"""Of what the system counts a file's space in."""
_COMPARED_BYTES = 1 << 20
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")


class StoredRows(NamedTuple):
    """A matrix as GGUF would store it."""

    type: str
    """Of its blocks, such as Q4_1 or BF16."""
    data: npt.NDArray[np.uint8]
    """(rows, bytes of a row), contiguous."""
    order: npt.NDArray[np.intp] | None = None
    """Which stored row is each row of the matrix; None where they are the same."""


class ExpertNames(NamedTuple):
    """What a source calls the matrices of one expert."""

    gate_up: tuple[str, ...]
    """Gate, then up: two matrices, or one."""
    down: str


class Region(NamedTuple):
    """Neighbouring rows of a tensor, and neighbouring columns of them."""

    shape: tuple[int, ...]
    """Of the whole tensor: rows and columns, or rows alone."""
    rows: slice
    columns: slice
    """All of them, `slice(None)`, in a tensor that has none."""


class WeightSource(Protocol):
    """Tensors by Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`, or by that of `in_stack`."""

    def __contains__(self, name: str) -> bool: ...

    @property
    def stored_types(self) -> dict[str, int]:
        """Numbers stored in each type, such as Q4_K or BF16, the most first; empty for made-up weights."""
        ...

    @property
    def names(self) -> Collection[str]:
        """Of all stored tensors, where they may differ from those that a family expects: not in a GGUF file."""
        ...

    def alike(self, name: str, other: str) -> bool:
        """Whether two stored tensors are of the same type, shape and bytes. Ends at the first difference."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the named tensor as it is stored; None where it has any.

        Raises `ModelError` when there is no such tensor.
        """
        ...

    def check(self, name: str, num_elements: int) -> None:
        """Asks the files' headers alone. Raises `ModelError` when there is no such tensor, or it has another size, or
        is stored in a type that is not read."""
        ...

    def is_coded(self, name: str) -> bool:
        """Whether the named matrix is stored as codes with scales: then `groups` gives it."""
        ...

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        """Of a matrix that `is_coded`. Raises `ModelError` when its shape is another, or what it consists of amiss."""
        ...

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        """Of a matrix that is not, as GGUF would store it. Raises `ModelError` when there is none of that shape."""
        ...

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """The named vector in host memory. Raises `ModelError` as `load_into` does."""
        ...

    def load_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, of any float dtype, on any device, maybe a slice of a fused parameter, with the named tensor.

        Raises `ModelError` when there is no such tensor, its shape is not `out`'s, or it cannot be decoded.
        """
        ...

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        """`load_into` of a part of the named tensor. Little more of it is read."""
        ...

    def columns_unit(self, name: str) -> int:
        """How many neighbouring columns of the named matrix are stored together: a cut amid them takes more."""
        ...

    def close(self) -> None:
        """Let go of the files. The source is not used after this."""
        ...


class Files(WeightSource, Protocol):
    """A folder's files of weights, tensor by tensor."""

    @property
    def paths(self) -> list[Path]: ...

    def stored(self, name: str) -> StoredTensor:
        """Any tensor. Raises `ModelError` when there is none of that name."""
        ...

    def where(self, name: str) -> str:
        """The file that has it."""
        ...


def check_sizes(source: WeightSource, names: Sequence[str], num_elements: Sequence[int]) -> None:
    """Before memory is taken for tensors that a configuration describes.

    Raises `ModelError` unless each has as many numbers as wanted.
    """
    for name, wanted in zip(names, num_elements, strict=True):
        check_size(source.shape(name), name, wanted)


def check_size(shape: tuple[int, ...] | None, name: str, num_elements: int) -> None:
    """`check_sizes` of one tensor, whose shape may be any."""
    if shape is not None and math.prod(shape) != num_elements:
        raise ModelError(f"tensor {name} has shape {shape}, and the configuration asks for {num_elements} numbers")


class Place(NamedTuple):
    at: int
    of: int


def in_stack(name: str, index: int, count: int) -> str:
    """The name under which a source loads one of `count` tensors that are stacked in the tensor `name`."""
    return f"{name}[{index}/{count}]"


def split_name(name: str) -> tuple[str, Place | None]:
    """A stored tensor's name, and the place of the wanted one in it."""
    match = _IN_STACK.fullmatch(name)
    return (match[1], Place(int(match[2]), int(match[3]))) if match else (name, None)


FLOATS: dict[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {
    "F32": lambda stored: stored.view("<f4").astype(np.float32),
    "F16": lambda stored: stored.view("<f2").astype(np.float32),
    "BF16": lambda stored: (stored.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "F64": lambda stored: stored.view("<f8").astype(np.float32),
}
"""Stored bytes to the numbers that they are, by the name of their type."""


def compared(*files: Path) -> slice:
    """The bytes of a tensor by which it is compared: all, but the beginning where a file is mostly hole, as is that of
    a stand-in whose weights nobody has downloaded."""
    stats = [file.stat() for file in files]
    hollow = any(stat.st_blocks * _BLOCK_BYTES < stat.st_size // 2 for stat in stats)
    return slice(BEGINNING_BYTES if hollow else None)


def same_bytes(one: npt.NDArray[np.uint8], two: npt.NDArray[np.uint8]) -> bool:
    """Whether two arrays of bytes are equal, read no further than they are."""
    return len(one) == len(two) and all(
        np.array_equal(one[start : start + _COMPARED_BYTES], two[start : start + _COMPARED_BYTES])
        for start in range(0, len(one), _COMPARED_BYTES)
    )


def check_stack(file: Path, name: str, shape: tuple[int, ...], place: Place) -> None:
    """Raises `ModelError` unless as many tensors are stacked in this one as the configuration says."""
    if not shape or shape[0] != place.of:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {place.of} of them")


def check_shape(file: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises `ModelError` when a tensor has another shape than wanted."""
    if shape != wanted:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {wanted}")
