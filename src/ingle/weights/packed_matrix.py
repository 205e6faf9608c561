"""Matrices packed for the CPU's kernels: codes as they are stored and floats as bfloat16, or all as float32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import Matrix
from ingle.weights.code_types import CodeType, kept
from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.source import StoredRows, WeightSource

_NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}
_LINE = 64
"""Bytes of a line of the processor's cache: a vector that starts in one should end in it."""


@dataclass(frozen=True)
class PackedPart:
    """Some rows of a matrix, stored in one way."""

    matrix: Matrix
    data: npt.NDArray[np.uint8]
    """What `matrix` points to."""

    @classmethod
    def empty(cls, code_type: CodeType, num_rows: int, in_features: int) -> PackedPart:
        matrix = Matrix(
            data=None,
            rows=num_rows,
            columns=in_features,
            bits=code_type.bits,
            group_size=code_type.group_size,
            wide_scales=code_type.wide_scales,
            has_minima=code_type.has_minima,
            codebook=(ctypes.c_int8 * 16)(*code_type.codebook),
        )
        num_bytes = library.get().ingle_matrix_bytes(ctypes.byref(matrix))
        data = np.zeros(num_bytes + _LINE, np.uint8)
        start = -data.ctypes.data % _LINE
        data = data[start : start + num_bytes]
        matrix.data = data.ctypes.data
        return cls(matrix, data)

    def pack(self, first: int, rows: StoredRows) -> None:
        """Writes rows from `first` on."""
        order = None if rows.order is None else np.ascontiguousarray(rows.order, np.int64)
        order_at = None if order is None else order.ctypes.data
        number, stored = _NUMBERS[rows.type], rows.data.ctypes.data
        matrix = ctypes.byref(self.matrix)
        if not library.get().ingle_pack_blocks(matrix, number, stored, order_at, first, len(rows.data)):
            raise ValueError(f"blocks of {rows.type} cannot be packed")

    @property
    def num_rows(self) -> int:
        return int(self.matrix.rows)

    @property
    def num_parameters(self) -> int:
        return int(self.matrix.rows * self.matrix.columns)

    @property
    def factors(self) -> frozenset[str]:
        """What it is multiplied as, for people: 16-bit integers."""
        return frozenset({library.factors(self.matrix.bits)})

    def multiply_into(self, x_at: int, num_rows: int, out_at: int, out_stride: int) -> None:
        """Writes the product with `num_rows` rows of float32, contiguous, at the address `x_at` to `out_at`.

        Rows of that begin `out_stride` numbers after each other.
        """
        library.get().ingle_multiply(ctypes.byref(self.matrix), x_at, num_rows, out_at, out_stride)

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Some of its rows: [T] to [T, in_features]."""
        out = np.empty((len(indices), self.matrix.columns), np.float32)
        library.get().ingle_gather_rows(
            ctypes.byref(self.matrix), indices.ctypes.data, len(indices), out.ctypes.data
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class PackedMatrix:
    """Parts one below the other, each of which writes its columns of the product. Activations are float32."""

    parts: tuple[PackedPart, ...]
    num_rows: int
    in_features: int

    @property
    def num_parameters(self) -> int:
        return self.num_rows * self.in_features

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        return sum(part.data.nbytes for part in self.parts)

    @property
    def factors(self) -> frozenset[str]:
        """What it is multiplied as, for people, such as 16-bit integers."""
        return frozenset().union(*(part.factors for part in self.parts))

    def multiply(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """x @ matrix.T for x [T, in_features], contiguous: [T, num_rows]."""
        out = np.empty((len(x), self.num_rows), np.float32)
        at = out.ctypes.data
        for part in self.parts:
            part.multiply_into(x.ctypes.data, len(x), at, self.num_rows)
            at += part.matrix.rows * out.itemsize
        return out

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Some of its rows, as an embedding looks them up: [T] to [T, in_features]. For a matrix of one part."""
        (part,) = self.parts
        return part.rows(indices)


def load_matrix(
    source: WeightSource,
    names: Sequence[str],
    num_rows: Sequence[int],
    in_features: int,
    code_type_of: Callable[[str], CodeType] = kept,
) -> PackedMatrix:
    """The tensors `names`, of `num_rows` rows each, one below the other.

    `code_type_of` decides by the type in which a tensor is stored how it is held: `code_types.kept` or `exact`.
    Raises `ModelError` for tensors that are missing, misshapen, or stored in a way that ingle does not read.
    """
    tensors = [source.stored_rows(name, rows, in_features) for name, rows in zip(names, num_rows, strict=True)]
    return pack_matrix(tensors, in_features, code_type_of)


def pack_matrix(
    tensors: Sequence[StoredRows], in_features: int, code_type_of: Callable[[str], CodeType] = kept
) -> PackedMatrix:
    """`load_matrix` of tensors that are there."""
    parts = []
    for code_type, alike in groupby(tensors, lambda rows: code_type_of(rows.type)):
        stored = list(alike)
        part, first = PackedPart.empty(code_type, sum(len(rows.data) for rows in stored), in_features), 0
        for rows in stored:
            part.pack(first, rows)
            first += len(rows.data)
        parts.append(part)
    return PackedMatrix(tuple(parts), sum(len(rows.data) for rows in tensors), in_features)
