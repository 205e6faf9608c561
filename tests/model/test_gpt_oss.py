"""gpt-oss: experts in MXFP4 as they are published, against the floats that transformers decodes them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.startup import ModelFiles
from ingle.errors import ConfigError, ModelError
from ingle.kernels import reference
from ingle.kernels.cpu import library
from ingle.quantize.run import quantize
from ingle.verify.run import verify
from ingle.weights.experts import CodedExperts
from tests.support import (
    engine_for,
    engine_logits,
    greedy,
    random_prompt,
    reference_greedy,
    reference_model,
    save_checkpoint,
)

PROMPT = random_prompt(3, 70)
SIZES: dict[str, Any] = {
    "head_dim": 16, "sliding_window": 20, "num_local_experts": 6, "num_experts_per_tok": 3, "hidden_size": 64,
    "intermediate_size": 96, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "truncate": False}}  # fmt: skip
SAID = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def published(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of bfloat16 and MXFP4, and one of the floats that it stands for."""
    decoded, coded = save_checkpoint(folder / "decoded", "gpt_oss", **SIZES), folder / "coded"
    coded.mkdir()
    generator = torch.Generator().manual_seed(5)
    floats = {name: tensor.bfloat16() for name, tensor in load_file(decoded / "model.safetensors").items()}
    stored = dict(floats)
    for name in [name for name in floats if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(117, 123, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert floats[name].shape == (experts, columns, rows)
    save_file(stored, coded / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.float().contiguous() for name, tensor in floats.items()}, decoded / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((decoded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "quantization_config": SAID}))
    return coded, decoded


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return published(tmp_path_factory.mktemp("gpt-oss"))


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact).abs().max() / exact.abs().max())


def test_mxfp4_by_both_devices(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    coded, decoded = folders
    expected = engine_logits(engine_for(decoded), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 1e-5
    kept = engine_for(coded, dtype="auto")
    assert isinstance(kept.worker.device, NativeDevice)
    logits = engine_logits(kept, PROMPT)
    assert off(logits, expected) < 0.1  # a token may choose another expert
    assert float((logits - expected).square().mean().sqrt() / expected.std()) < 0.01
    (layer, *_) = kept.worker.device.model.layers
    sizes = [matrix.num_bytes / matrix.num_parameters for matrix in layer.mlp.expert_matrices]
    assert max(sizes) < 0.75  # of 96 columns, which are padded
    monkeypatch.setattr(library, "started", lambda: False)
    by_pytorch = engine_for(coded, cpu_kernels="torch")
    assert isinstance(by_pytorch.worker.device, TorchDevice)
    assert isinstance(by_pytorch.worker.device.model.layers[0].mlp.experts, CodedExperts)
    assert off(engine_logits(by_pytorch, PROMPT), expected) < 1e-4
    in_chunks = engine_for(coded, cpu_kernels="torch", max_num_batched_tokens=40)
    assert greedy(in_chunks, PROMPT, 8) == greedy(engine_for(decoded, cpu_kernels="torch"), PROMPT, 8)


def test_it_is_verified_against_transformers(folders: tuple[Path, Path]) -> None:
    """On the weights as ingle decodes them."""
    config = EngineConfig.of(str(folders[0]), dtype="float32", device="cpu")
    result = verify(config, folders[0], [("some ids", PROMPT)], num_random=0, num_tokens=6)
    assert result.passed and result.reference.independent and result.distance.max < 1e-4


@pytest.mark.slow
def test_without_windows_and_biases_of_attention(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 4, "layer_types": ["full_attention"] * 3,
             "num_hidden_layers": 3, "attention_bias": False,
             "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    save_checkpoint(tmp_path, "gpt_oss", **sizes)
    model, engine = reference_model(tmp_path), engine_for(tmp_path, block_size=8)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(engine_logits(engine, PROMPT), expected, atol=1e-4, rtol=0)
    assert greedy(engine, PROMPT, 24) == reference_greedy(model, PROMPT, 24)


def test_made_up_weights_are_held_as_published_ones(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """From config.json alone: experts are codes, on either device, and what they stand for is as large as floats."""
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    logits = []
    for options in ({}, {"cpu_kernels": "torch"}):
        engine = engine_for(tmp_path, load_format="dummy", **options)
        logits.append(engine_logits(engine, PROMPT))
    (layer, *_) = engine.worker.device.model.layers
    assert isinstance(layer.mlp.experts, CodedExperts)
    down = layer.mlp.experts.down.decoded(slice(None), torch.float32)
    assert 0.01 < down.std() < 0.04 and len(down.unique()) == 15
    assert logits[0].std() > 0 and off(logits[0], logits[1]) < 0.02  # of which one rounds the rest to bfloat16
    config = EngineConfig.of(str(tmp_path), load_format="dummy")
    types = ModelFiles.read(config, tmp_path).opened(config).stored_types
    num_experts, hidden, inner = (SIZES[key] for key in ("num_local_experts", "hidden_size", "intermediate_size"))
    assert types["mxfp4"] == 2 * num_experts * 3 * hidden * inner and types["BF16"] > 0


@pytest.mark.gpu
def test_on_a_gpu(folders: tuple[Path, Path]) -> None:
    """Experts of codes and of floats, from captured steps; in float32 with the CPU's tokens."""
    coded, decoded = folders
    expected = engine_logits(engine_for(decoded), PROMPT)
    for folder in (coded, decoded):
        exact = engine_for(folder, device="cuda", max_num_batched_tokens=128, max_num_seqs=2)
        torch.testing.assert_close(engine_logits(exact, PROMPT).cpu(), expected, atol=1e-3, rtol=1e-3)
        assert greedy(exact, PROMPT, 12) == greedy(engine_for(decoded), PROMPT, 12)
    engine = engine_for(coded, device="cuda", dtype="bfloat16", max_num_batched_tokens=128, max_num_seqs=2)
    assert engine.worker.device.graphs is not None
    logits = engine_logits(engine, PROMPT).float().cpu()
    assert float((logits - expected).square().mean().sqrt() / expected.std()) < 0.03
    assert len(greedy(engine, PROMPT, 12)) == 12


def test_rounded_while_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of the floats that others publish it in. No layout of compressed-tensors has such experts."""
    _, decoded = folders
    expected = engine_logits(engine_for(decoded), PROMPT)
    assert off(engine_logits(engine_for(decoded, quantization="int8"), PROMPT), expected) < 0.05
    with pytest.raises(ModelError, match="experts lie in one tensor"):
        quantize(decoded, "int8", tmp_path / "out")


def test_what_it_says_of_itself(folders: tuple[Path, Path]) -> None:
    coded, _ = folders
    config = EngineConfig.of(str(coded), quantization="mxfp4")
    files = ModelFiles.read(config, coded)
    assert files.quantization is not None and files.quantization.name == "MXFP4, MXFP4 in groups of 32"
    assert not files.notices
    types = files.opened(config).stored_types
    num_experts, hidden, inner = (SIZES[key] for key in ("num_local_experts", "hidden_size", "intermediate_size"))
    assert types["mxfp4"] == 2 * num_experts * 3 * hidden * inner
    with pytest.raises(ConfigError, match="quantized already: MXFP4"):
        ModelFiles.read(EngineConfig.of(str(coded), quantization="gptq"), coded)


@pytest.mark.parametrize(
    "tensor, says",
    [
        ("experts.down_proj_scales", r"model\.safetensors: has no tensor .*down_proj\.weight_scale"),
        ("experts.gate_up_proj_bias", r"has no tensor .*(gate_proj|up_proj|gate_up_proj)"),
        ("self_attn.sinks", r"has no tensor model\.layers\.0\.self_attn\.sinks"),
        ("router.bias", r"has no tensor model\.layers\.0\.mlp\.router\.bias"),
    ],
)
def test_a_missing_tensor_is_named(folders: tuple[Path, Path], tmp_path: Path, tensor: str, says: str) -> None:
    tensors = load_file(folders[0] / "model.safetensors")
    for layer in range(2):
        del tensors[f"model.layers.{layer}.{'mlp.' if 'attn' not in tensor else ''}{tensor}"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(ModelError, match=says):
        engine_for(tmp_path)


@pytest.mark.parametrize("shape", [(6, 192, 0, 16), (6, 191, 2, 16), (6, 192, 2), (4096, 2, 1, 16)], ids=str)
def test_misshapen_experts_are_named(folders: tuple[Path, Path], tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Before there is a name for each of a stranger's number of them."""
    tensors = load_file(folders[0] / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"] = torch.zeros(shape, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj_blocks has shape"):
        engine_for(tmp_path)


def test_other_limits_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "swiglu_limit": 5.0}))
    with pytest.raises(ModelError, match=r"swiglu_limit is 5\.0, and 7\.0 alone is supported"):
        ModelFiles.read(EngineConfig.of(str(tmp_path)), tmp_path)


def test_clamped_gates() -> None:
    """By its definition, on both sides of the limits; what is no number stays none."""
    x = torch.randn(9, 2 * 37, generator=torch.Generator().manual_seed(1)) * 9
    gate, up = x[:, :37].clamp(max=7), x[:, 37:].clamp(-7, 7)
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    torch.testing.assert_close(reference.gated(x, "swiglu_clamped"), expected)
    x[3, 5] = x[4, 40] = float("nan")
    given, out = x.numpy(), np.empty((9, 37), np.float32)
    library.get().ingle_gated(given.ctypes.data, library.ACTIVATIONS["swiglu_clamped"], 9, 37, out.ctypes.data)
    expected[3, 5] = expected[4, 3] = float("nan")
    torch.testing.assert_close(torch.from_numpy(out), expected, equal_nan=True)
