"""What a model's files say never reaches a terminal or a log as it stands: no escapes, no forged lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ingle.cli.main import main
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import IngleError, ModelError, RequestError, printable
from tests.support import save_checkpoint
from tests.text import toys

EVIL = "x\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n[notice] all is well\x00"
UNSEEN = re.compile(r"[^\S\n\t ]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff]")


def test_printable() -> None:
    assert printable("Größe 你好 😀") == "Größe 你好 😀"
    shown = printable(EVIL)
    assert shown.isprintable() and shown.startswith(r"x\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n[notice]")
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"
    assert printable("\ud800") == r"\ud800"


@pytest.mark.parametrize("kind", [IngleError, ModelError, RequestError])
def test_no_error_carries_escapes(kind: type[IngleError]) -> None:
    assert not UNSEEN.search(str(kind(f"no such thing: {EVIL}")))


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def rename_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"{which}{EVIL}.{name}": value for name, value in tensors.items() for which in "ab"}
    save_file(renamed, folder / "model.safetensors")


def rename_norms(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({f"{EVIL}.{name}": value for name, value in load_file(file).items() if "norm" in name}, file)


def template(folder: Path) -> None:
    source = "{{ raise_exception(EVIL) }}".replace("EVIL", json.dumps(EVIL))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))


def index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{EVIL}.safetensors"}}))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "model_type": edit_config(model_type=EVIL),
    "architectures": edit_config(architectures=[EVIL]),
    "rope type": edit_config(rope_parameters={"rope_type": EVIL, "rope_theta": 1e4}),
    "activation": edit_config(hidden_act=EVIL),
    "layer types": edit_config(layer_types=[EVIL, EVIL]),
    "a number": edit_config(hidden_size=EVIL),
    "quantization": edit_config(quantization_config={"quant_method": EVIL}),
    "names of tensors": rename_tensors,
    "names of some": rename_norms,
    "template": template,
    "index": index,
}


Shown = Callable[[str, Path], str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Shown:
    """What a command prints and logs about a model."""

    def run(command: str, model: Path) -> str:
        capsys.readouterr()
        options = ["hi", "--max-tokens", "1", "--kv-cache-memory", "8MiB"] if command == "generate" else []
        main([command, str(model), *options])
        printed = capsys.readouterr()
        return printed.err + caplog.text + (printed.out if command == "show" else "")

    return run


@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize("command", ["show", "generate"])
def test_folders(tmp_path: Path, shown: Shown, what: str, command: str) -> None:
    folder = save_checkpoint(tmp_path / "model", vocab_size=400)
    (folder / "tokenizer.json").write_text(toys.byte_level_json())
    FOLDERS[what](folder)
    text = shown(command, folder)
    assert not UNSEEN.search(text) and "\n[notice]" not in text, text


GGUF: dict[str, dict[str, Any]] = {
    "context length": {"llama.context_length": EVIL},
    "rope scaling": {"llama.rope.scaling.type": EVIL},
    "end token": {"tokenizer.ggml.eos_token_id": EVIL, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]},
    "tokenizer": {"tokenizer.ggml.model": EVIL},
    "pre-tokenizer": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": EVIL, "tokenizer.ggml.tokens": ["a", "b"]},
}


@pytest.mark.parametrize("what", [*GGUF, "architecture"])
@pytest.mark.parametrize("command", ["show", "generate"])
def test_gguf_files(write_gguf, model_metadata, shown: Shown, what: str, command: str) -> None:
    tensors = {"token_embd.weight": np.zeros((40, 64), np.float32)}
    path = write_gguf(model_metadata | GGUF.get(what, {}), tensors, arch=EVIL if what == "architecture" else "llama")
    text = shown(command, path)
    assert not UNSEEN.search(text) and "\n[notice]" not in text, text


def test_notices(tmp_path: Path) -> None:
    """They may name tensors as the file does."""
    file = save_checkpoint(tmp_path) / "model.safetensors"
    save_file({f"{EVIL}.{name}": value for name, value in load_file(file).items() if "lm_head" not in name}, file)
    config = EngineConfig.of(str(tmp_path), dtype="float32", device="cpu", kv_cache_memory="8MiB")
    notices = build_engine(config, tmp_path)[1].notices
    assert any("embedding takes its place" in notice for notice in notices)
    assert all(notice.isprintable() for notice in notices)
