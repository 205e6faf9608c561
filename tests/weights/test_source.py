from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ingle.errors import ConfigError, ModelError
from ingle.model.loader import Loader
from ingle.weights.formats import PlainFormat
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_hf import ARCHITECTURES, gguf_tensor_name
from ingle.weights.gguf_source import GgufSource
from ingle.weights.open import open_source
from ingle.weights.safetensors_source import SafetensorsSource
from ingle.weights.source import check_sizes
from ingle.weights.tensor_sources import DummySource, TorchSource

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
V = "model.layers.0.self_attn.v_proj"


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def loaded(source: Any, name: str, *shape: int) -> torch.Tensor:
    out = torch.empty(shape)
    source.load_into(name, out)
    return out


@pytest.mark.parametrize(
    "hf_name, name",
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.input_layernorm.weight", "blk.11.attn_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
        ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.mlp.experts.weight", None),
        ("model.layers.x.mlp.down_proj.weight", None),
        ("self_attn.q_proj.weight", None),
        ("weight", None),
    ],
)
def test_gguf_names(hf_name: str, name: str | None) -> None:
    assert gguf_tensor_name(hf_name, ARCHITECTURES["llama"]) == name


def test_gguf_llama_gets_back_the_rows_of_queries_and_keys(write_gguf, model_metadata) -> None:
    q, k, v, q_bias = random(64, 64), random(32, 64), random(32, 64), random(64)
    tensors = {
        "token_embd.weight": random(40, 64),
        "blk.0.attn_q.weight": permute(q, 4),
        "blk.0.attn_k.weight": permute(k, 2),
        "blk.0.attn_v.weight": v,
        "blk.0.attn_q.bias": permute(q_bias, 4),
    }
    source = GgufSource(GgufFile(write_gguf(model_metadata, tensors)))
    np.testing.assert_array_equal(loaded(source, f"{Q}.weight", 64, 64), q)
    np.testing.assert_array_equal(loaded(source, f"{K}.weight", 32, 64), k)
    np.testing.assert_array_equal(loaded(source, f"{V}.weight", 32, 64), v)
    np.testing.assert_array_equal(loaded(source, f"{Q}.bias", 64), q_bias)
    assert f"{Q}.bias" in source
    assert "lm_head.weight" not in source and f"{K}.bias" not in source and "nonsense" not in source


def test_gguf_quantized_rows_are_permuted_whole(write_gguf, model_metadata) -> None:
    stored = permute(random(64, 64), 4)
    path = write_gguf(
        model_metadata,
        {"token_embd.weight": random(40, 64), "blk.0.attn_q.weight": stored},
        {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_0},
    )
    decoded = gguf.dequantize(gguf.quantize(stored, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    fused = torch.zeros(128, 64)
    GgufSource(GgufFile(path)).load_into(f"{Q}.weight", fused[64:])
    np.testing.assert_array_equal(permute(fused[64:].numpy(), 4), decoded)
    assert fused[:64].count_nonzero() == 0


def test_gguf_qwen_rows_stay_where_they_are(write_gguf) -> None:
    q = random(64, 64)
    source = GgufSource(GgufFile(write_gguf(tensors={"blk.0.attn_q.weight": q}, arch="qwen3")))
    np.testing.assert_array_equal(loaded(source, f"{Q}.weight", 64, 64), q)


def test_gguf_errors_name_tensor_file_and_shapes(write_gguf, model_metadata) -> None:
    path = write_gguf(model_metadata, {"token_embd.weight": random(40, 64), "blk.0.attn_q.weight": random(12, 64)})
    source = GgufSource(GgufFile(path))
    with pytest.raises(ModelError, match=r"model\.gguf: tensor token_embd\.weight has shape \(40, 64\).*\(41, 64\)"):
        source.load_into("model.embed_tokens.weight", torch.empty(41, 64))
    with pytest.raises(ModelError, match=r"model\.gguf: has no tensor output_norm\.weight"):
        source.load_into("model.norm.weight", torch.empty(64))
    with pytest.raises(ModelError, match="12 rows, no multiple of 2 x 4 heads"):
        source.load_into(f"{Q}.weight", torch.empty(12, 64))


def test_default_model_is_read_as_the_reference_reads_it(smollm2_gguf: Path) -> None:
    source = GgufSource(GgufFile(smollm2_gguf))
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    for name, rows, heads in [("q_proj", 576, 9), ("k_proj", 192, 3), ("v_proj", 192, None), ("o_proj", 576, None)]:
        weights = loaded(source, f"model.layers.29.self_attn.{name}.weight", rows, 576).numpy()
        stored = expected[gguf_tensor_name(f"model.layers.29.self_attn.{name}.weight", ARCHITECTURES["llama"]) or ""]
        np.testing.assert_array_equal(
            weights if heads is None else permute(weights, heads), gguf.dequantize(stored.data, stored.tensor_type)
        )
    assert "lm_head.weight" not in source


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_safetensors_single_file(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert "w" in source and "v" not in source
    fused = torch.zeros(4, 3, dtype=torch.bfloat16)
    source.load_into("w", fused[1:3])
    assert fused.tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0]]
    source.close()


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: damaged or truncated"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", "a\\b.safetensors"]
)
def test_safetensors_index_cannot_leave_the_folder(sharded: Path, shard: str) -> None:
    write_index(sharded, {"a": shard})
    with pytest.raises(ModelError, match=r"is not the name of a \.safetensors file in this folder"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}])
def test_safetensors_index_of_another_form(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(ModelError, match="weight_map"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("offsets", [((0, 16), (0, 16)), ((0, 16), (8, 24)), ((0, 16), (16, 1 << 40))], ids=str)
def test_safetensors_that_overlap_or_leave_the_file(tmp_path: Path, offsets: tuple[tuple[int, int], ...]) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in zip("ab", offsets, strict=True)
    }
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(ModelError, match="damaged or truncated"):
        SafetensorsSource(tmp_path)


def test_stored_types_count_numbers(sharded: Path, write_gguf, model_metadata) -> None:
    assert SafetensorsSource(sharded).stored_types == {"F32": 6, "BF16": 4}
    kinds = {"token_embd.weight": gguf.GGMLQuantizationType.Q4_0}
    path = write_gguf(model_metadata, {"token_embd.weight": random(40, 64), "output_norm.weight": random(64)}, kinds)
    assert GgufSource(GgufFile(path)).stored_types == {"Q4_0": 2560, "F32": 64}
    assert DummySource(0).stored_types == {}


def test_safetensors_wrong_shape_and_quantized_checkpoints(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(2, 3),
        "i": torch.zeros(2, dtype=torch.int8),
        "f": torch.zeros(2).to(torch.float8_e4m3fn),
        "p.qweight": torch.zeros(2, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    with pytest.raises(ModelError, match=r"tensor w has shape \(2, 3\).*\(3, 2\)"):
        loaded(source, "w", 3, 2)
    for name in ("i", "f"):
        with pytest.raises(ModelError, match=f"tensor {name} is .*quantized"):
            loaded(source, name, 2)
    with pytest.raises(ModelError, match=r"p\.weight is quantized"):
        loaded(source, "p.weight", 2)
    with pytest.raises(ModelError, match="has no tensor other"):
        loaded(source, "other", 2)


def test_a_cpu_gets_what_is_stored(tmp_path: Path) -> None:
    """The bytes of matrices, also of one in a stack, and vectors as float32."""
    stack, values = torch.randn(3, 4, 8), torch.randn(5)
    for name, dtype in {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
    }.items():
        save_file({"odd": torch.ones(3, dtype=torch.int8), "w": stack.to(dtype), "b": values.to(dtype)},
                  tmp_path / "model.safetensors")  # fmt: skip
        source = SafetensorsSource(tmp_path)
        rows = source.stored_rows("w[1/3]", 4, 8)
        stored = stack[1].to(dtype)
        expected = ("F32", stored.float()) if name == "F64" else (name, stored)
        assert (rows.type, rows.data.tobytes()) == (expected[0], expected[1].view(torch.uint8).numpy().tobytes())
        assert torch.equal(torch.from_numpy(source.floats("b", 5)), values.to(dtype).float())
        with pytest.raises(ModelError, match=r"\(5,\)"):
            source.floats("b", 6)
        with pytest.raises(ModelError, match="odd is I8, and the configuration does not say"):
            source.floats("odd", 3)
        del rows
        source.close()


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)


SAVED = save({"w": torch.arange(8.0), "v": torch.ones(2, 2)})


@given(
    cut=st.integers(0, len(SAVED)),
    flips=st.lists(st.tuples(st.integers(0, len(SAVED) - 1), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_safetensors_never_raise_anything_else(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(SAVED)
    for position, value in flips:
        raw[position] = value
    (tmp_path / "model.safetensors").write_bytes(raw[:cut])
    try:
        loaded(SafetensorsSource(tmp_path), "w", 8)
    except ModelError as error:
        assert "\n" not in str(error)


def test_dummy_is_deterministic_per_seed_and_name() -> None:
    source = DummySource(7)
    weights = loaded(source, f"{Q}.weight", 256, 64)
    assert torch.equal(weights, loaded(DummySource(7), f"{Q}.weight", 256, 64))
    assert not torch.equal(weights, loaded(source, f"{K}.weight", 256, 64))
    assert not torch.equal(weights, loaded(DummySource(8), f"{Q}.weight", 256, 64))
    assert abs(weights.mean()) < 0.002 and 0.015 < weights.std() < 0.025
    assert abs(loaded(source, "model.norm.weight", 1000).mean() - 1) < 0.01


def test_dummy_fills_only_the_slice_it_is_given() -> None:
    fused = torch.zeros(6, 8, dtype=torch.bfloat16)
    DummySource(0).load_into("w", fused[2:4])
    assert fused[:2].count_nonzero() == fused[4:].count_nonzero() == 0
    assert fused[2:4].count_nonzero() > 0


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, write_gguf, model_metadata) -> None:
    path = write_gguf(model_metadata, {"token_embd.weight": random(40, 64)})
    tensors = {"model.embed_tokens.weight": torch.zeros(40, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for source in (GgufSource(GgufFile(path)), SafetensorsSource(tmp_path), TorchSource(tmp_path)):
        assert source.shape("model.embed_tokens.weight") == (40, 64)
        check_sizes(source, ["model.embed_tokens.weight"], [40 * 64])
        loader = Loader(source, PlainFormat(torch.float32, CPU), torch.float32, CPU)
        for load in (loader.tensor, loader.matrix):
            with pytest.raises(ModelError, match=r"has shape \(40, 64\), and the configuration asks for"):
                load("model.embed_tokens.weight", 1 << 40, 1 << 20)
            with pytest.raises(ModelError, match="has no tensor"):
                load("model.norm.weight", 1 << 40, 1 << 20)
    assert DummySource(0).shape("any") is None


CPU = torch.device("cpu")


def test_open_source_picks_by_what_is_there(tmp_path: Path, write_gguf, model_metadata) -> None:
    path = write_gguf(model_metadata, {"token_embd.weight": random(40, 64)})
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    assert isinstance(open_source(path, "auto", 0), GgufSource)
    assert isinstance(open_source(path, "gguf", 0), GgufSource)
    assert isinstance(open_source(folder, "auto", 0), SafetensorsSource)
    assert isinstance(open_source(folder, "dummy", 0), DummySource)
    with pytest.raises(ConfigError, match="--load-format gguf"):
        open_source(folder, "gguf", 0)
    with pytest.raises(ConfigError, match="--load-format safetensors"):
        open_source(path, "safetensors", 0)
    with pytest.raises(ModelError, match="no such file"):
        open_source(tmp_path / "absent", "auto", 0)
