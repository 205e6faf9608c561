"""Matrices packed for the CPU's kernels: four- and eight-bit codes as they are stored, anything else as bfloat16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import Matrix
from ingle.weights.codes import CODED_BLOCKS, Coded, CodedMatrix, CodeType
from ingle.weights.experts import ExpertNames, Experts, SeparateExperts
from ingle.weights.formats import Weight
from ingle.weights.source import WeightSource, check_sizes

_FLOATS = CodeType(bits=16, group_size=32)


@dataclass(frozen=True)
class PackedPart:
    """Some rows of a matrix, stored in one way."""

    matrix: Matrix
    data: torch.Tensor
    """uint8, what `matrix` points to."""

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
        data = torch.zeros(library.get().ingle_matrix_bytes(ctypes.byref(matrix)), dtype=torch.uint8)
        matrix.data = data.data_ptr()
        return cls(matrix, data)

    def pack(self, first: int, rows: Coded) -> None:
        """Writes rows from `first` on: codes [n, in_features], scales and minima float32 [n, groups]."""
        tensors = [None if part is None else part.contiguous() for part in rows]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        library.get().ingle_pack_rows(ctypes.byref(self.matrix), *pointers, first, len(rows.codes))


@dataclass(frozen=True)
class PackedWeight:
    """Parts one below the other, each of which writes its columns of the product. Activations are float32."""

    parts: tuple[PackedPart, ...]
    num_rows: int
    in_features: int

    @property
    def num_parameters(self) -> int:
        return self.num_rows * self.in_features

    @property
    def num_bytes(self) -> int:
        return sum(part.data.numel() for part in self.parts)

    @property
    def factors(self) -> frozenset[str]:
        """What it is multiplied as, for people: 16-bit integers."""
        return frozenset(library.factors(part.matrix.bits) for part in self.parts)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, num_tokens = x.contiguous(), x.numel() // self.in_features
        out = torch.empty(*x.shape[:-1], self.num_rows)
        at, kernels = out.data_ptr(), library.get()
        for part in self.parts:
            kernels.ingle_multiply(ctypes.byref(part.matrix), x.data_ptr(), num_tokens, at, self.num_rows)
            at += part.matrix.rows * out.itemsize
        return out if bias is None else out.add_(bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        (part,) = self.parts
        out = torch.empty(len(indices), self.in_features)
        library.get().ingle_gather_rows(ctypes.byref(part.matrix), indices.data_ptr(), len(indices), out.data_ptr())
        return out


@dataclass(frozen=True)
class PackedFormat:
    """Keeps the source's codes where it has them."""

    kept_types: frozenset[str] = frozenset(CODED_BLOCKS)

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        tensors = [
            _Tensor(name, rows, source.coded(name, rows, in_features))
            for name, rows in zip(names, num_rows, strict=True)
        ]
        parts = []
        for code_type, alike in groupby(tensors, lambda tensor: tensor.type):
            parts.append(_load_part(source, code_type, list(alike), in_features))
        return PackedWeight(tuple(parts), sum(num_rows), in_features)

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> Experts:
        return SeparateExperts.load(self, source, names, hidden_size, intermediate_size)


@dataclass(frozen=True)
class _Tensor:
    name: str
    num_rows: int
    coded: CodedMatrix | None

    @property
    def type(self) -> CodeType:
        return _FLOATS if self.coded is None else self.coded.type


def _load_part(source: WeightSource, code_type: CodeType, tensors: list[_Tensor], in_features: int) -> PackedPart:
    plain = [tensor for tensor in tensors if tensor.coded is None]
    check_sizes(source, [tensor.name for tensor in plain], [tensor.num_rows * in_features for tensor in plain])
    part = PackedPart.empty(code_type, sum(tensor.num_rows for tensor in tensors), in_features)
    first = 0
    for tensor in tensors:
        if tensor.coded is None:
            values = torch.empty(tensor.num_rows, in_features, dtype=torch.bfloat16)
            source.load_into(tensor.name, values)
            part.pack(first, Coded(values, torch.empty(0)))
        else:
            for rows, contents in tensor.coded.parts:
                part.pack(first + rows.start, contents)
        first += tensor.num_rows
    return part
