"""What a checkpoint holds outranks what its configuration says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.errors import ModelError
from tests.model import qwen1
from tests.support import engine_for, engine_logits, random_prompt, save_checkpoint
from tests.weights.gguf_models import write_gguf_model

PROMPT = random_prompt(3, 30)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Any], store: str = "safetensors", **config: Any) -> Path:
    """Changes the tensors of a checkpoint in place, and keys of its config."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    file.unlink()
    if store == "safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def logits(path: Path, dtype: str) -> torch.Tensor:
    return engine_logits(engine_for(path, dtype=dtype), PROMPT)


def built(path: Path, dtype: str) -> tuple[Engine, list[str]]:
    config = EngineConfig.of(str(path), dtype=dtype, device="cpu", kv_cache_memory="8MiB")  # type: ignore[arg-type]
    engine, info = build_engine(config, path)
    return engine, info.notices


def held_once(engine: Engine) -> bool:
    return engine.worker.device.model.head is engine.worker.device.model.embedding


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """PyTorch's decoder, and the one without it; bfloat16 is PyTorch's too in transformers' code."""
    return str(request.param)


@pytest.fixture(params=["llama", "stablelm"])
def family(request: pytest.FixtureRequest) -> str:
    """One of ingle's own, and one that transformers' code runs."""
    return str(request.param)


@pytest.mark.parametrize("store", ["safetensors", "bin"])
def test_a_stored_head_is_used_although_the_config_ties_it(tmp_path: Path, dtype: str, family: str, store: str) -> None:
    if family == "stablelm" and store == "bin":
        pytest.skip("transformers reads its own files")
    expected = logits(save_checkpoint(tmp_path, family, tie_word_embeddings=False), dtype)
    engine, notices = built(rewrite(tmp_path, lambda tensors: None, store, tie_word_embeddings=True), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert any("ties the head" in notice for notice in notices) and not held_once(engine)


def test_a_missing_head_is_tied(tmp_path: Path, dtype: str, family: str) -> None:
    expected = logits(save_checkpoint(tmp_path, family, tie_word_embeddings=True), dtype)
    engine, notices = built(rewrite(tmp_path, lambda tensors: None, tie_word_embeddings=False), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert any("the embedding takes its place" in notice for notice in notices) and held_once(engine)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("store", ["safetensors", "bin"])
def test_an_equal_head_is_held_once(tmp_path: Path, dtype: str, family: str, store: str, tie: bool) -> None:
    if family == "stablelm" and store == "bin":
        pytest.skip("transformers reads its own files")
    expected = logits(save_checkpoint(tmp_path, family, tie_word_embeddings=True), dtype)

    def add_head(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING]

    engine, notices = built(rewrite(tmp_path, add_head, store, tie_word_embeddings=tie), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert held_once(engine) and not any("head" in notice for notice in notices)


def test_heads_of_gguf_files(tmp_path: Path, dtype: str) -> None:
    folder = save_checkpoint(tmp_path, tie_word_embeddings=False)
    engine, _ = built(write_gguf_model(folder, tmp_path / "untied.gguf"), dtype)
    assert not held_once(engine)

    def copy(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING]

    rewrite(folder, copy)
    engine, _ = built(write_gguf_model(folder, tmp_path / "equal.gguf"), dtype)
    assert held_once(engine)


def test_rows_that_the_config_does_not_count(tmp_path: Path, dtype: str) -> None:
    expected = logits(save_checkpoint(tmp_path, vocab_size=261), dtype)
    engine, notices = built(rewrite(tmp_path, lambda tensors: None, vocab_size=256), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert "the configuration says vocab_size 256, and the checkpoint has 261 tokens" in notices


def test_biases_are_used_where_they_are_stored(tmp_path: Path, dtype: str) -> None:
    """A Qwen2 that somebody published as a Llama: without its biases it answers nonsense."""
    expected = logits(save_checkpoint(tmp_path, "qwen2"), dtype)
    engine, notices = built(rewrite(tmp_path, lambda tensors: None, model_type="llama"), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert any("has biases of self_attn.q_proj" in notice for notice in notices)


def test_biases_that_are_not_stored_are_none(tmp_path: Path, dtype: str) -> None:
    expected = logits(save_checkpoint(tmp_path), dtype)
    engine, notices = built(rewrite(tmp_path, lambda tensors: None, attention_bias=True), dtype)
    assert torch.equal(engine_logits(engine, PROMPT), expected)
    assert any("lacks the biases of self_attn.o_proj" in notice for notice in notices)


PREFIXES = ["", "model.", "language_model.", "language_model.model.", "model.language_model.", "transformer.",
            "base_model.model.model.", "_orig_mod.model."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("with_head", ["lm_head.", "beside"])
def test_prefixes_are_found_in_the_file(tmp_path: Path, prefix: str, with_head: str) -> None:
    expected = logits(save_checkpoint(tmp_path), "float32")
    beside = prefix.rstrip(".").rpartition(".")[0]

    def rename(tensors: Tensors) -> Tensors:
        renamed = {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in tensors.items() if name != HEAD}
        head = HEAD if with_head == "lm_head." or not beside else f"{beside}.{HEAD}"
        tower = {"vision_tower.layers.0.input_layernorm.weight": torch.ones(4)}  # which is no decoder
        return renamed | {head: tensors[HEAD]} | tower

    assert torch.equal(logits(rewrite(tmp_path, rename), "float32"), expected)


def test_prefixes_of_other_names(tmp_path: Path) -> None:
    """The first Qwen's tensors are called otherwise, and a mixture has others."""
    folder = qwen1.save_checkpoint(tmp_path / "qwen")
    expected = logits(folder, "float32")
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()})
    assert torch.equal(logits(folder, "float32"), expected)
    folder = save_checkpoint(tmp_path / "moe", "qwen3_moe", num_experts=4, num_experts_per_tok=2)
    expected = logits(folder, "float32")
    rewrite(folder, lambda tensors: {f"language_model.{name}": value for name, value in tensors.items()})
    assert torch.equal(logits(folder, "float32"), expected)


def test_two_decoders_in_a_checkpoint_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)

    def twice(tensors: Tensors) -> Tensors:
        return {f"{which}.{name}": tensor for which in ("talker", "thinker") for name, tensor in tensors.items()}

    with pytest.raises(ModelError, match=r"several decoders, under talker\.model, thinker\.model, and none"):
        built(rewrite(tmp_path, twice), "float32")


def test_a_missing_tensor_is_named_as_the_file_would_call_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)

    def without_norm(tensors: Tensors) -> Tensors:
        return {f"language_model.{name}": tensor for name, tensor in tensors.items() if name != "model.norm.weight"}

    with pytest.raises(ModelError, match=r"has no tensor language_model\.model\.norm\.weight"):
        built(rewrite(tmp_path, without_norm), "float32")


QUANTIZED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "exl2", "bits": 4.25}}, "'exl2'"),
    ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "'hqq'"),
    ({"quantization_config": {"bits": 4}}, "a method without a name"),
    ({"quantization_config": "awq"}, "a method without a name"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "'MLX'"),
    ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "'MLX'"),
    ({"compression_config": {"quant_method": "spqr"}}, "'spqr'"),
]


@pytest.mark.parametrize("config, method", QUANTIZED, ids=str)
def test_a_method_of_quantization_is_named_before_any_tensor_is_looked_for(
    tmp_path: Path, family: str, config: dict[str, Any], method: str
) -> None:
    save_checkpoint(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()
    settings = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"its weights are quantized by .*{method}.*which ingle does not read"):
        built(tmp_path, "float32")


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}], ids=str)
def test_no_method_is_none(tmp_path: Path, config: dict[str, Any]) -> None:
    built(rewrite(save_checkpoint(tmp_path), lambda tensors: None, **config), "float32")
