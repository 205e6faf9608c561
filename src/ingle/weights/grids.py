"""The grids of GGUF's smallest types: which magnitudes the neighbours that share a code have.

`grids.bin` has them one after the other, a little-endian uint16 an entry: of 8 neighbours two bits each, of 4
neighbours three, the first in the lowest. They are part of the format (ggml-common.h: `iq2xxs_grid` and so on) and were
not chosen by rule, so they can only be copied; the tests compare them with the package `gguf`'s.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SIZES = {"IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512, "IQ1_S": 2048}
"""In the file's order."""
_SAME = {"IQ1_M": "IQ1_S"}


@lru_cache(maxsize=1)
def _stored() -> npt.NDArray[np.uint16]:
    return np.frombuffer(Path(__file__).with_suffix(".bin").read_bytes(), "<u2")


def of(stored_type: str) -> npt.NDArray[np.uint16] | None:
    """Packed as in the file; None for types without one."""
    name, start = _SAME.get(stored_type, stored_type), 0
    for each, size in _SIZES.items():
        if each == name:
            return _stored()[start : start + size]
        start += size
    return None


def magnitudes(stored_type: str) -> npt.NDArray[np.uint8]:
    """[entries, neighbours], which magnitude each has, of a type that has a grid."""
    packed = of(stored_type)
    assert packed is not None
    bits, count = (3, 4) if stored_type.startswith("IQ3") else (2, 8)
    return (packed[:, None] >> (bits * np.arange(count, dtype=np.uint16)) & (1 << bits) - 1).astype(np.uint8)
