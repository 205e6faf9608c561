"""A model divided among ranks gives what it gives whole: every family, in every format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from ingle.config import EngineConfig
from ingle.engine.startup import ModelFiles
from ingle.errors import ConfigError
from ingle.model.architecture import DecoderConfig
from ingle.model.share import Division, sizes_for
from tests.model.checkpoints import CHECKPOINTS, DEEPSEEK
from tests.model.test_quantized import FORMATS, quantize
from tests.parallel.threads import logits_of, shares
from tests.support import random_prompt, save_checkpoint
from tests.weights.gguf_models import write_gguf_model

PROMPT = random_prompt(5, 100)
SAVED_ONCE = ("odd-heads", "mqa", "phi3", "gemma2-untied", "qwen2-moe-normed", "deepseek-v3-yarn")
"""Of which every kind of cut is in one."""


def check(folder: Path, size: int, **options: Any) -> None:
    """On every rank the logits of the whole."""
    (whole,) = logits_of(shares(folder, 1, **options), PROMPT)
    for logits in logits_of(shares(folder, size, **options), PROMPT):
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAVED_ONCE else pytest.mark.slow) for name in CHECKPOINTS]
)
def test_every_family(tmp_path: Path, name: str) -> None:
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    check(folder, 2)
    if name != "odd-heads":
        check(folder, 4)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_folders(tmp_path: Path, name: str) -> None:
    """Cuts amid groups of columns and amid none, and one that is padded."""
    save_checkpoint(tmp_path / "plain", "qwen2", intermediate_size=96, hidden_size=64)
    folder = quantize(tmp_path / "plain", tmp_path / "coded", FORMATS[name])
    for size in (2, 4):
        check(folder, size)


def test_gguf(tmp_path: Path) -> None:
    """Blocks that are decoded, and those that are kept: cut between them, and amid them."""
    save_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=192, num_attention_heads=8)
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q5_1)
    for size in (2, 8):
        check(path, size)
        check(path, size, keeps_blocks=True)


def test_gguf_mixture(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral", num_local_experts=4, num_attention_heads=8, num_key_value_heads=2)
    check(write_gguf_model(tmp_path, tmp_path / "model.gguf"), 4)


def test_random_weights(tmp_path: Path) -> None:
    check(save_checkpoint(tmp_path, "llama"), 2, load_format="dummy")


def test_pytorch_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "phi3")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    check(tmp_path, 2, load_format="pt")


def config_of(tmp_path: Path, model_type: str = "llama", **overrides: Any) -> DecoderConfig:
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    decoder = ModelFiles.read(EngineConfig.of(str(folder), device="cpu"), folder).decoder
    assert decoder is not None
    return decoder


def test_which_sizes_divide(tmp_path: Path) -> None:
    qwen = dataclasses.replace(
        config_of(tmp_path), num_heads=28, num_kv_heads=4, intermediate_size=18944, vocab_size=152064
    )
    assert sizes_for(qwen, 16) == [1, 2, 4, 8, 12, 16]
    llama = dataclasses.replace(qwen, num_heads=64, num_kv_heads=8, intermediate_size=28672, vocab_size=128256)
    assert sizes_for(llama, 16) == [1, 2, 3, 4, 8, 16]
    why = "-size 5: .* cannot be divided among 5 ranks; these sizes divide it: 1, 2, 3, 4, 8, 16"
    with pytest.raises(ConfigError, match=why):
        Division.of(llama, 5)
    with pytest.raises(ConfigError, match="8 key-value heads and 12 ranks do not divide one another"):
        Division.of(llama, 12)


def test_latents_are_on_every_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path, "deepseek_v2", **DEEPSEEK, q_lora_rank=24)
    share = Division.of(config, 4).share
    assert share.kv_spec("float32") == config.kv_spec("float32")
    assert (share.num_heads, share.q_size) == (1, config.q_size // 4)


def test_ranks_hold_little_more_than_the_whole(tmp_path: Path) -> None:
    """Norms, routers and latents' projections are on each, and nothing else."""
    folder = save_checkpoint(tmp_path, "llama", num_key_value_heads=4)
    held = [sum(part.num_bytes for part in decoder.parameters() if not isinstance(part, torch.Tensor))
            for decoder in (*shares(folder, 1), *shares(folder, 2))]  # fmt: skip
    assert held[1] == held[2] == held[0] / 2
