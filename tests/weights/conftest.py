from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

WriteGguf = Callable[..., Path]
Types = dict[str, gguf.GGMLQuantizationType]


@pytest.fixture
def model_metadata() -> dict[str, Any]:
    """Of a llama with hidden size 64, 4 heads of 16 and 2 key-value heads."""
    return {
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 0.5,
        "llama.context_length": 128,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """write_gguf(metadata, tensors, ...) writes with the reference writer and returns the path.

    `types` gives the ggml type of tensors to be quantized, `stored_types` that of tensors given as stored bytes.
    """

    def write(
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        types: Types | None = None,
        stored_types: Types | None = None,
        arch: str = "llama",
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (metadata or {}).items():
            _add(writer, key, value)
        for name, array in (tensors or {}).items():
            if types and name in types:
                writer.add_tensor(name, gguf.quantize(array, types[name]), raw_dtype=types[name])
            else:
                writer.add_tensor(name, array, raw_dtype=(stored_types or {}).get(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
