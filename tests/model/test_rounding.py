"""Checkpoints of floats whose weights are rounded while they are loaded, or written anew, are what their codes say."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.build import build_engine
from ingle.engine.startup import ModelFiles
from ingle.errors import ConfigError, ModelError
from ingle.model.rounding import rounded_matrices
from ingle.model.tensors import needed
from ingle.quantize import shards
from ingle.quantize.run import quantize
from ingle.weights.quantized.rounding_source import RoundingSource
from ingle.weights.quantized.scheme import Target
from tests.model.checkpoints import CHECKPOINTS
from tests.support import engine_for, engine_logits, greedy, random_prompt, save_checkpoint
from tests.weights.gguf_models import write_gguf_model

PROMPT = random_prompt(3, 40)
TARGETS: tuple[Target, ...] = ("int4", "int8", "fp8")
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", "qwen2", **SIZES)


def source_of(folder: Path, target: Target) -> RoundingSource:
    config = EngineConfig.of(str(folder), quantization=target)
    source = ModelFiles.read(config, folder).opened(config).source
    assert isinstance(source, RoundingSource)
    return source


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


def decoded(folder: Path, target: Target, to: Path) -> Path:
    """A checkpoint of the floats that a rounded one stands for."""
    source, tensors = source_of(folder, target), load_file(folder / "model.safetensors")
    for name in source.plan.shapes:
        source.load_into(name, tensors[name])
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize("target", TARGETS)
def test_rounded_while_loaded(plain: Path, tmp_path: Path, target: Target) -> None:
    """By both devices of a CPU; in float32 exactly what the codes stand for."""
    expected = engine_logits(engine_for(decoded(plain, target, tmp_path / "decoded")), PROMPT)
    exact = engine_for(plain, quantization=target)
    assert off(engine_logits(exact, PROMPT), expected) < 1e-5
    kept = engine_for(plain, quantization=target, dtype="auto")
    assert isinstance(kept.worker.device, NativeDevice)
    assert off(engine_logits(kept, PROMPT), expected) < 0.03
    by_pytorch = engine_for(plain, quantization=target, cpu_kernels="torch")
    assert isinstance(by_pytorch.worker.device, TorchDevice)
    assert off(engine_logits(by_pytorch, PROMPT), expected) < 1e-4
    floats = engine_logits(engine_for(plain), PROMPT)
    assert 1e-4 < off(expected, floats) < (0.5 if target == "int4" else 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
def test_on_a_gpu(tmp_path: Path, target: Target) -> None:
    plain = save_checkpoint(tmp_path / "plain", "qwen2", hidden_size=128, intermediate_size=256,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=64)  # fmt: skip
    expected = engine_logits(engine_for(decoded(plain, target, tmp_path / "decoded")), PROMPT)
    whole = {"device": "cuda", "dtype": "bfloat16", "enable_prefix_caching": False}
    engine = engine_for(plain, quantization=target, **whole)
    by_inputs = 0.15 if target == "fp8" else 0.04  # which become FP8, too
    assert off(engine_logits(engine, PROMPT).float().cpu(), expected) < by_inputs
    assert len(greedy(engine, PROMPT, 16)) == 16
    written = quantize(plain, target, tmp_path / "written").path
    again = engine_for(written, **whole)
    assert off(engine_logits(again, PROMPT).float(), engine_logits(engine, PROMPT).float()) < by_inputs


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_what_is_loaded(plain: Path, tmp_path: Path, target: Target) -> None:
    """To the last bit; and it says how far it is from what it was."""
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    done = quantize(plain, target, tmp_path / "out")
    config = EngineConfig.of(str(done.path))
    files = ModelFiles.read(config, done.path)
    assert files.quantization is not None
    written, rounded = files.opened(config).source, source_of(plain, target)
    for name, (rows, columns) in rounded.plan.shapes.items():
        ours, theirs = written.groups(name, rows, columns), rounded.groups(name, rows, columns)
        torch.testing.assert_close(torch.from_numpy(ours.decoded()), torch.from_numpy(theirs.decoded()), atol=0, rtol=0)
    assert done.loss.relative == pytest.approx(rounded.loss.relative)
    assert done.worst[1].relative >= done.loss.relative > 0
    assert (done.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert done.num_bytes < done.num_bytes_before
    assert not list(tmp_path.glob(".*"))
    assert (
        off(engine_logits(engine_for(done.path), PROMPT), engine_logits(engine_for(plain, quantization=target), PROMPT))
        < 1e-5
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
def test_compressed_tensors_reads_it(plain: Path, tmp_path: Path, target: Target) -> None:
    """As transformers calls it. What has zeros it reads when told to decode all at once, by a fault of its own."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    done = quantize(plain, target, tmp_path / "out")
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if done.scheme.has_zeros else {}
    model = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32, **config).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0]
    source = source_of(plain, target)
    for name, shape in source.plan.shapes.items():
        ours = torch.empty(*shape)
        source.load_into(name, ours)
        theirs = model.get_submodule(name.removesuffix(".weight")).weight
        # At once it decodes in the type of the scales.
        torch.testing.assert_close(theirs.float(), ours, atol=1e-4 if config else 1e-6, rtol=1e-3 if config else 1e-5)
    if target != "fp8":  # whose inputs become FP8, too
        assert off(engine_logits(engine_for(done.path), PROMPT), logits) < (1e-2 if config else 1e-4)


@pytest.mark.parametrize("name", ["gqa", "phi3", "gemma3", "qwen3-moe", "deepseek-v3", "mixtral"])
def test_every_matrix_of_a_layer_is_rounded(tmp_path: Path, name: str) -> None:
    """All that a decoder needs and that is a matrix of a layer, but for routers and what is taken apart."""
    names = [key for key in CHECKPOINTS if key == name or key.startswith(name)]
    model_type, sizes = CHECKPOINTS[names[0]]
    folder = save_checkpoint(tmp_path / "model", model_type, **sizes)
    config = EngineConfig.of(str(folder), quantization="fp8")
    with_all = ModelFiles.read(config, folder).opened(config)
    assert with_all.decoder is not None and isinstance(with_all.source, RoundingSource)
    matrices = {each: rows * columns for each, rows, columns in rounded_matrices(with_all.decoder, with_all.source)}
    layers = {
        each: size
        for each, size in needed(with_all.decoder, with_all.source)
        if each.startswith("model.layers.") and each.endswith((".weight", "]")) and "norm" not in each
    }
    left = {each for each in layers if each not in matrices}
    assert all(each.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "kv_b_proj.weight",
                              "shared_expert_gate.weight")) for each in left)  # fmt: skip
    assert all(layers[each] == size for each, size in matrices.items() if each in layers)
    engine = engine_for(folder, quantization="fp8")
    assert len(greedy(engine, PROMPT, 4)) == 4


def test_memory_is_planned_for_codes(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512, vocab_size=64)
    sizes = {}
    for target in (None, "int8", "int4"):
        config = EngineConfig.of(str(folder), quantization=target, device="cpu", kv_cache_memory="8MiB")
        _, info = build_engine(config, folder)
        sizes[target] = info.weight_bytes
        if target is not None:
            assert info.kept_types == [target] and not info.expanded_types
    assert sizes["int8"] < 0.6 * sizes[None]
    assert sizes["int4"] < 0.35 * sizes[None]


def test_groups_divide_all_matrices(plain: Path) -> None:
    source = source_of(plain, "int4")
    assert source.plan.scheme.group_size == 32
    assert source.plan.notices == ("groups of 128 weights -> 32: 64 columns do not divide by it",)


def test_shards_and_sizes(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    done = quantize(plain, "int4", tmp_path / "out", group_size=16, symmetric=True)
    files = sorted(done.path.glob("*.safetensors"))
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == done.num_bytes
    settings = json.loads((done.path / "config.json").read_text())["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"], weights["symmetric"]) == (16, True) and "lm_head" in settings["ignore"]
    assert len(greedy(engine_for(done.path), PROMPT, 4)) == 4


def test_from_pytorch_files(plain: Path, tmp_path: Path) -> None:
    """The same as from safetensors, to the last bit; whatever else a state dict holds is copied, and what is tied is
    written once."""
    tensors = load_file(plain / "model.safetensors")
    wide = torch.randn(tensors["model.layers.0.mlp.up_proj.weight"].shape[::-1])
    tensors["model.layers.0.mlp.up_proj.weight"] = wide.T  # which lies column by column
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folders = {}
    for kind in ("bin", "safetensors"):
        folder = folders[kind] = tmp_path / kind
        folder.mkdir()
        config = json.loads((plain / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    others = {"rotary_emb.mask": torch.ones(3, 3, dtype=torch.bool), "position_ids": torch.arange(7).expand(1, -1)}
    torch.save({**tensors, **others}, folders["bin"] / "pytorch_model.bin")
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folders["safetensors"] / "model.safetensors",
    )
    written = {kind: quantize(folder, "int4", tmp_path / f"{kind}-int4") for kind, folder in folders.items()}
    ours, theirs = (load_file(written[kind].path / "model.safetensors") for kind in ("bin", "safetensors"))
    assert "lm_head.weight" not in theirs
    assert ours.keys() == theirs.keys() | others.keys()
    for name, tensor in (theirs | others).items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert len(greedy(engine_for(written["bin"].path), PROMPT, 4)) == 4


def test_what_is_refused(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = quantize(plain, "int8", tmp_path / "out").path
    with pytest.raises(ConfigError, match="out is there already; remove it first"):
        quantize(plain, "int8", done)
    with pytest.raises(ModelError, match="quantized already: compressed-tensors"):
        quantize(done, "int4", tmp_path / "again")
    with pytest.raises(ModelError, match=r"x\.gguf is a GGUF file; give the model's folder of floats, or take a file"):
        quantize(write_gguf_model(plain, tmp_path / "x.gguf"), "int4", tmp_path / "again")
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(ConfigError, match="no multiple of 16"):
        quantize(plain, "int4", tmp_path / "again", group_size=20)
    with pytest.raises(ConfigError, match="fp8 has a scale for each row"):
        quantize(plain, "fp8", tmp_path / "again", group_size=128)
    with pytest.raises(ConfigError, match="there is no folder"):
        quantize(plain, "fp8", tmp_path / "no" / "again")
    with pytest.raises(ConfigError, match="lies in the model's own folder"):
        quantize(plain, "fp8", plain / "again")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"will take .* are free there"):
        quantize(plain, "fp8", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_nothing_is_left_of_what_failed(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of an error nor, once it is done again, of a process that was killed."""

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ingle.quantize.run.write_shards", fail)
        with pytest.raises(KeyboardInterrupt):
            quantize(plain, "int4", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial-killed").mkdir()
    (tmp_path / ".out.partial-killed" / "model.safetensors").write_bytes(b"half")
    quantize(plain, "int4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
