"""GGUF's blocks apart, as products on a GPU take them, hold the numbers that the blocks hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from ingle.kernels import reference_coded
from ingle.kernels.gpu import coded as gpu
from ingle.weights.formats import PlainFormat
from ingle.weights.gguf_coded import TYPES, coded_of
from ingle.weights.source import StoredRows
from tests.kernels.fused import DEVICE
from tests.weights.test_packed import GATE, UP, K, Q, V, names, stored_source

DTYPE = torch.float16
PLAIN = PlainFormat(torch.float32, torch.device("cpu"))
KEEPING = PlainFormat(torch.float32, torch.device("cpu"), keeps_blocks=True)
ROOM = {"TQ1_0": 1.23, "MXFP4": 1.06}
"""How many times as much a number takes in memory as in the file, at most, where that is more than the rest's."""


def stored(kind: str, rows: int, columns: int) -> tuple[StoredRows, torch.Tensor]:
    """Random blocks, and what gguf's own way back makes of them."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    # Bytes below 124 make no binary16 that is infinite or NaN, nor a power of two too large for float32.
    data = np.random.default_rng(5).integers(0, 124, (rows, columns // elements * num_bytes), dtype=np.uint8)
    exact = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return StoredRows(kind, data), torch.from_numpy(np.array(exact)).to(DEVICE)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str) -> None:
    rows, exact = stored(kind, 40, 512)
    coded = coded_of(rows, DEVICE)
    scale = float(exact.abs().max())
    torch.testing.assert_close(coded.decoded(slice(None), torch.float32), exact, atol=scale * 1e-6, rtol=1e-6)
    assert coded.num_bytes <= rows.data.nbytes * ROOM.get(kind, 1.04) + 16
    assert coded.num_bytes == pytest.approx(exact.numel() * TYPES[kind].bytes_a_number, abs=16)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_products(kind: str) -> None:
    rows, exact = stored(kind, 72, 512)
    coded = coded_of(rows, DEVICE)
    x = torch.randn(5, 512, device=DEVICE).to(DTYPE)
    expected = x.double() @ exact.double().T
    for ours in (gpu.multiply_coded(x, coded, None), reference_coded.multiply_coded(x, coded)):
        assert float((ours.double() - expected).norm() / expected.norm()) < 5e-3


def test_a_matrix_of_several_types(write_gguf, model_metadata) -> None:
    """Queries and keys come in the order of Hugging Face's rotation; what is alike shares a part."""
    kinds = {"attn_q": ("Q4_0", (64, 64)), "attn_k": ("Q4_0", (32, 64)), "attn_v": ("Q8_0", (32, 64))}
    source = stored_source(write_gguf, model_metadata, {f"blk.0.{name}.weight": kind for name, kind in kinds.items()})
    weight = PlainFormat(torch.float32, torch.device("cpu"), keeps_blocks=True).load(
        source, names(Q, K, V), [64, 32, 32], 64
    )
    plain = PlainFormat(torch.float32, torch.device("cpu")).load(source, names(Q, K, V), [64, 32, 32], 64)
    assert [part.num_rows for part in weight.parts] == [96, 32] and plain.plain is not None
    x = torch.randn(3, 64)
    torch.testing.assert_close(
        weight.multiply(x), plain.multiply(x), atol=1e-4 * float(plain.plain.abs().max()), rtol=1e-5
    )


def test_floats_stay_floats(write_gguf, model_metadata) -> None:
    kinds = {"ffn_gate": ("F16", (40, 64)), "ffn_up": ("IQ4_NL", (40, 64))}
    source = stored_source(write_gguf, model_metadata, {f"blk.0.{name}.weight": kind for name, kind in kinds.items()})
    weight = PlainFormat(torch.float32, torch.device("cpu"), keeps_blocks=True).load(
        source, names(GATE, UP), [40, 40], 64
    )
    assert all(part.plain is not None for part in weight.parts)
