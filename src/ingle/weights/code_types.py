"""How the numbers of a matrix are coded: small integers, and a scale and maybe a minimum for each group; or floats."""

from __future__ import annotations

from dataclasses import dataclass

from ingle.kernels.cpu.library import FLOAT8

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_COUNTING = tuple(range(16))
_FROM_MINUS_1, _FROM_MINUS_4, _FROM_MINUS_8 = (tuple(code - low for code in range(16)) for low in (1, 4, 8))


@dataclass(frozen=True)
class CodeType:
    bits: int
    """4: an index into the codebook; 8: a value; `library.FLOAT8`; 16: a bfloat16, without scale; 32: a float32."""
    group_size: int
    """Neighbouring numbers of a row that share a scale."""
    wide_scales: bool = False
    """Scales and minima need float32; otherwise float16 holds them exactly."""
    has_minima: bool = False
    codebook: tuple[int, ...] = (0,) * 16
    """The value of each 4-bit code, of the stored ones where they are decoded to float32."""


CODE_TYPES = {
    "Q4_0": CodeType(4, 32, codebook=_FROM_MINUS_8),
    "Q4_1": CodeType(4, 32, has_minima=True, codebook=_COUNTING),
    "Q5_0": CodeType(8, 32),
    "Q5_1": CodeType(8, 32, has_minima=True),
    "Q8_0": CodeType(8, 32),
    "Q2_K": CodeType(4, 16, wide_scales=True, has_minima=True, codebook=_COUNTING),
    "Q3_K": CodeType(4, 16, wide_scales=True, codebook=_FROM_MINUS_4),
    "Q4_K": CodeType(4, 32, wide_scales=True, has_minima=True, codebook=_COUNTING),
    "Q5_K": CodeType(8, 32, wide_scales=True, has_minima=True),
    "Q6_K": CodeType(8, 16, wide_scales=True),
    "IQ4_NL": CodeType(4, 32, codebook=_IQ4_VALUES),
    "IQ4_XS": CodeType(4, 32, wide_scales=True, codebook=_IQ4_VALUES),
    "TQ1_0": CodeType(4, 32, codebook=_FROM_MINUS_1),
    "TQ2_0": CodeType(4, 32, codebook=_FROM_MINUS_1),
    "MXFP4": CodeType(4, 32, wide_scales=True, codebook=_E2M1_DOUBLED),
}
"""Of GGUF's block types that consist of codes, by their names."""

BITS_ON_GPU = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.5625, "Q4_K": 4.625,
    "Q5_K": 5.625, "Q6_K": 6.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.3125, "TQ1_0": 2.0625, "TQ2_0": 2.0625, "MXFP4": 4.5,
}  # fmt: skip
"""That a number takes of a GPU's memory, with its share of scales, as `ingle.weights.gguf_coded` holds it."""

CODED = {"int4": CodeType(4, 32, codebook=_FROM_MINUS_8), "int8": CodeType(8, 32), "fp8": CodeType(FLOAT8, 32)}
"""Of `quantized.groups.Kind`, but for what its scales are."""

FLOATS = CodeType(bits=16, group_size=32)
"""What is stored as floats, and becomes bfloat16."""


def kept(stored_type: str) -> CodeType:
    """Codes as they are stored, floats as bfloat16: of a type such as Q4_1 or F32."""
    return CODE_TYPES.get(stored_type, FLOATS)


def exact(stored_type: str) -> CodeType:
    """Every number as the float32 that it stands for."""
    return CodeType(bits=32, group_size=32, codebook=kept(stored_type).codebook)
