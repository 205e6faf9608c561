"""How the numbers of a matrix are coded: small integers, and a scale and maybe a minimum for each group; or floats."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ingle.kernels.cpu.library import FLOAT8
from ingle.weights.quantized.tables import TABLES, Table

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_COUNTING = tuple(range(16))
_FROM_MINUS_1, _FROM_MINUS_4, _FROM_MINUS_8 = (tuple(code - low for code in range(16)) for low in (1, 4, 8))


def _with_signs(*magnitudes: int) -> tuple[int, ...]:
    """Of codes whose highest bit is a sign, of 3 bits or 4."""
    both = (*magnitudes, *(-each for each in magnitudes))
    return (*both, *(0,) * (16 - len(both)))


_IQ1_VALUES = (-7, 1, 9, 0, -9, -1, 7) + (0,) * 9
"""Of -1, 0 and 1, an eighth more, and an eighth less."""
_IQ2_VALUES = _with_signs(8, 25, 43, 0)


@dataclass(frozen=True)
class CodeType:
    bits: int
    """4: an index into the codebook; 5 and 6: numbers from the codebook's first on; 8: a value; `library.FLOAT8`; 16: a
    bfloat16, without scale; 32: a float32."""
    group_size: int
    """Neighbouring numbers of a row that share a scale."""
    wide_scales: bool = False
    """Scales and minima need float32; otherwise float16 holds them exactly."""
    has_minima: bool = False
    steps: bool = False
    """Scales and minima are small integers, and 256 columns have what both are multiplied with, in float16."""
    minima_in_scales: bool = False
    """Minima are small integers times the scale."""
    unit: float = 1.0
    """What all numbers are multiplied with."""
    codebook: tuple[int, ...] = (0,) * 16
    """The value of each 4-bit code, of the stored ones where they are decoded to float32."""
    operand_bits: int = 16
    """Of the integers that codes are multiplied with: 16, or 8 where the processor gains by it."""

    @property
    def bytes_each(self) -> float:
        """That a number takes with its share of scales."""
        if self.bits >= 16:
            return self.bits / 8
        kinds = 1 + self.has_minima
        if self.steps:
            scales = kinds / self.group_size + 2 * kinds / 256
        else:
            each = 4 if self.wide_scales else 2
            scales = (each + (0 if not self.has_minima else 1 if self.minima_in_scales else each)) / self.group_size
        return abs(self.bits) / 8 + scales


CODE_TYPES = {
    "Q4_0": CodeType(4, 32, codebook=_FROM_MINUS_8),
    "Q4_1": CodeType(4, 32, has_minima=True, codebook=_COUNTING),
    "Q5_0": CodeType(5, 32, codebook=(-16,) * 16),
    "Q5_1": CodeType(5, 32, has_minima=True),
    "Q8_0": CodeType(8, 32),
    "Q2_K": CodeType(4, 16, steps=True, has_minima=True, codebook=_COUNTING),
    "Q3_K": CodeType(4, 16, steps=True, codebook=_FROM_MINUS_4),
    "Q4_K": CodeType(4, 32, steps=True, has_minima=True, codebook=_COUNTING),
    "Q5_K": CodeType(5, 32, steps=True, has_minima=True),
    "Q6_K": CodeType(6, 16, steps=True, codebook=(-32,) * 16),
    "IQ4_NL": CodeType(4, 32, codebook=_IQ4_VALUES),
    "IQ4_XS": CodeType(4, 32, steps=True, codebook=_IQ4_VALUES),
    "IQ1_S": CodeType(4, 32, steps=True, unit=1 / 8, codebook=_IQ1_VALUES),
    "IQ1_M": CodeType(4, 16, steps=True, unit=1 / 8, codebook=_IQ1_VALUES),
    "IQ2_XXS": CodeType(4, 32, steps=True, unit=1 / 8, codebook=_IQ2_VALUES),
    "IQ2_XS": CodeType(4, 16, steps=True, unit=1 / 8, codebook=_IQ2_VALUES),
    "IQ2_S": CodeType(4, 16, steps=True, unit=1 / 8, codebook=_IQ2_VALUES),
    "IQ3_XXS": CodeType(4, 32, steps=True, unit=1 / 4, codebook=_with_signs(4, 12, 20, 28, 36, 44, 52, 62)),
    "IQ3_S": CodeType(4, 32, steps=True, codebook=_with_signs(*range(1, 16, 2))),
    "TQ1_0": CodeType(4, 32, codebook=_FROM_MINUS_1),
    "TQ2_0": CodeType(4, 32, codebook=_FROM_MINUS_1),
    "MXFP4": CodeType(4, 32, wide_scales=True, codebook=_E2M1_DOUBLED),
}
"""Of GGUF's block types that consist of codes, by their names."""

GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Whose codes are those of several neighbours: they are held as one for each."""


BLOCKS_ON_GPU = True
"""Whether a GPU holds GGUF's blocks as they are stored."""
TABLES_ON_GPU = False
"""The same of a folder's codes with a table, which have not run so."""
BITS_ON_GPU = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.5625, "Q4_K": 4.625,
    "Q5_K": 5.625, "Q6_K": 6.5625, "IQ1_S": 4.375, "IQ1_M": 4.625, "IQ2_XXS": 4.375, "IQ2_XS": 4.625, "IQ2_S": 4.625,
    "IQ3_XXS": 4.375, "IQ3_S": 4.375, "IQ4_NL": 4.5, "IQ4_XS": 4.3125, "TQ1_0": 2.0625, "TQ2_0": 2.0625, "MXFP4": 4.5,
}  # fmt: skip
"""That a number takes of a GPU's memory, with its share of scales, as `ingle.weights.gguf_coded` holds it."""

CODED = {"int4": CodeType(4, 32, codebook=_FROM_MINUS_8), "int8": CodeType(8, 32), "fp8": CodeType(FLOAT8, 32)}
"""Of `quantized.groups.Kind`, but for what its scales are."""


@dataclass(frozen=True)
class Integers:
    """A table as the kernels multiply it: `unit` times small integers."""

    codebook: tuple[int, ...]
    """At most 1,028: times the largest activation, 64 of them stay below 2 ** 31."""
    unit: float

    @classmethod
    def of(cls, table: Table, unit: float) -> Integers:
        return cls(tuple(round(number / unit) for number in TABLES[table]), unit)


INTEGERS = {
    "nf4": Integers.of("nf4", 1 / 914),
    "fp4": Integers.of("fp4", 1 / 192),
    "mxfp4": Integers.of("mxfp4", 0.5),
    "nvfp4": Integers.of("nvfp4", 0.5),
}
"""Exact but for NF4, whose numbers are off by less than 0.0004 of the largest."""

FLOATS = CodeType(bits=16, group_size=32)
"""What is stored as floats, and becomes bfloat16."""


def kept(stored_type: str) -> CodeType:
    """Codes as they are stored, floats as bfloat16: of a type such as Q4_1 or F32."""
    return CODE_TYPES.get(stored_type, FLOATS)


def kept_for_bytes(stored_type: str) -> CodeType:
    """The same, to be multiplied with activations of 8 bits."""
    return replace(kept(stored_type), operand_bits=8)


def exact(stored_type: str) -> CodeType:
    """Every number as the float32 that it stands for."""
    held = kept(stored_type)
    return CodeType(bits=32, group_size=32, unit=held.unit, codebook=held.codebook)
