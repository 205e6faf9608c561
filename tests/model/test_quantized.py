"""Tiny checkpoints in each quantized format give what their decoded selves give, by both devices of a CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.engine import Engine
from ingle.engine.startup import ModelFiles
from ingle.errors import ConfigError, IngleError, ModelError
from ingle.request import EngineRequest, SamplingParams
from ingle.weights.coded_part import CodedPart
from ingle.weights.experts import CodedExperts
from tests.support import collect, engine_for, engine_logits, greedy, random_prompt, save_checkpoint
from tests.weights.quantized import packers
from tests.weights.quantized.packers import Written, installed

Write = Callable[[int, int, int], Written]
PROMPT, LONG = random_prompt(3, 40), random_prompt(4, 100)

FORMATS: dict[str, Write] = {
    "gptq": lambda rows, columns, seed: packers.gptq(rows, columns, group_size=32, seed=seed),
    "gptq-act-order": lambda rows, columns, seed: packers.gptq(
        rows, columns, group_size=32, act_order=True, symmetric=False, seed=seed
    ),
    "gptq-int8": lambda rows, columns, seed: packers.gptq(rows, columns, bits=8, group_size=-1, seed=seed),
    "awq": lambda rows, columns, seed: packers.awq(rows, columns, group_size=32, seed=seed),
    "fp8": lambda rows, columns, seed: packers.fp8(rows, columns, block=(32, 32), seed=seed),
    "fp8-whole": lambda rows, columns, seed: packers.fp8(rows, columns, scales="tensor", seed=seed),
    "ct-int4": lambda rows, columns, seed: packers.compressed(
        rows, columns, form="pack-quantized", group_size=32, seed=seed
    ),
    "ct-fp8": lambda rows, columns, seed: packers.compressed(
        rows, columns, form="float-quantized", bits=8, strategy="channel", group_size=None, seed=seed
    ),
    "awq-gemv": lambda rows, columns, seed: packers.gemv(rows, columns, group_size=32, seed=seed),
    "nf4": lambda rows, columns, seed: packers.bitsandbytes(rows, columns, block=32, seed=seed),
    "fp4": lambda rows, columns, seed: packers.bitsandbytes(
        rows, columns, table="fp4", block=32, nested=False, storage=torch.float32, seed=seed
    ),
    "bnb-int8": lambda rows, columns, seed: packers.bitsandbytes_int8(rows, columns, seed=seed),
    "ct-mxfp4": lambda rows, columns, seed: packers.compressed_fp4(
        rows, columns, form="mxfp4-pack-quantized", seed=seed
    ),
    "ct-mxfp8": lambda rows, columns, seed: packers.compressed_mxfp8(rows, columns, seed=seed),
    "nvfp4": lambda rows, columns, seed: packers.modelopt_nvfp4(rows, columns, seed=seed),
}


def quantize(plain: Path, folder: Path, write: Write) -> Path:
    """Writes the checkpoint into `folder` with its layers' projections in a format, and what they stand for to `plain`.

    One projection stays what it is.
    """
    folder.mkdir()
    tensors, stored, settings = load_file(plain / "model.safetensors"), {}, {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight") or name.endswith("layers.1.mlp.up_proj.weight"):
            stored[name] = tensor
            continue
        written = write(*tensor.shape, seed)
        settings = written.settings
        stored.update({f"{module}.{each}": part.contiguous() for each, part in written.tensors.items()})
        tensors[name] = torch.from_numpy(written.exact).float()
    save_file(tensors, plain / "model.safetensors")
    save_file(stored, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def checkpoint(tmp_path: Path, family: str = "llama", **sizes: Any) -> Path:
    return save_checkpoint(tmp_path / "plain", family, intermediate_size=96, **sizes)


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", FORMATS)
def test_logits(tmp_path: Path, name: str) -> None:
    """`test_quantized_families.py` has all families."""
    if not installed(name):
        pytest.skip("compressed-tensors is not installed")
    plain = checkpoint(tmp_path, "qwen2")
    coded = quantize(plain, tmp_path / "coded", FORMATS[name])
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 1e-5
    kept = engine_for(coded, dtype="auto")
    assert isinstance(kept.worker.device, NativeDevice)
    assert off(engine_logits(kept, PROMPT), expected) < 0.03
    by_pytorch = engine_for(coded, cpu_kernels="torch")
    assert isinstance(by_pytorch.worker.device, TorchDevice)
    assert off(engine_logits(by_pytorch, PROMPT), expected) < 1e-5
    for layer in by_pytorch.worker.device.model.layers:  # norms know what takes their rows
        assert layer.input_norm.before is layer.attention.qkv.weight
        assert layer.mlp_norm.before is layer.mlp.gate_up.weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(tmp_path: Path, name: str, dtype: str) -> None:
    """By the fused products of few rows and by those of more, and through the graphs of a decode.

    Kernels for each are compiled, which takes most of the time: tests are small, and share it. How far rounding takes a
    model of floats away a CPU tells as well.
    """
    from ingle.kernels.gpu import fp8

    if not installed(name):
        pytest.skip("compressed-tensors is not installed")
    plain = checkpoint(tmp_path, "qwen2", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    coded = quantize(plain, tmp_path / "coded", FORMATS[name])
    whole = {"enable_prefix_caching": False}
    engine = engine_for(coded, dtype=dtype, device="cuda", **whole)
    eight = {"fp8"} if "fp8" in name else {"int8"}
    assert held(engine) == (eight if "fp8" in name or "int8" in name else {"int4"})
    floats, rounding = engine_for(plain, **whole), engine_for(plain, dtype=dtype, cpu_kernels="torch", **whole)
    for num_rows in (1, 9, 40, 100):
        exact = engine_logits(floats, LONG[:num_rows])
        rounded = engine_logits(rounding, LONG[:num_rows]).float()
        by_inputs = 0.15 if name == "fp8-whole" and num_rows >= fp8.MIN_ROWS else 0.01  # which are FP8 then
        ours = engine_logits(engine, LONG[:num_rows]).float().cpu()
        assert off(ours, exact) < 1.5 * off(rounded, exact) + by_inputs, num_rows
    assert len(greedy(engine, LONG[:1], 16)) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_groups_of_large_models_on_a_gpu(tmp_path: Path, name: str) -> None:
    """Which go by kernels of their own, and heads of 64; one sequence and many, in graphs."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    plain = save_checkpoint(tmp_path / "plain", "qwen2", intermediate_size=1024, **sizes)
    pack = {"gptq": packers.gptq, "awq": packers.awq}[name]
    coded = quantize(
        plain, tmp_path / "coded", lambda rows, columns, seed: pack(rows, columns, group_size=128, seed=seed)
    )
    whole = {"enable_prefix_caching": False}
    floats, rounding = engine_for(plain, **whole), engine_for(plain, dtype="bfloat16", cpu_kernels="torch", **whole)
    engine = engine_for(coded, dtype="bfloat16", device="cuda", kv_cache_memory="64MiB", **whole)
    prompts = [random_prompt(number, number) for number in (1, 2, 5, 16, 17, 40, 100, 300)]
    for prompt in prompts:
        exact = engine_logits(floats, prompt)
        ours, rounded = (engine_logits(each, prompt).float().cpu() for each in (engine, rounding))
        assert off(ours, exact) < 1.5 * off(rounded, exact) + 0.01, len(prompt)
    told = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    answers = collect(engine, [EngineRequest(str(len(prompt)), prompt, told) for prompt in prompts])
    for prompt in prompts:
        parts = answers[str(len(prompt))]
        tokens = [token for part in parts for token in part.token_ids]
        right = engine_logits(floats, [*prompt, *tokens]).log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = [float(row[token]) for row, token in zip(right, tokens, strict=True)]
        ours = [float(row.logprobs[0]) for part in parts for row in part.logprobs or ()]
        assert ours == pytest.approx(chosen, abs=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
def test_inputs_that_become_fp8_on_a_gpu(
    tmp_path: Path, scales: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts, in pieces and beside decodes; fused to what stands around products, and by kernels of their own."""
    from ingle.kernels.gpu import fp8

    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    plain = save_checkpoint(tmp_path / "plain", "qwen2", intermediate_size=512, **sizes)
    coded = quantize(
        plain, tmp_path / "coded", lambda rows, columns, seed: packers.fp8(rows, columns, scales=scales, seed=seed)
    )
    expected = engine_logits(engine_for(plain), LONG)
    monkeypatch.setattr(fp8, "FUSED", fused)
    product, seen = fp8.product, set[str]()

    def watched(*given: Any) -> Any:
        seen.add("blocks" if given[1].blocks is not None else "rows")
        return product(*given)

    monkeypatch.setattr(fp8, "product", watched)
    for dtype in ("bfloat16", "float16"):
        engine = engine_for(coded, dtype=dtype, device="cuda")
        assert off(engine_logits(engine, LONG).float().cpu(), expected) < 0.15
        assert seen == {"blocks" if scales == "block" else "rows"}
        assert len(greedy(engine, LONG, 16)) == 16


def held(engine: Engine) -> set[str]:
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    parts = [part for weight in device.model.parameters() for part in getattr(weight, "parts", ())]
    return {part.coded.kind for part in parts if isinstance(part, CodedPart)}


def test_what_is_held(tmp_path: Path) -> None:
    """Codes stay codes, fused where layers are alike; one projection among them stays what it is."""
    plain = checkpoint(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS["gptq"])
    native = engine_for(coded, dtype="auto").worker.device
    assert isinstance(native, NativeDevice)
    layers = native.model.layers
    assert [part.matrix.bits for part in layers[0].matrices[0].parts] == [4]
    assert [part.matrix.bits for part in layers[0].matrices[2].parts] == [4]
    assert [part.matrix.bits for part in layers[1].matrices[2].parts] == [4, 16]
    assert held(engine_for(coded, cpu_kernels="torch")) == {"int4"}


def mixture(tmp_path: Path) -> Path:
    """With matrices of their own for each expert, as checkpoints are published."""
    plain = checkpoint(tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    tensors, split = load_file(plain / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                base = f"{name.removesuffix('gate_up_proj')}{expert}"
                split |= {f"{base}.gate_proj.weight": gate.clone(), f"{base}.up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            split |= {f"{base}{expert}.down_proj.weight": each.clone() for expert, each in enumerate(tensor)}
        else:
            split[name] = tensor
    save_file(split, plain / "model.safetensors")
    return plain


def test_experts_of_a_mixture(tmp_path: Path) -> None:
    """Of which the CPU's kernels and PyTorch multiply codes as well."""
    plain = mixture(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS["gptq-act-order"])
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 1e-5
    kept = engine_logits(engine_for(coded, dtype="auto"), PROMPT[:8])  # up to where rounding chooses other experts
    assert off(kept, expected[:8]) < 0.03
    by_pytorch = engine_for(coded, cpu_kernels="torch")
    assert off(engine_logits(by_pytorch, PROMPT), expected) < 1e-5
    assert {type(each) for each in experts_of(by_pytorch)} == {CodedExperts}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "fp8"])
def test_experts_of_a_mixture_on_a_gpu(tmp_path: Path, name: str) -> None:
    plain = mixture(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS[name])
    on_gpu = {"dtype": "bfloat16", "device": "cuda"}
    engine, decoded = engine_for(coded, **on_gpu), engine_for(plain, **on_gpu)
    assert {type(each) for each in experts_of(engine)} == {CodedExperts}
    for prompt in (PROMPT[:1], PROMPT[:5]):  # few, for rounding chooses other experts sooner or later
        exact = engine_logits(engine_for(plain), prompt)
        ours, theirs = (engine_logits(each, prompt).float().cpu() for each in (engine, decoded))
        assert off(ours, exact) < 1.5 * off(theirs, exact) + 0.02
    assert len(greedy(engine, PROMPT, 16)) == 16


def experts_of(engine: Engine) -> list[object]:
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    return [layer.mlp.experts for layer in device.model.layers]


@pytest.mark.parametrize("damage", ["one stays", "another group size"])
def test_experts_that_are_not_alike(tmp_path: Path, damage: str) -> None:
    """A line that names the one at fault."""
    tensors = load_file(mixture(tmp_path) / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj"

    def write(rows: int, columns: int, seed: int) -> Written:
        return packers.gptq(rows, columns, group_size=32, seed=seed)

    coded = quantize(tmp_path / "plain", tmp_path / "coded", write)
    stored = load_file(coded / "model.safetensors")
    if damage == "one stays":
        stored = {each: tensor for each, tensor in stored.items() if not each.startswith(name)}
        stored[f"{name}.weight"] = tensors[f"{name}.weight"]
    else:
        order = stored[f"{name}.g_idx"]
        stored[f"{name}.g_idx"] = order.flip(0)
    save_file(stored, coded / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"{name}.weight is .*not|{name}.weight is quantized otherwise than"
    ) as caught:
        engine_for(coded, cpu_kernels="torch")
    assert "\n" not in str(caught.value)


def test_as_old_quantizers_left_it(tmp_path: Path) -> None:
    """A file under a name of their own, beside what was there before, and a config.json that says nothing."""
    plain = checkpoint(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS["gptq"])
    config = json.loads((coded / "config.json").read_text())
    settings = config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "quantize_config.json").write_text(json.dumps({**settings, "quant_method": None}))
    (coded / "model.safetensors").rename(coded / "gptq_model-4bit-32g.safetensors")
    torch.save({}, coded / "pytorch_model.bin")
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 1e-5
    (coded / "pytorch_model.bin").unlink()
    shutil.copy(coded / "gptq_model-4bit-32g.safetensors", coded / "gptq_model-8bit-32g.safetensors")
    with pytest.raises(ModelError, match=r"holds several models \(gptq_model-4bit-32g.safetensors, gptq_model-8bit"):
        engine_for(coded)


def test_scales_of_keys_and_values_are_no_weights(tmp_path: Path) -> None:
    """FP8 checkpoints bring them in several places."""
    plain = checkpoint(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS["fp8-whole"])
    tensors = load_file(coded / "model.safetensors")
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        for suffix in ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "attn.k_scale", "k_proj.output_scale"):
            tensors[f"{layer}.{suffix}"] = torch.tensor(0.02)
        tensors[f"{layer}.q_proj.input_scale"] = torch.tensor(0.01)
    save_file(tensors, coded / "model.safetensors")
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = "static"
    (coded / "config.json").write_text(json.dumps(config))
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 1e-5
    for dtype, says in (
        ("auto", "made for keys and values as fp8: --kv-cache-dtype fp8"),
        ("int8", "held as int8, wi"),
    ):
        files = ModelFiles.read(EngineConfig.of(str(coded), kv_cache_dtype=dtype), coded)
        assert any(says in notice for notice in files.notices)


@pytest.mark.parametrize("kind", ["fp8-whole", "ct-mxfp4"])
def test_quarks_names(tmp_path: Path, kind: str) -> None:
    """AMD's Quark stores what others do, under names of its own."""
    if not installed(kind):
        pytest.skip("compressed-tensors is not installed")
    plain = checkpoint(tmp_path)
    coded = quantize(plain, tmp_path / "coded", FORMATS[kind])
    tensors = load_file(coded / "model.safetensors")
    tensors = {name.replace("weight_packed", "weight"): tensor for name, tensor in tensors.items()}
    save_file(tensors, coded / "model.safetensors")
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    if kind != "fp8-whole":
        weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    (coded / "config.json").write_text(json.dumps(config))
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded, quantization="quark"), PROMPT), expected) < 1e-5


def test_keys_and_values_alone_quantized(tmp_path: Path) -> None:
    """Weights are floats, and there are scales."""
    plain = checkpoint(tmp_path)
    tensors, config = load_file(plain / "model.safetensors"), json.loads((plain / "config.json").read_text())
    expected = engine_logits(engine_for(plain), PROMPT)
    tensors |= {f"model.layers.0.self_attn.{side}_scale": torch.tensor([0.02]) for side in ("k", "v", "kv")}
    save_file(tensors, plain / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    said = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    assert off(engine_logits(engine_for(plain), PROMPT), expected) < 1e-5


def without(suffix: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def saying(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {**config["quantization_config"], **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64)
    save_file(tensors, folder / "model.safetensors")


def silent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scales": (without("k_proj.scales"), r"model\.safetensors: has no tensor model\.layers\.0\.self_attn\.k_pr"),
    "another group size": (saying(group_size=64), r"\.scales has shape .* and int4 in groups of 64 .* groups of 32"),
    "other bits": (saying(bits=8), r"\.q_proj\.weight has shape .*asks for"),
    "unknown bits": (saying(bits=6), r"bits is 6, and ingle reads 2, 3, 4, 8"),
    "another method": (saying(quant_method="fp8"), r"has a tensor model\.layers\..*\.qweight, and the configuration"),
    "in two ways": (twice, r"model\.layers\.0\.mlp\.up_proj is stored in several ways \(qweight, weight\)"),
    "a silent configuration": (silent, r"is quantized \(GPTQ or AWQ\), and the configuration does not say how.*; take"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints(tmp_path: Path, name: str) -> None:
    damage, says = BAD[name]
    coded = quantize(checkpoint(tmp_path), tmp_path / "coded", FORMATS["gptq"])
    damage(coded)
    with pytest.raises(IngleError, match=says) as caught:
        engine_for(coded, dtype="auto")
    assert "\n" not in str(caught.value)


def test_the_flag(tmp_path: Path) -> None:
    coded = quantize(checkpoint(tmp_path), tmp_path / "coded", FORMATS["gptq"])
    engine_for(coded, dtype="auto", quantization="gptq")
    with pytest.raises(
        ConfigError, match=r"--quantization awq: .* is quantized already: GPTQ, int4 in groups of 32; lea"
    ):
        engine_for(coded, dtype="auto", quantization="awq")
