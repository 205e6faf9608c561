"""A part of a matrix that is held as codes with scales, and multiplied so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ingle import kernels
from ingle.kernels.coded import Coded
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
        scales = torch.from_numpy(np.concatenate([each.scales for each in groups]))
        halves = all(each.half_scales for each in groups)
        zeros = None if first.zeros is None else torch.from_numpy(np.concatenate([each.zeros for each in groups]))
        return cls(
            Coded.of(
                first.kind,
                torch.from_numpy(np.concatenate([each.codes for each in groups])).to(device),
                (scales.half() if halves else scales).to(device),
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


def kind_of(groups: Groups) -> tuple[object, ...]:
    """What layers have in common that can be one part."""
    order = b"" if groups.order is None else groups.order.tobytes()
    held = groups.kind, groups.table, groups.group_size, groups.zeros is None
    return *held, groups.quantizes_inputs, groups.padded_from, order
