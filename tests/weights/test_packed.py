"""Matrices that are packed as a GGUF file stores them hold the file's numbers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ingle.device.native.device import NativeDevice
from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_source import GgufSource
from ingle.weights.packed_matrix import PackedMatrix, load_matrix
from tests.weights.test_dequantize import LARGE, TYPES

UP, GATE, Q, K, V = "mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"


@pytest.fixture(autouse=True)
def kernels() -> None:
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)


def names(*modules: str) -> list[str]:
    return [f"model.layers.0.{module}.weight" for module in modules]


def stored_source(write_gguf, metadata, tensors: dict[str, tuple[str, tuple[int, int]]]) -> GgufSource:
    raw, types = {}, {}
    for index, (name, (type_name, (rows, columns))) in enumerate(tensors.items()):
        types[name] = kind = gguf.GGMLQuantizationType[type_name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (rows, columns // elements * nbytes)
        # Bytes below 60 make no binary16 that is infinite or NaN, which would hide what they are multiplied with.
        raw[name] = np.random.default_rng(index).integers(0, 60, shape, dtype=np.uint8)
    return GgufSource(GgufFile(write_gguf({**metadata, "llama.vocab_size": 7}, raw, stored_types=types)))


def loaded(
    source: GgufSource, modules: list[str], num_rows: list[int], columns: int
) -> tuple[PackedMatrix, torch.Tensor]:
    """The packed matrix, and the same tensors decoded to float32."""
    matrix = load_matrix(source, names(*modules), num_rows, columns)
    decoded = torch.empty(sum(num_rows), columns)
    for name, part in zip(names(*modules), decoded.split_with_sizes(num_rows), strict=True):
        source.load_into(name, part)
    return matrix, decoded


def all_rows(matrix: PackedMatrix) -> torch.Tensor:
    parts = [PackedMatrix((part,), part.matrix.rows, part.matrix.columns) for part in matrix.parts]
    return torch.cat([torch.from_numpy(part.rows(np.arange(part.num_rows))) for part in parts])


@pytest.mark.parametrize("type_name", TYPES)
def test_every_stored_type(write_gguf, model_metadata, type_name: str) -> None:
    columns = 256 if type_name in LARGE else 96
    source = stored_source(write_gguf, model_metadata, {"blk.0.ffn_up.weight": (type_name, (40, columns))})
    matrix, decoded = loaded(source, [UP], [40], columns)
    if type_name in ("F32", "F16", "BF16"):
        decoded = decoded.bfloat16().float()
    scale = float(decoded.abs().max())
    torch.testing.assert_close(all_rows(matrix), decoded, atol=scale * 1e-7, rtol=3e-7)
    assert matrix.num_parameters == 40 * columns
    x = np.random.default_rng(1).standard_normal((17, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ decoded.double().numpy().T
    tolerance = 8e-3 if type_name in ("F32", "F16", "BF16") else 2e-3
    for count in (1, 17):
        product = matrix.multiply(x[:count])
        np.testing.assert_allclose(product, expected[:count], rtol=0, atol=tolerance * float(np.abs(expected).max()))


def test_equal_types_share_a_part_and_others_do_not(write_gguf, model_metadata) -> None:
    """Queries and keys come in the order of Hugging Face's rotation, as `load_into` gives them."""
    kinds = {"attn_q": ("Q4_1", (64, 64)), "attn_k": ("Q4_1", (32, 64)), "attn_v": ("Q8_0", (32, 64))}
    source = stored_source(write_gguf, model_metadata, {f"blk.0.{name}.weight": kind for name, kind in kinds.items()})
    matrix, decoded = loaded(source, [Q, K, V], [64, 32, 32], 64)
    assert [(part.matrix.rows, part.matrix.bits) for part in matrix.parts] == [(96, 4), (32, 8)]
    torch.testing.assert_close(all_rows(matrix), decoded, atol=1e-7, rtol=3e-7)
    x = torch.randn(3, 64)
    expected = x.bfloat16().float() @ decoded.T
    product = torch.from_numpy(matrix.multiply(x.numpy()))
    torch.testing.assert_close(product, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)


def test_shapes_are_checked(write_gguf, model_metadata) -> None:
    source = stored_source(write_gguf, model_metadata, {"blk.0.ffn_up.weight": ("Q4_0", (40, 64))})
    with pytest.raises(ModelError, match=r"has shape \(40, 64\), and the configuration asks for \(41, 64\)"):
        load_matrix(source, names(UP), [41], 64)
    with pytest.raises(ModelError, match="ffn_gate"):
        load_matrix(source, names(GATE), [40], 64)


def test_a_plain_checkpoint_is_packed_as_bfloat16(tmp_path: Path) -> None:
    from tests.support import engine_for, engine_logits, random_prompt, save_checkpoint

    folder, prompt = save_checkpoint(tmp_path, num_key_value_heads=1), random_prompt(3, 50)
    ours = engine_for(folder, dtype="bfloat16")
    exact = engine_logits(engine_for(folder, dtype="float32"), prompt)
    assert isinstance(ours.worker.device, NativeDevice) and ours.worker.device.kv.spec.dtype == "bfloat16"
    assert [part.matrix.bits for part in ours.worker.device.model.head.parts] == [16]
    torch.testing.assert_close(engine_logits(ours, prompt), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_what_cannot_be_packed_is_named(write_gguf, model_metadata) -> None:
    source = stored_source(write_gguf, model_metadata, {"blk.0.ffn_up.weight": ("Q8_K", (4, 256))})
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight is stored as Q8_K; ingle reads F32, F16"):
        load_matrix(source, names(UP), [4], 256)
