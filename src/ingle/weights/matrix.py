"""A matrix of weights: parts one below the other, each in a format of its own. Model code never asks in which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from ingle import kernels
from ingle.kernels.coded import Coded
from ingle.kernels.options import Activation


class Part(Protocol):
    """Some rows of a matrix, all stored in one way."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        ...

    @property
    def plain(self) -> torch.Tensor | None:
        """[num_rows, in_features] of a float type; None for a part that is stored otherwise."""
        ...

    @property
    def coded(self) -> Coded | None:
        """Codes with scales, where it is stored so."""
        ...

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes x @ part.T, for x [T, in_features], contiguous, to out [T, num_rows]: columns of a larger product."""
        ...

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some of its rows: int64 [T] to [T, in_features] of the activations' type."""
        ...


@dataclass(frozen=True)
class Weight:
    """A matrix [out_features, in_features]."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Weight:
        """One plain part."""
        return cls((PlainPart(tensor),))

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def plain(self) -> torch.Tensor | None:
        """All of it as one tensor of a float type, where it is held so."""
        return self.parts[0].plain if len(self.parts) == 1 else None

    @property
    def coded(self) -> Coded | None:
        """All of it as codes with scales, where it is held so."""
        return self.parts[0].coded if len(self.parts) == 1 else None

    @property
    def coded_parts(self) -> tuple[Coded, ...] | None:
        """Its parts, where all of them are held so."""
        parts = tuple(part.coded for part in self.parts if part.coded is not None)
        return parts if len(parts) == len(self.parts) else None

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weight.T + bias [out_features]: [.., in_features] to [.., out_features] of the same type."""
        plain, coded = self.plain, self.coded
        if plain is not None:
            return kernels.of(x).multiply(x, plain, bias)
        if coded is not None:
            return kernels.of(x).multiply_coded(x, coded, bias)
        out = x.new_empty(*x.shape[:-1], self.num_rows)
        columns = out.view(-1, self.num_rows).split_with_sizes([part.num_rows for part in self.parts], dim=1)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        for part, place in zip(self.parts, columns, strict=True):
            part.multiply_into(flat, place)
        return out if bias is None else out.add_(bias)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        """`ingle.kernels.reference.gated` of that product: [T, in_features] to [T, out_features / 2]."""
        plain = self.plain
        if plain is not None:
            return kernels.of(x).multiply_gated(x, plain, bias, activation)
        return kernels.of(x).gated(self.multiply(x, bias), activation)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some of its rows, as an embedding looks them up: int64 [T] to [T, in_features] of the activations' type.

        For a matrix of one part.
        """
        (part,) = self.parts
        return part.rows(indices)


@dataclass(frozen=True)
class PlainPart:
    """Numbers of a float type."""

    tensor: torch.Tensor
    """[num_rows, in_features]"""

    @property
    def num_rows(self) -> int:
        return len(self.tensor)

    @property
    def num_parameters(self) -> int:
        return self.tensor.numel()

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize

    @property
    def plain(self) -> torch.Tensor:
        return self.tensor

    @property
    def coded(self) -> None:
        return None

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(kernels.of(x).multiply(x, self.tensor, None))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, self.tensor)


def total_size(parts: Iterable[torch.Tensor | Weight]) -> tuple[int, int]:
    """Parameters and bytes, of an object that comes twice once."""
    num_parameters = num_bytes = 0
    for part in {id(part): part for part in parts}.values():
        if isinstance(part, torch.Tensor):
            num_parameters, num_bytes = num_parameters + part.numel(), num_bytes + part.numel() * part.itemsize
        else:
            num_parameters, num_bytes = num_parameters + part.num_parameters, num_bytes + part.num_bytes
    return num_parameters, num_bytes
