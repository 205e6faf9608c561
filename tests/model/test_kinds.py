"""Checkpoints that hold no model for writing text are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification as Classifier

from ingle.errors import ModelError
from ingle.pooling import gguf_pooling
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from tests.support import TINY, engine_for, engine_logits, random_prompt, save_checkpoint
from tests.text.toys import write_gguf


def save(folder: Path, kind: Any, model_type: str, **more: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, "pad_token_id": 0, **more})
    kind.from_config(config).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], ids=["PyTorch", "native"])
@pytest.mark.parametrize(
    ("kind", "model_type", "more", "message"),
    [
        (Classifier, "llama", {"num_labels": 1}, "LlamaForSequenceClassification, a classifier"),
        (Classifier, "qwen2", {}, "Qwen2ForSequenceClassification, a classifier or reward model"),
        (AutoModel, "llama", {}, "LlamaModel, the layers without a head"),
        (AutoModel, "qwen3", {"tie_word_embeddings": True}, "Qwen3Model, the layers without a head"),
        (AutoModelForMaskedLM, "bert", {}, "BertForMaskedLM, an encoder"),
        (AutoModel, "bert", {}, "BertModel, the layers without a head"),
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_are_refused_by_name(
    kind: Any, model_type: str, more: dict[str, Any], message: str, dtype: str, tmp_path: Path
) -> None:
    save(tmp_path, kind, model_type, **more)
    with pytest.raises(ModelError, match=message) as caught:
        engine_for(tmp_path, dtype=dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("InternLM2ForRewardModel", "a reward model"),
        ("Qwen2ForProcessRewardModel", "a reward model"),
        ("LlamaForTokenClassification", "a classifier"),
        ("MistralForQuestionAnswering", "a classifier"),
        ("LlamaBidirectionalEmbeddingModel", "an encoder"),
        ("T5EncoderModel", "an encoder"),
    ],
)
def test_what_architectures_says(name: str, message: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit(tmp_path, architectures=[name])
    with pytest.raises(ModelError, match=f"holds {name}, {message}"):
        engine_for(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], ids=["PyTorch", "native"])
def test_a_stored_head_tells_where_architectures_does_not(dtype: str, tmp_path: Path) -> None:
    save(tmp_path, Classifier, "llama", num_labels=1)
    edit(tmp_path, architectures=None, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"has score\.weight, a head that scores texts, and none for text"):
        engine_for(tmp_path, dtype=dtype)


@pytest.mark.parametrize("architectures", [["LlamaModel"], None, []], ids=str)
def test_a_stored_head_for_text_is_enough(architectures: list[str] | None, tmp_path: Path) -> None:
    prompt = random_prompt(1, 20)
    save_checkpoint(tmp_path)
    expected = engine_logits(engine_for(tmp_path), prompt)
    edit(tmp_path, architectures=architectures)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"v_head.summary.weight": torch.zeros(1, 64)}, tmp_path / "model.safetensors")
    assert torch.equal(engine_logits(engine_for(tmp_path), prompt), expected)


def test_an_encoder_with_pooling(tmp_path: Path) -> None:
    """As sentence-transformers publishes most of its models. What decoders pool is in `tests/test_vectors.py`."""
    save(tmp_path, AutoModel, "bert")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path}
               for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with pytest.raises(ModelError, match=r"holds BertModel with pooling \(modules.json\), an embedding model that is"):
        engine_for(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "kind"), [(0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank: a model that scores texts")]
)
def test_gguf_files_that_pool(pooling: int, kind: str | None, tmp_path: Path) -> None:
    metadata = {f"llama.{key}": value for key, value in {
        "embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "context_length": 128,
        "vocab_size": 40, "pooling_type": pooling}.items()}  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", metadata)
    if pooling == 4:
        with pytest.raises(ModelError, match=f"holds LlamaForCausalLM with llama.pooling_type {kind}"):
            read_config(path)
        return
    assert read_config(path)["model_type"] == "llama"
    found = gguf_pooling(GgufFile(path).metadata)
    assert (None if found is None else found.kind) == kind
