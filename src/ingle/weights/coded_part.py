"""A part of a matrix that is held as codes with scales, and multiplied so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ingle import kernels
from ingle.kernels.coded import PLANES_BLOCK, Coded
from ingle.weights import code_types
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.tables import TABLES


@dataclass(frozen=True)
class CodedPart:
    coded: Coded
    dtype: torch.dtype
    """Of activations."""

    @classmethod
    def of(cls, groups: Sequence[Groups], dtype: torch.dtype, device: torch.device) -> CodedPart:
        """Layers that are alike, one below the other: `kind_of` tells."""
        first = groups[0]
        if code_types.TABLES_ON_GPU and first.table is not None and device.type == "cuda" and suits_planes(first):
            return cls(in_planes(groups, device), dtype)
        zeros = None if first.zeros is None else torch.from_numpy(np.concatenate([each.zeros for each in groups]))
        return cls(
            Coded.of(
                first.kind,
                torch.from_numpy(np.concatenate([each.codes for each in groups])).to(device),
                _scales_of(groups).to(device),
                None if zeros is None else zeros.to(device),
                first.group_size,
                None if first.order is None else torch.from_numpy(first.order).long().to(device),
                padded_from=first.padded_from,
                table=None if first.table is None else torch.tensor(TABLES[first.table], device=device),
                quantizes_inputs=first.quantizes_inputs,
            ),
            dtype,
        )

    @property
    def num_rows(self) -> int:
        return self.coded.num_rows

    @property
    def num_parameters(self) -> int:
        return self.coded.num_rows * self.coded.num_columns

    @property
    def num_bytes(self) -> int:
        return self.coded.num_bytes

    @property
    def plain(self) -> None:
        return None

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(kernels.of(x).multiply_coded(x, self.coded, None))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        decoded = self.coded.decoded(indices, self.dtype)
        if self.coded.order is None:
            return decoded
        by_input = decoded.new_zeros(len(decoded), self.coded.num_inputs)  # what fills up is zero
        return by_input.index_add_(1, self.coded.order, decoded)


def suits_planes(groups: Groups) -> bool:
    """Whether `in_planes` holds it as kernels read it."""
    size = groups.group_size
    in_groups = size % PLANES_BLOCK == 0 or size >= groups.num_columns or (size == 16 and groups.kind == "int4")
    return groups.num_columns % PLANES_BLOCK == 0 and in_groups


def in_planes(groups: Sequence[Groups], device: torch.device, *, orders: bool = False) -> Coded:
    """Matrices that are alike, one below the other; each with an order of its own, or all with the first's."""
    first = groups[0]

    def joined(tensors: Sequence[npt.NDArray[Any] | None]) -> torch.Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.from_numpy(np.concatenate(there)).to(device) if there else None

    codes = joined([each.codes for each in groups])
    assert codes is not None
    if first.kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1)
    order = None if first.order is None else torch.from_numpy(first.order).to(device)
    if orders:
        order = joined([None if each.order is None else each.order[None] for each in groups])
    scales, table = _scales_of(groups), None if first.table is None else torch.tensor(TABLES[first.table])
    is_e2m1 = first.table == "mxfp4" and all(each.scales.max(initial=0) <= 2 for each in groups)
    if is_e2m1:
        assert table is not None
        scales, table = (scales.float() / 2).bfloat16(), (table * 2).to(torch.int8)
    return Coded(
        first.kind,
        codes,
        scales.to(device),
        joined([each.zeros for each in groups]),
        first.group_size,
        half=1,
        order=None if order is None else order.long(),
        padded_from=first.padded_from,
        table=None if table is None else table.to(device),
        is_e2m1=is_e2m1,
        quantizes_inputs=first.quantizes_inputs,
    ).into_planes()


def _scales_of(groups: Sequence[Groups]) -> torch.Tensor:
    """With what all of a matrix's are multiplied with, in float16 where that holds them."""
    scales = torch.from_numpy(np.concatenate([each.scales * np.float32(each.unit) for each in groups]))
    return scales.half() if all(each.half_scales and each.unit == 1 for each in groups) else scales


def kind_of(groups: Groups) -> tuple[object, ...]:
    """What layers have in common that can be one part."""
    order = b"" if groups.order is None else groups.order.tobytes()
    held = groups.kind, groups.table, groups.group_size, groups.zeros is None
    return *held, groups.quantizes_inputs, groups.padded_from, order
