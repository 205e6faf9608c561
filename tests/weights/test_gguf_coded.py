"""GGUF's blocks apart, as products on a GPU take them, hold the numbers that the blocks hold."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import reference_coded
from ingle.kernels.coded import Coded
from ingle.kernels.gpu import coded as gpu
from ingle.kernels.gpu import decoded as by_pieces
from ingle.kernels.gpu import planes
from ingle.weights.code_types import BITS_ON_GPU, GRIDS
from ingle.weights.formats import PlainFormat
from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.gguf_coded import TYPES, coded_of
from ingle.weights.source import StoredRows
from tests.kernels.fused import DEVICE, ON_GPU
from tests.weights.gguf_blocks import decoded, random_blocks
from tests.weights.test_packed import GATE, UP, K, Q, V, names, stored_source

DTYPE = torch.bfloat16 if ON_GPU else torch.float16
TOLERANCE = 1e-2 if ON_GPU else 5e-3
"""Of a product's norm. The interpreter multiplies bfloat16 wrongly."""
PLAIN = PlainFormat(torch.float32, torch.device("cpu"))
KEEPING = PlainFormat(torch.float32, torch.device("cpu"), keeps_blocks=True)
_BITS = {block.name: 8 * block.nbytes / block.elements for block in BLOCK_TYPES.values()}
ROOM = {"TQ1_0": 1.23, "MXFP4": 1.06, **{kind: BITS_ON_GPU[kind] / _BITS[kind] for kind in GRIDS}}
"""How many times as much a number takes in memory as in the file, at most, where that is more than the rest's."""


def stored(kind: str, rows: int, columns: int) -> tuple[StoredRows, torch.Tensor]:
    """Random blocks, and what gguf's own way back makes of them."""
    data = random_blocks(kind, rows, columns)
    return StoredRows(kind, data), torch.from_numpy(decoded(kind, data)).to(DEVICE)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str) -> None:
    rows, exact = stored(kind, 40, 512)
    coded = coded_of(rows, DEVICE)
    scale = float(exact.abs().max())
    torch.testing.assert_close(coded.decoded(slice(None), torch.float32), exact, atol=scale * 1e-6, rtol=1e-6)
    assert coded.num_bytes <= rows.data.nbytes * ROOM.get(kind, 1.04) + 16
    assert coded.num_bytes == pytest.approx(exact.numel() * BITS_ON_GPU[kind] / 8, abs=16)


def test_large_scales_beside_others() -> None:
    """Of a scale above one MXFP4's numbers are looked up, and so are those of a matrix below it."""
    (rows, _), (others, _) = stored("MXFP4", 4, 64), stored("MXFP4", 4, 64)
    rows.data.reshape(-1, 17)[:, 0] = 120  # the block's exponent, 128 of which is a scale of one
    others.data.reshape(-1, 17)[:, 0] = 130
    parts = coded_of(rows, DEVICE), coded_of(others, DEVICE)
    assert parts[0].is_e2m1 and not parts[1].is_e2m1 and not Coded.joined(parts).is_e2m1
    assert Coded.joined(parts[:1] * 2).is_e2m1


@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 17, 64, 128, 1000] if ON_GPU else [9])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if ON_GPU or kind not in GRIDS[2:]])
def test_products(kind: str, num_rows: int) -> None:
    size_out, size_in = (72, 768) if ON_GPU else (20, 256)
    rows, exact = stored(kind, size_out, size_in)
    coded = coded_of(rows, DEVICE)
    x = torch.randn(num_rows, size_in, device=DEVICE).to(DTYPE)
    expected = x.double() @ exact.double().T
    for ours in (gpu.multiply_coded(x, coded, None), reference_coded.multiply_coded(x, coded)):
        assert float((ours.double() - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "MXFP4"])
def test_a_piece_is_decoded(kind: str) -> None:
    """For products of very many rows, between which of two nothing is left."""
    rows, exact = stored(kind, 72, 256)
    out = torch.full((41, 256), torch.nan, dtype=torch.float32, device=DEVICE)
    coded = coded_of(rows, DEVICE)
    for decode in (planes.decode, by_pieces.decode) if by_pieces.by_bytes(coded) else (planes.decode,):
        out.fill_(torch.nan)
        decode(coded, 30, out[:40])
        torch.testing.assert_close(out[:40], exact[30:70], atol=float(exact.abs().max()) * 1e-6, rtol=1e-6)
        assert out[40].isnan().all()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_by_a_scratch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As products of very many rows are, a piece of the matrix after the other."""
    rows, exact = stored(kind, 72, 256)
    scratch = torch.empty(30 * 256, dtype=DTYPE, device=DEVICE)
    monkeypatch.setattr(by_pieces, "_scratch", lambda device, dtype: scratch)
    x, bias = torch.randn(7, 256, device=DEVICE).to(DTYPE), torch.randn(72, device=DEVICE).to(DTYPE)
    expected = x.double() @ exact.double().T + bias.double()
    ours = by_pieces.multiply(x, coded_of(rows, DEVICE), bias)
    assert float((ours.double() - expected).norm() / expected.norm()) < TOLERANCE


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
    kinds = {"ffn_gate": ("F16", (40, 64)), "ffn_up": ("BF16", (40, 64))}
    source = stored_source(write_gguf, model_metadata, {f"blk.0.{name}.weight": kind for name, kind in kinds.items()})
    weight = PlainFormat(torch.float32, torch.device("cpu"), keeps_blocks=True).load(
        source, names(GATE, UP), [40, 40], 64
    )
    assert all(part.plain is not None for part in weight.parts)
