from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.support import save_checkpoint
from tests.text import toys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", vocab_size=420)
    toys.byte_level().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


FAST = ("--num-tokens", "6", "--num-prompts", "3", "--device", "cpu")


def test_a_table_and_a_verdict(ingle: Run, folder: Path) -> None:
    figures = folder.parent / "figures.json"
    result = ingle("verify", str(folder), "--dtype", "float32", *FAST, "--output", str(figures))
    assert result.code == 0, result.err
    assert "verdict: PASS" in result.out and "The capital of France is" in result.out
    assert "perplexity of the texts: " in result.out and "(+0.000 %)" in result.out.replace("-0.000", "+0.000")
    assert "transformers' code for 'llama', reading the folder itself" in result.out
    found = json.loads(figures.read_text())
    assert found["passed"] and found["dtype"] == "float32" and len(found["prompts"]) == 3


def test_a_wrong_model_is_a_failure(ingle: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingle.model import registry

    qwen2 = registry.FAMILIES["qwen2"]
    weights = load_file(folder / "model.safetensors")
    norm = weights["model.norm.weight"]
    sizes = {
        f"model.layers.{i}.self_attn.{p}_proj.bias": size
        for i in (0, 1)
        for p, size in zip("qkv", (64, 32, 32), strict=True)
    }
    biases = {name: norm[:size].clone() for name, size in sizes.items()}
    save_file({**weights, **biases}, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setitem(registry.FAMILIES, "llama", qwen2)  # with biases that a llama does not have
    result = ingle("verify", str(folder), "--dtype", "float32", *FAST)
    assert result.code == 1 and "verdict: FAIL" in result.out
    assert result.err.splitlines()[-1] == f"ingle: {folder} is not computed as the reference computes it"


def test_prompts_from_a_file(ingle: Run, folder: Path) -> None:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("你好，世界\n\nHello there\n", encoding="utf-8")
    result = ingle("verify", str(folder), *FAST, "--prompts-file", str(prompts))
    assert result.code == 0, result.err
    assert "你好，世界" in result.out and "Hello there" in result.out and "France" not in result.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num-tokens", "0"), "--num-tokens 0"),
        (("--num-prompts", "0"), "--num-prompts 0"),
        (("--prompts-file", "nowhere.txt"), "--prompts-file nowhere.txt"),
        (("--rope-theta", "1e6"), "--rope-theta 1e6: the checkpoint is compared as it is"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(ingle: Run, argv: tuple[str, ...], message: str) -> None:
    result = ingle("verify", "no-such-model", *argv)
    assert result.code == 2 and message in result.err


def test_quantized_and_how_far_from_its_floats(ingle: Run, folder: Path) -> None:
    out, figures = folder.parent / "out", folder.parent / "figures.json"
    result = ingle("quantize", str(folder), "--to", "int8", str(out))
    assert result.code == 0, result.err
    assert f"{out}: 14 matrices as int8 in groups of 16" in result.out and "weights are off by" in result.out
    assert f"ingle verify {out} --against {folder}" in result.err
    result = ingle("verify", str(out), "--against", str(folder), "--text-tokens", "80", "--output", str(figures))
    assert result.code == 0, result.err
    assert "KL divergence" in result.out and "over 80 tokens" in result.out
    assert 0 < json.loads(figures.read_text())["distance"]["mean_kl"] < 0.01
    result = ingle("quantize", str(folder), "--to", "int8", str(out))
    assert result.code == 2 and "is there already" in result.err


def test_rounded_on_load_it_is_right_and_some_way_off(ingle: Run, folder: Path) -> None:
    result = ingle("verify", str(folder), "--quantization", "int4", "--text-tokens", "60", *FAST)
    assert result.code == 0, result.err
    assert "verdict: PASS" in result.out and "on the weights as ingle decodes them" in result.out
    assert f"distance from {folder} in floats" in result.out
