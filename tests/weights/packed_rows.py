"""A format of a matrix's parts that is not plain: rows as the CPU's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ingle.weights.packed_matrix import PackedPart


@dataclass(frozen=True)
class PackedRows:
    """A part as the CPU's kernels read it. Activations are float32."""

    packed: PackedPart

    @property
    def num_rows(self) -> int:
        return self.packed.num_rows

    @property
    def num_parameters(self) -> int:
        return self.packed.num_parameters

    @property
    def num_bytes(self) -> int:
        return self.packed.data.nbytes

    @property
    def plain(self) -> None:
        return None

    @property
    def coded(self) -> None:
        return None

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.packed.multiply_into(x.data_ptr(), len(x), out.data_ptr(), out.stride(0))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.packed.rows(indices.contiguous().numpy()))
