"""A quantized linear layer as a checkpoint's files have it: its tensors, and what is said where they are amiss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized.groups import E4M3, Floats
from ingle.weights.quantized.scheme import MARKERS, Scheme

Numbers = npt.NDArray[np.generic]
Words = npt.NDArray[np.int32]
Shape = tuple[int, ...]

FLOATS = ("F16", "BF16", "F32")
FP8, EXPONENTS = "F8_E4M3", "F8_E8M0"
DOWNLOAD = "download the model's files again, all of them"


class StoredTensor(NamedTuple):
    type: str
    """As safetensors call it: I32, F16, F8_E4M3."""
    shape: Shape
    read: Callable[[], Numbers]
    """In the file's mapping; BF16 as uint16, floats of 8 bits as uint8."""


class Tensors(Protocol):
    """The tensors of a checkpoint's files."""

    def __contains__(self, name: str) -> bool: ...

    def stored(self, name: str) -> StoredTensor:
        """Raises `ModelError` when there is no such tensor."""
        ...

    def where(self, name: str) -> str:
        """The file that has it."""
        ...


class Wanted(NamedTuple):
    """What a layer of a scheme needs."""

    suffix: str
    """What follows the module's name."""
    types: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """One of which it has."""


@dataclass(frozen=True)
class Module:
    """A quantized linear layer."""

    name: str
    scheme: Scheme
    tensors: Tensors

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS[self.scheme.layout]

    @property
    def marker(self) -> str:
        """The tensor that has the codes."""
        return next((name for name in self.markers if self.has(name)), self.markers[0])

    def has(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self.tensors

    def stored(self, suffix: str) -> StoredTensor:
        """Raises `ModelError` where it is missing."""
        if not self.has(suffix):
            marker = f"{self.name}.{self.marker}"
            file = self.tensors.where(marker) if marker in self.tensors else "the checkpoint"
            raise ModelError(
                f"{file}: has no tensor {self.name}.{suffix}, which {self.scheme.name} needs beside {marker}",
                alternative=DOWNLOAD,
            )
        return self.tensors.stored(f"{self.name}.{suffix}")

    def words(self, suffix: str) -> Words:
        return self.stored(suffix).read().astype(np.int32, copy=False)

    def array(self, suffix: str) -> Numbers:
        return self.stored(suffix).read()

    def bytes_of(self, suffix: str) -> npt.NDArray[np.uint8]:
        """Of a tensor whatever its type is, one after the other."""
        return np.ascontiguousarray(self.stored(suffix).read()).reshape(-1).view(np.uint8)

    def floats(self, suffix: str) -> Floats:
        """As float32, which holds them all."""
        stored = self.stored(suffix)
        values = stored.read()
        if stored.type == "BF16":
            wide: Floats = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return wide
        if stored.type == FP8:
            decoded: Floats = E4M3[values.astype(np.uint8, copy=False)]
            return decoded
        if stored.type in (EXPONENTS, "U8"):
            return powers_of_two(values.astype(np.uint8, copy=False))
        numbers: Floats = values.astype(np.float32, copy=False)
        return numbers

    def fail(self, suffix: str, what: str, alternative: str | None = None) -> ModelError:
        name = f"{self.name}.{suffix}"
        return ModelError(f"{self.tensors.where(name)}: tensor {name} {what}", alternative=alternative)

    def require(self, wanted: Wanted, columns: int) -> None:
        """Raises `ModelError` for a tensor that is missing, misshapen or of another type."""
        stored = self.stored(wanted.suffix)
        if stored.type not in wanted.types:
            raise self.fail(
                wanted.suffix, f"is {stored.type}, and {self.scheme.name} asks for {' or '.join(wanted.types)}"
            )
        if stored.shape not in wanted.shapes:
            raise self._misshapen(wanted, stored.shape, columns)

    def _misshapen(self, wanted: Wanted, shape: Shape, columns: int) -> ModelError:
        scheme, alternative = self.scheme, DOWNLOAD
        groups = shape[0 if scheme.layout in ("gptq", "awq") else -1] if shape else 1
        of_scales = wanted.suffix in ("scales", "weight_scale_inv", "weight_scale")
        if of_scales and groups and columns % groups == 0 and columns // groups != (scheme.group_size or columns):
            alternative = f"the configuration may be another model's: these files have groups of {columns // groups}"
        asked = " or ".join(map(str, wanted.shapes[-1:]))
        return self.fail(wanted.suffix, f"has shape {shape}, and {scheme.name} asks for {asked}", alternative)


def powers_of_two(exponents: npt.NDArray[np.uint8]) -> Floats:
    """What microscaling formats store of a scale (E8M0): 2 to the power of so much less 127. 255 is none."""
    bits = exponents.astype(np.uint32)
    values = np.where(bits == 0, np.uint32(1 << 22), bits << 23).view(np.float32)
    return np.where(exponents == 255, np.float32("nan"), values)
