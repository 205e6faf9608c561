"""`ingle serve NAME`, of a model that is not here yet, to an answered chat: one command, whatever the hub has."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from ingle.home import home
from tests.e2e.conftest import start_server
from tests.hub.server import Hub, Repo, serving
from tests.support import save_checkpoint
from tests.text.toys import byte_level_json

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SMALL_CACHE = ("--kv-cache-memory", "64MiB")


@pytest.fixture(scope="module")
def hub(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A tiny model as safetensors and as sharded .bin, and the default model as one of several GGUF files."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=420)
    (folder / "tokenizer.json").write_text(byte_level_json())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    small = {name: held for name, held in files.items() if name != "model.safetensors"}
    gguf = {"tiny-Q4_1.gguf": smollm2_gguf.read_bytes(), "tiny-Q2_K.gguf": b"GGUF", "tiny-BF16.gguf": b"GGUF"}
    repos = {
        "org/tiny": Repo({**files, "onnx/model.onnx": b"x"}),
        "org/tiny-bin": Repo({**small, **shards(folder)}),
        "org/tiny-GGUF": Repo(gguf),
    }
    with serving(Hub(repos=repos)) as state:
        yield state


def shards(folder: Path) -> dict[str, bytes]:
    """Its weights in two .bin files with their index."""
    tensors, found, index = load_file(folder / "model.safetensors"), {}, {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        out, name = io.BytesIO(), f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({tensor: tensors[tensor] for tensor in names}, out)
        found[name] = out.getvalue()
        index |= dict.fromkeys(names, name)
    return {**found, "pytorch_model.bin.index.json": json.dumps({"weight_map": index}).encode()}


@pytest.mark.parametrize(
    ("name", "served", "progress"),
    [
        ("org/tiny", "org/tiny", "pulling org/tiny"),
        ("hf.co/org/tiny-bin@main", "org/tiny-bin", "pulling org/tiny-bin"),
        ("org/tiny-GGUF:q4_1", "org/tiny-GGUF:q4_1", "pulling org/tiny-GGUF"),
        ("{url}/cdn/org/tiny-GGUF/tiny-Q4_1.gguf?token=secret", "tiny-Q4_1", "downloading tiny-Q4_1.gguf"),
    ],
)
def test_from_a_name_to_an_answered_chat(hub: Hub, name: str, served: str, progress: str, tmp_path: Path) -> None:
    cdn = hub.cdn.removesuffix("/cdn")
    (tmp_path / "ingle").mkdir()
    (tmp_path / "ingle" / "kernels").symlink_to(home() / "kernels")  # else each test compiles them
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "INGLE_HOME": str(tmp_path / "ingle"),
                 "no_proxy": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    server = start_server(name.format(url=cdn), *SMALL_CACHE, **variables)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == served
            body = {"model": served, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] >= 1
        assert progress in server.text()
        assert "terms: apache-2.0" in server.text() or "{url}" in name
        assert "secret" not in server.text()
    finally:
        assert server.stop() == 0, server.text()
    listed = subprocess.run(
        [sys.executable, "-m", "ingle", "list", "--json"], capture_output=True, text=True, check=True,
        env={**os.environ, **variables},
    )  # fmt: skip
    (held,) = json.loads(listed.stdout)
    assert held["format"] in ("safetensors", "PyTorch", "GGUF") and Path(held["path"]).exists()
