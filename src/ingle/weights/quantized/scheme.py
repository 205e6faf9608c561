"""How the matrices of a quantized checkpoint are stored, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ingle.errors import ModelError
from ingle.weights.quantized.tables import Table

Layout = Literal["gptq", "awq", "gemv", "packed", "whole", "nibbles", "blocks", "scb"]
"""`qweight`, packed along the inputs; along the outputs; along the inputs of each output; `weight_packed`; `weight`, a
byte a code; two codes a byte, in `weight_packed` or `weight`; bitsandbytes' in blocks of the flat matrix; its int8."""

MARKERS: dict[Layout, tuple[str, ...]] = {
    "gptq": ("qweight",),
    "awq": ("qweight",),
    "gemv": ("qweight",),
    "packed": ("weight_packed",),
    "whole": ("weight",),
    "nibbles": ("weight_packed", "weight"),
    "blocks": ("weight",),
    "scb": ("weight",),
}
"""The tensor that a module has which is stored so: one of these."""

Target = Literal["int4", "int8", "fp8"]
"""What weights of floats may be rounded to."""


@dataclass(frozen=True)
class Scheme:
    """Of the matrix of a linear layer."""

    layout: Layout
    bits: int
    is_float: bool = False
    """Codes are FP8, E4M3."""
    group_size: int | None = None
    """Neighbouring inputs that share a scale; None for all of a row."""
    block_rows: int = 1
    """Neighbouring outputs that share it too."""
    zero_offset: int = 0
    """What is added to a stored zero: GPTQ's first version stores one less than it means."""
    has_zeros: bool = False
    """Zeros are stored where the layout leaves that open."""
    quantizes_inputs: bool = False
    """Of FP8: the model was made for inputs of FP8."""
    table: Table | None = None
    """What codes of 4 bits stand for; None for integers."""

    @property
    def kind(self) -> Literal["int4", "int8", "fp8"]:
        """Of the codes in memory."""
        return "fp8" if self.is_float else "int4" if self.bits <= 4 else "int8"

    @property
    def stored_type(self) -> str:
        """A key of `source.CODED_BYTES`."""
        return self.table or self.kind

    @property
    def name(self) -> str:
        """For people, such as int4 in groups of 128."""
        kind = self.table.upper() if self.table else "FP8" if self.is_float else f"int{self.bits}"
        if self.group_size is None:
            return kind
        if self.block_rows > 1:
            return f"{kind} in blocks of {self.block_rows} x {self.group_size}"
        return f"{kind} in groups of {self.group_size}"


@dataclass(frozen=True)
class Rule:
    """A scheme and the modules that have it."""

    matches: Callable[[str], bool]
    """Of a module's name, such as model.layers.0.mlp.up_proj."""
    scheme: Scheme | None
    """None for those that are not quantized."""


@dataclass(frozen=True)
class Quantization:
    """Of a checkpoint."""

    method: str
    """For people: GPTQ, AWQ, FP8, compressed-tensors, ModelOpt."""
    source: str
    """The file, and the key in it, that says so."""
    rules: tuple[Rule, ...]
    """The first that matches a module has it; a module that none matches is not quantized."""

    @property
    def name(self) -> str:
        """For people, such as GPTQ, int4 in groups of 128."""
        names = dict.fromkeys(rule.scheme.name for rule in self.rules if rule.scheme is not None)
        return ", ".join([self.method, *names])

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    def scheme_of(self, module: str) -> Scheme | None:
        return next((rule.scheme for rule in self.rules if rule.matches(module)), None)

    def scheme_stored(self, module: str) -> Scheme:
        """Of a module that the checkpoint stores as codes, whatever the configuration excepts. Raises `ModelError`."""
        scheme = self.scheme_of(module)
        if scheme is not None:
            return scheme
        if len(self.schemes) != 1:
            raise ModelError(
                f"{self.source}: says how {len(self.schemes)} kinds of layers are quantized, and not how {module} is, "
                "which the checkpoint stores as codes",
                alternative="take the configuration that belongs to these files",
            )
        return self.schemes[0]


def always(module: str) -> bool:
    return True


def never(module: str) -> bool:
    return False
