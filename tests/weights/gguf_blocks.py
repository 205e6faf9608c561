"""Random blocks of every GGUF type that consists of codes."""

from __future__ import annotations

import gguf
import numpy as np

HALVES = {
    "Q4_0": (0, 1), "Q4_1": (0, 2), "Q5_0": (0, 1), "Q5_1": (0, 2), "Q8_0": (0, 1), "Q2_K": (80, 2), "Q3_K": (108, 1),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1), "IQ4_NL": (0, 1), "IQ4_XS": (0, 1), "TQ1_0": (52, 1),
    "TQ2_0": (64, 1),
}  # fmt: skip
"""Where a block has numbers of binary16, and how many."""


def random_blocks(kind: str, rows: int, columns: int, *, std: float | None = None, seed: int = 5) -> np.ndarray:
    """uint8 [rows, bytes of a row], of numbers that deviate by `std` from their mean, by about that of MXFP4."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, columns // elements, num_bytes), dtype=np.uint8)
    steps = random.uniform(0.001, 0.02, (*blocks.shape[:2], 2))
    exponents = random.integers(118, 126, blocks.shape[:2])

    def write(scale: float) -> np.ndarray:
        if kind == "MXFP4":
            blocks[..., 0] = exponents + round(np.log2(scale))
        else:
            at, count = HALVES.get(kind, (0, 1))
            halves = (steps[..., :count] * scale).astype(np.float16)
            if kind == "IQ1_M":  # four bits of it in each of four halves
                parts = blocks[..., 48:].copy().view(np.uint16)
                parts = parts & 0xFFF | (halves.view(np.uint16) >> np.arange(0, 16, 4, dtype=np.uint16) & 15) << 12
                blocks[..., 48:] = parts.astype(np.uint16).view(np.uint8)
            else:
                blocks[..., at : at + 2 * count] = halves.view(np.uint8)
        return blocks.reshape(rows, -1)

    data = write(1)
    return data if std is None else write(std / decoded(kind, data).std())


def decoded(kind: str, data: np.ndarray) -> np.ndarray:
    """As gguf's own way back has it."""
    return np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
