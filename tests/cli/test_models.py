"""pull, list, show and rm, with a toy model in the store."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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
    assert (result.code, header.split()) == (0, ["NAME", "SIZE", "FORMAT", "PULLED"])
    assert row.split()[:4] == ["smollm2:135m", "0.0", "MB", "GGUF"]
    assert header.index("FORMAT") == row.index("GGUF")


def test_list_of_an_empty_store(ingle: Run) -> None:
    result = ingle("list")
    assert result.code == 0
    assert "no models in" in result.out and "smollm2:135m" in result.out


def test_list_goes_on_past_a_damaged_model(ingle: Run, stored: Path) -> None:
    stored.unlink()
    result = ingle("list")
    assert result.code == 0
    assert "smollm2:135m  -     damaged" in result.out
    assert "is damaged" in result.err and result.err.count("\n") == 1


def test_pull_of_a_model_that_is_there(ingle: Run, stored: Path) -> None:
    result = ingle("pull", "smollm2")
    assert (result.code, result.out, result.err) == (0, f"smollm2:135m is in the store: {stored}\n", "")


def test_pull_of_an_unknown_model(ingle: Run) -> None:
    result = ingle("pull", "gpt5")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("ingle: ingle does not know where to fetch gpt5 from") and result.err.count("\n") == 1


def test_rm(ingle: Run, stored: Path) -> None:
    assert ingle("rm", "smollm2").out == "removed smollm2:135m\n"
    assert not stored.exists()
    result = ingle("rm", "smollm2")
    assert (result.code, result.out) == (1, "")
    assert "is not in the local store" in result.err
    assert "is neither a path" in ingle("rm", "../home").err


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
    assert asked == ["Remove smollm2:135m? [y/N] "]


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
    assert facts(result.out) == {
        "model": str(smollm2_gguf),
        "architecture": "llama",
        "family": "llama",
        "parameters": "134.5 M",
        "stored as": "Q4_1 79%, Q8_0 21%, F32 0%",
        "context": "8192 tokens",
        "chat template": "yes",
        "sampling": "none",
        "size": "98.4 MB",
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
    shown = facts(ingle("show", str(folder)).out)
    assert shown == {
        "model": str(folder),
        "architecture": "LlamaForCausalLM",
        "family": "llama",
        "parameters": "1.2 M",
        "stored as": "F16 100%",
        "context": "2048 tokens",
        "chat template": "yes",
        "sampling": "temperature 0.6, top_k 20",
        "size": "2.4 MB",
        "path": str(folder),
    }
    (folder / "tokenizer_config.json").unlink()
    assert facts(ingle("show", str(folder)).out)["chat template"] == "no"


@pytest.mark.parametrize(("name", "content"), [("config.json", b"{"), (SHARD, b"\xff" * 100)])
def test_show_a_damaged_folder(ingle: Run, folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    result = ingle("show", str(folder))
    assert (result.code, result.out) == (1, "")
    assert name in result.err and result.err.count("\n") == 1


def test_show_what_is_not_there(ingle: Run) -> None:
    result = ingle("show", "smollm3")
    assert (result.code, result.out) == (1, "")
    assert "did you mean smollm2" in result.err
    assert "run `ingle pull smollm2:135m`" in ingle("show", "smollm2").err
