from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from ingle.errors import ModelError
from ingle.weights import dequantize, grids
from ingle.weights.dequantize import dequantize_into
from ingle.weights.gguf import GgufFile, GgufTensor

SMALL = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"]
LARGE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
         "IQ2_S", "IQ3_XXS", "IQ3_S"]  # fmt: skip
TYPES = [*SMALL, *LARGE]


def stored(write_gguf, type_name: str, rows: int, columns: int, seed: int = 0) -> tuple[GgufTensor, np.ndarray]:
    """A tensor of random bytes, every bit pattern included, and what the reference decodes them to."""
    kind = gguf.GGMLQuantizationType[type_name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // elements * nbytes), dtype=np.uint8)
    path = write_gguf(tensors={"w": raw}, stored_types={"w": kind})
    with np.errstate(all="ignore"):
        return GgufFile(path).tensors["w"], gguf.dequantize(raw, kind)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("rows, blocks", [(1, 1), (7, 3), (33, 2)])
def test_float32_equals_the_reference_exactly(write_gguf, type_name: str, rows: int, blocks: int) -> None:
    columns = blocks * (256 if type_name in LARGE else 32)
    tensor, expected = stored(write_gguf, type_name, rows, columns, seed=rows)
    out = torch.full((rows, columns), 7.0)
    dequantize_into(tensor, out)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("type_name", TYPES)
def test_chunks_join_without_a_seam(write_gguf, type_name: str, monkeypatch) -> None:
    tensor, expected = stored(write_gguf, type_name, 10, 512)
    monkeypatch.setattr(dequantize, "_CHUNK_ELEMENTS", 3 * 512)
    out = torch.empty(10, 512)
    dequantize_into(tensor, out)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(write_gguf, dtype: torch.dtype) -> None:
    tensor, expected = stored(write_gguf, "Q4_1", 5, 64)
    out = torch.empty(5, 64, dtype=dtype)
    dequantize_into(tensor, out)
    assert torch.equal(out.nan_to_num(), torch.from_numpy(expected).to(dtype).nan_to_num())


def test_slice_of_a_fused_parameter_and_row_order(write_gguf) -> None:
    tensor, expected = stored(write_gguf, "Q8_0", 6, 32)
    fused = torch.zeros(10, 64)
    order = np.array([5, 3, 1, 0, 2, 4])
    dequantize_into(tensor, fused[2:8, 32:], order)
    np.testing.assert_array_equal(fused[2:8, 32:].numpy(), expected[order])
    assert fused[:2].count_nonzero() == fused[8:].count_nonzero() == fused[:, :32].count_nonzero() == 0


def test_unsupported_type_names_tensor_type_and_alternatives(write_gguf) -> None:
    kind = gguf.GGMLQuantizationType.Q8_K
    path = write_gguf(tensors={"w": np.zeros((2, 292), np.uint8)}, stored_types={"w": kind})
    with pytest.raises(ModelError, match=r"tensor w is stored as Q8_K; ingle reads F32, .*Q8_0"):
        dequantize_into(GgufFile(path).tensors["w"], torch.empty(2, 256))


def test_grids_are_those_of_the_format() -> None:
    for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"):
        theirs = getattr(gguf.quants, name)
        theirs.init_grid()
        ours = np.array(theirs.grid_map)[grids.magnitudes(name)]
        np.testing.assert_array_equal(ours, theirs.grid.reshape(theirs.grid_shape))
    assert grids.of("Q4_K") is None
