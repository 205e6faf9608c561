"""Matrices packed for the CPU's kernels: codes as they are stored and floats as bfloat16, or all as float32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import Matrix
from ingle.weights import grids
from ingle.weights.code_types import CODED, INTEGERS, CodeType, kept
from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.quantized.groups import MIDDLE, Groups
from ingle.weights.source import StoredRows, WeightSource

_NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}
_LINE = 64
"""Bytes of a line of the processor's cache: a vector that starts in one should end in it."""
_LONGEST = 128
"""Columns that share a scale in the kernels at most: their sums are integers of 32 bits."""
_LONGEST_WIDE = 64
"""The same of numbers of more than 8 bits."""
Order = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackedPart:
    """Some rows of a matrix, stored in one way."""

    matrix: Matrix
    data: npt.NDArray[np.uint8]
    """What `matrix` points to."""
    order: Order | None = None
    """The same: which input each column is multiplied with. Of columns with one input all but the first are zero."""

    @classmethod
    def empty(cls, code_type: CodeType, num_rows: int, in_features: int, order: Order | None = None) -> PackedPart:
        matrix = Matrix(
            data=None,
            rows=num_rows,
            columns=in_features if order is None else len(order),
            bits=code_type.bits,
            group_size=code_type.group_size,
            scales=library.STEPS if code_type.steps else library.WIDE if code_type.wide_scales else library.HALVES,
            has_minima=library.IN_SCALES if code_type.minima_in_scales else code_type.has_minima,
            codebook=(ctypes.c_int16 * 16)(*code_type.codebook),
            order=None if order is None else order.ctypes.data,
            unit=code_type.unit,
            inputs=in_features,
            operand_bits=code_type.operand_bits,
        )
        num_bytes = library.get().ingle_matrix_bytes(ctypes.byref(matrix))
        data = np.zeros(num_bytes + _LINE, np.uint8)
        start = -data.ctypes.data % _LINE
        data = data[start : start + num_bytes]
        matrix.data = data.ctypes.data
        return cls(matrix, data, order)

    def pack_groups(self, first: int, rows: Groups) -> None:
        """Writes rows from `first` on."""
        if self.matrix.bits == 32:
            decoded, pack = rows.decoded(), library.get().ingle_pack_rows
            pack(ctypes.byref(self.matrix), decoded.ctypes.data, None, None, None, first, len(decoded))
            return
        size = self.matrix.group_size
        groups = np.arange(0, rows.num_columns, size) // rows.group_size
        scales, minima = np.ascontiguousarray(rows.scales[:, groups]), None
        if rows.zeros is not None:
            minima = np.ascontiguousarray(MIDDLE[rows.kind] - rows.zeros[:, groups].astype(np.float32))
            if self.matrix.has_minima != library.IN_SCALES:
                minima *= scales
        codes = np.ascontiguousarray(rows.codes)
        library.get().ingle_pack_groups(
            ctypes.byref(self.matrix),
            codes.ctypes.data,
            codes.shape[1],
            scales.ctypes.data,
            None if minima is None else minima.ctypes.data,
            first,
            len(codes),
        )

    def pack(self, first: int, rows: StoredRows) -> None:
        """Writes rows from `first` on."""
        order = None if rows.order is None else np.ascontiguousarray(rows.order, np.int64)
        order_at = None if order is None else order.ctypes.data
        number, stored = _NUMBERS[rows.type], rows.data.ctypes.data
        matrix, grid = ctypes.byref(self.matrix), grids.of(rows.type)
        grid_at = None if grid is None else grid.ctypes.data
        if not library.get().ingle_pack_blocks(matrix, number, stored, grid_at, order_at, first, len(rows.data)):
            raise ValueError(f"blocks of {rows.type} cannot be packed")

    @property
    def num_rows(self) -> int:
        return int(self.matrix.rows)

    @property
    def num_parameters(self) -> int:
        return int(self.matrix.rows * self.matrix.inputs)

    @property
    def factors(self) -> frozenset[str]:
        """What it is multiplied as, for people: 16-bit integers."""
        return frozenset({library.factors(self.matrix)})

    def multiply_into(self, x_at: int, num_rows: int, out_at: int, out_stride: int) -> None:
        """Writes the product with `num_rows` rows of float32, contiguous, at the address `x_at` to `out_at`.

        Rows of that begin `out_stride` numbers after each other.
        """
        library.get().ingle_multiply(ctypes.byref(self.matrix), x_at, num_rows, out_at, out_stride)

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Some of its rows: [T] to [T, in_features]."""
        out = np.empty((len(indices), self.matrix.inputs), np.float32)
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
    tensors: list[_Tensor] = [
        _Codes(source.groups(name, rows, in_features))
        if source.is_coded(name)
        else _Blocks(source.stored_rows(name, rows, in_features))
        for name, rows in zip(names, num_rows, strict=True)
    ]
    return _packed(tensors, in_features, code_type_of)


def pack_matrix(
    tensors: Sequence[StoredRows], in_features: int, code_type_of: Callable[[str], CodeType] = kept
) -> PackedMatrix:
    """`load_matrix` of tensors that are there."""
    return _packed([_Blocks(rows) for rows in tensors], in_features, code_type_of)


def pack_groups(
    tensors: Sequence[Groups], in_features: int, code_type_of: Callable[[str], CodeType] = kept
) -> PackedMatrix:
    """`load_matrix` of codes that are there."""
    return _packed([_Codes(groups) for groups in tensors], in_features, code_type_of)


class _Tensor(Protocol):
    """Rows as they are stored."""

    @property
    def num_rows(self) -> int: ...

    def held(self, code_type_of: Callable[[str], CodeType]) -> CodeType: ...

    def order(self, held: CodeType) -> Order | None:
        """Of the columns, if they are held so; it may name an input again, for columns that are zero."""
        ...

    def pack(self, part: PackedPart, first: int) -> None: ...


class _Blocks(NamedTuple):
    rows: StoredRows

    @property
    def num_rows(self) -> int:
        return len(self.rows.data)

    def held(self, code_type_of: Callable[[str], CodeType]) -> CodeType:
        return code_type_of(self.rows.type)

    def order(self, held: CodeType) -> None:
        return None

    def pack(self, part: PackedPart, first: int) -> None:
        part.pack(first, self.rows)


class _Codes(NamedTuple):
    groups: Groups

    @property
    def num_rows(self) -> int:
        return self.groups.num_rows

    def held(self, code_type_of: Callable[[str], CodeType]) -> CodeType:
        groups, as_floats = self.groups, code_type_of("F32")
        if as_floats.bits == 32:
            return as_floats
        longest = _LONGEST_WIDE if groups.table is not None else _LONGEST
        size = gcd(groups.group_size, longest)
        if groups.group_size >= groups.num_columns and size < 32:
            size = longest  # of one group, which is padded
        if size < 16:
            raise ModelError(
                f"groups of {groups.group_size} inputs are not multiplied on this device: they have to be multiples "
                "of 16",
                alternative="take a checkpoint with groups of 32, 64 or 128",
            )
        has_zeros = groups.zeros is not None
        if groups.table is not None:
            held = INTEGERS[groups.table]
            return CodeType(
                4,
                size,
                not groups.half_scales,
                unit=held.unit * groups.unit,
                codebook=held.codebook,
                operand_bits=as_floats.operand_bits,
            )
        # 8 bits hold the middle less any zero but 0 itself of codes of 8 bits.
        in_scales = groups.zeros is not None and (groups.kind == "int4" or bool(groups.zeros.all()))
        return replace(
            CODED[groups.kind],
            group_size=size,
            wide_scales=not groups.half_scales or (has_zeros and not in_scales),
            has_minima=has_zeros,
            minima_in_scales=in_scales,
            operand_bits=as_floats.operand_bits,
        )

    def order(self, held: CodeType) -> Order | None:
        return None if held.bits == 32 else self.groups.order

    def pack(self, part: PackedPart, first: int) -> None:
        part.pack_groups(first, self.groups)


def _packed(tensors: Sequence[_Tensor], in_features: int, code_type_of: Callable[[str], CodeType]) -> PackedMatrix:
    """A part for those that are held alike, with their columns in one order."""
    held = [tensor.held(code_type_of) for tensor in tensors]
    orders = [tensor.order(kind) for tensor, kind in zip(tensors, held, strict=True)]
    forms = [(kind, b"" if order is None else order.tobytes()) for kind, order in zip(held, orders, strict=True)]
    parts = []
    for _, run in groupby(range(len(tensors)), lambda index: forms[index]):
        alike = list(run)
        num_rows = sum(tensors[i].num_rows for i in alike)
        part, first = PackedPart.empty(held[alike[0]], num_rows, in_features, orders[alike[0]]), 0
        for i in alike:
            tensors[i].pack(part, first)
            first += tensors[i].num_rows
        parts.append(part)
    return PackedMatrix(tuple(parts), sum(tensor.num_rows for tensor in tensors), in_features)
