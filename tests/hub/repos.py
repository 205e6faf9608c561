"""Repositories as hubs have them: the files that a model needs, and those that lie beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.hub.server import Repo

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
SMALL = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"temperature": 0.6}',
    "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages[0].content }}",
    "LICENSE": b"free",
}
BESIDE = {
    "README.md": b"# a model",
    ".gitattributes": b"*.bin lfs",
    "original/consolidated.00.pth": b"x" * 50_000,
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x" * 50_000,
    "tf_model.h5": b"x" * 50_000,
    "flax_model.msgpack": b"x" * 50_000,
    "runs/events.out": b"x" * 50_000,
}
"""Nothing of it is needed but the README, which holds the terms."""


def data(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sharded(count: int, size: int, stem: str = "model", suffix: str = "safetensors") -> dict[str, bytes]:
    names = [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]
    index = {"weight_map": {f"layer.{at}": name for at, name in enumerate(names)}}
    files = {name: data(size, at) for at, name in enumerate(names)}
    return {f"{stem}.{suffix}.index.json": json.dumps(index).encode(), **files}


def single(size: int = 100_000) -> Repo:
    return Repo({**SMALL, **BESIDE, "model.safetensors": data(size)})


def gguf_repo() -> Repo:
    return Repo(
        {
            "README.md": b"# GGUF",
            "M-Q4_K_M.gguf": b"GGUF" + data(4_000, 1),
            "M-Q8_0.gguf": b"GGUF" + data(8_000, 2),
            "M-IQ1_S.gguf": b"GGUF" + data(1_000, 3),
            "M-F16/M-F16-00001-of-00002.gguf": b"GGUF" + data(9_000, 4),
            "M-F16/M-F16-00002-of-00002.gguf": b"GGUF" + data(9_000, 5),
            "mmproj-M-F16.gguf": b"GGUF" + data(500, 6),
        }
    )


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
