"""pull, list, show and rm, with a toy model in the store."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

from ingle.hub.catalog import find_entry
from ingle.hub.store import Store
from tests.cli.conftest import Run


@pytest.fixture
def stored(ingle: Run) -> Path:
    """The path of a file that passes for the default model's, in the store."""
    entry = find_entry("smollm2")
    assert entry is not None
    store = Store()
    with store.lock(entry.name):
        file = store.partial(entry.name) / "file"
        file.parent.mkdir()
        file.write_bytes(b"GGUF" + bytes(996))
        return store.install(replace(entry, size=1000), file).path


def test_list(ingle: Run, stored: Path) -> None:
    result = ingle("list")
    header, row = result.out.splitlines()
    assert (result.code, header.split()) == (0, ["NAME", "SIZE", "FORMAT", "LAST", "USED"])
    assert row.split()[:4] == ["smollm2:135m", "1.0", "kB", "GGUF"]
    assert header.index("FORMAT") == row.index("GGUF")


def test_list_of_an_empty_store(ingle: Run) -> None:
    result = ingle("list")
    assert result.code == 0
    assert "no models here yet" in result.out


def test_list_goes_on_past_a_damaged_model(ingle: Run, stored: Path) -> None:
    stored.unlink()
    result = ingle("list")
    assert result.code == 0
    assert re.search("smollm2:135m +- +damaged", result.out)
    assert "is damaged" in result.err and result.err.count("\n") == 1


def test_pull_of_a_model_that_is_there(ingle: Run, stored: Path) -> None:
    result = ingle("pull", "smollm2")
    assert (result.code, result.out, result.err) == (0, f"smollm2:135m is here: {stored}\n", "")


def test_pull_of_an_unknown_model(ingle: Run) -> None:
    result = ingle("pull", "gpt5")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("ingle: there is no model gpt5") and result.err.count("\n") == 1


def test_rm(ingle: Run, stored: Path) -> None:
    assert ingle("rm", "smollm2").out == "removed smollm2:135m, 1.0 kB\n"
    assert not stored.exists()
    result = ingle("rm", "smollm2")
    assert (result.code, result.out) == (1, "")
    assert "there is no smollm2:135m on this machine; `ingle list`" in result.err
    assert "is no model" in ingle("rm", "../home").err


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("YES", True), ("n", False), ("", False), (None, False)])
def test_rm_asks_on_a_terminal(
    ingle: Run, stored: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, gone: bool
) -> None:
    asked = []

    def reply(question: str) -> str:
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", reply)
    assert ingle("rm", "smollm2:135m").code == 0
    assert stored.exists() is not gone
    assert asked == ["Remove smollm2:135m, 1.0 kB? [y/N] "]


@pytest.mark.parametrize("flag", ["-y", "--yes"])
def test_rm_yes(ingle: Run, stored: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert ingle("rm", "smollm2:135m", flag).code == 0
    assert not stored.exists()


def facts(out: str) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in out.splitlines()}


def test_show_a_gguf_file(ingle: Run, smollm2_gguf: Path) -> None:
    result = ingle("show", str(smollm2_gguf))
    assert result.code == 0
    shown = facts(result.out)
    assert re.fullmatch(
        r"0\.\d\d GiB of memory \(9\d\.\d\d MiB of weights, 0\.18 GiB of KV cache for 8192 tokens\); this .* free",
        shown.pop("needs"),
    )
    assert shown == {
        "model": str(smollm2_gguf),
        "format": "GGUF",
        "architecture": "llama",
        "family": "llama",
        "parameters": "134.5 M",
        "stored as": "Q4_1 79%, Q8_0 21%, F32 0%",
        "context": "8192 tokens",
        "chat template": "tokenizer.chat_template of the file; system messages: yes, tools: no",
        "sampling": "none",
        "license": "apache-2.0 (general.license)",
        "size": "98.4 MB",
        "runs here": "yes",
        "path": str(smollm2_gguf),
    }


SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": 1000,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    for shard in (1, 2):
        tensors = {f"{shard}.weight": np.zeros((1000, 600), np.float16)}
        save_file(tensors, path / f"model-0000{shard}-of-00002.safetensors")
    save_file({"tok_embeddings.weight": np.zeros((9, 9), np.float16)}, path / "consolidated.safetensors")  # not loaded
    return path


def test_show_a_folder(ingle: Run, folder: Path) -> None:
    (folder / "LICENSE").write_text("\n   Apache License\n  Version 2.0, January 2004\n")
    out = ingle("show", str(folder)).out
    shown = facts(out)
    assert "no tokenizer: tokenizer.json is missing" in out
    assert "has no tensor model.embed_tokens.weight, which the model needs (so are" in shown.pop("")
    assert shown == {
        "model": str(folder),
        "format": "safetensors, 2 files",
        "architecture": "LlamaForCausalLM",
        "family": "llama",
        "parameters": "1.2 M",
        "stored as": "F16 100%",
        "context": "2048 tokens",
        "chat template": "no",
        "sampling": "none",
        "license": "Apache License Version 2.0, January 2004 (LICENSE)",
        "size": "2.4 MB",
        "runs here": "no",
        "path": str(folder),
    }


def test_show_a_damaged_folder(ingle: Run, folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\xff" * 100)
    result = ingle("show", str(folder))
    assert result.code == 0
    assert facts(result.out)["runs here"] == "no" and f"{SHARD}: damaged or truncated" in result.out
    (folder / "config.json").write_bytes(b"{")
    result = ingle("show", str(folder))
    assert (result.code, result.out) == (1, "")
    assert "config.json" in result.err and result.err.count("\n") == 1


def shown_json(ingle: Run, path: Path) -> Any:
    return json.loads(ingle("show", "--json", str(path)).out)


CARD = "---\nlanguage: en\nlicense: other\nlicense_name: qwen\nlicense_link: 'LICENSE'\n---\n# Model\n"


def test_show_as_json(ingle: Run, folder: Path) -> None:
    (folder / "README.md").write_text(CARD)
    shown = shown_json(ingle, folder)
    assert (shown["license"], shown["num_parameters"], shown["context"]) == ("qwen, LICENSE (README.md)", 1200000, 2048)
    assert shown["runs"] is False and all(finding["refused"] for finding in shown["findings"])
    assert {"what", "alternative"} < shown["findings"][0].keys()


@pytest.mark.parametrize(
    ("key", "settings", "stored"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bits"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "AWQ, 4 bits"),
        ("quantization_config", {"quant_method": "fp8"}, "FP8"),
        ("quantization_config", {"quant_method": "exl2", "bits": 4.25}, "EXL2, 4.25 bits"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX, 4 bits"),
    ],
)
def test_show_names_how_weights_are_packed(ingle: Run, folder: Path, key: str, settings: Any, stored: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
    shown = shown_json(ingle, folder)
    assert (shown["quantization"], shown["runs"]) == (stored, False)
    assert shown["num_parameters"] == 210240  # by the configuration: packed numbers do not tell
    read = settings.get("quant_method") in ("gptq", "awq", "fp8", "bitsandbytes")
    assert read != any("quantized" in finding["what"] for finding in shown["findings"])


def test_show_an_adapter(ingle: Run, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-7B", "r": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(1000))
    shown = facts(ingle("show", str(tmp_path)).out)
    assert (shown["format"], shown["runs here"]) == ("adapter (LORA of rank 16) for Qwen/Qwen2-7B", "no")
    assert "merge both" in shown[""]


def test_show_onnx(ingle: Run, folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    shown = shown_json(ingle, folder)
    assert (shown["format"], shown["runs"], shown["num_bytes"]) == ("ONNX", False, None)


def test_show_parameters_of_a_bin_folder(ingle: Run, folder: Path) -> None:
    import torch

    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"a.weight": torch.zeros(100, 20, dtype=torch.float16)}, folder / "pytorch_model.bin")
    shown = shown_json(ingle, folder)
    assert (shown["format"], shown["num_parameters"], shown["stored_types"]) == ("PyTorch (.bin)", 2000, {"F16": 2000})


def test_show_what_is_not_there(ingle: Run) -> None:
    result = ingle("show", "smolm")
    assert (result.code, result.out) == (1, "")
    assert "did you mean " in result.err and "smollm2" in result.err
    assert "run `ingle pull smollm2:135m`" in ingle("show", "smollm2").err
