"""A GGUF file of a model's shape with random blocks: python benchmarks/gguf_shape.py benchmarks/shapes/qwen2-7b OUT

The types are those that llama.cpp gives a dense model in Q4_K_M: Q4_K, and Q6_K for the head and for the values and
the last projection of every layer in the first and last eighth and of every third between.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

Q4_K, Q6_K, F32 = 12, 14, 0
BYTES = {Q4_K: (256, 144, (0, 2)), Q6_K: (256, 210, (208,)), F32: (1, 4, ())}
"""Of a type the numbers of a block, its bytes, and where it has a float16."""
_ALIGNMENT = 32
_PIECE = 1 << 24


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def num_bytes(self) -> int:
        numbers, num_bytes, _ = BYTES[self.type]
        return math.prod(self.shape) // numbers * num_bytes


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    yield Tensor("token_embd.weight", (config["vocab_size"], hidden), Q4_K)
    for layer in range(layers):
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        wide = Q6_K if more else Q4_K
        at = f"blk.{layer}"
        yield Tensor(f"{at}.attn_norm.weight", (hidden,), F32)
        for name, rows, kind in (("q", hidden, Q4_K), ("k", kv, Q4_K), ("v", kv, wide)):
            yield Tensor(f"{at}.attn_{name}.weight", (rows, hidden), kind)
            yield Tensor(f"{at}.attn_{name}.bias", (rows,), F32)
        yield Tensor(f"{at}.attn_output.weight", (hidden, hidden), Q4_K)
        yield Tensor(f"{at}.ffn_norm.weight", (hidden,), F32)
        yield Tensor(f"{at}.ffn_gate.weight", (inner, hidden), Q4_K)
        yield Tensor(f"{at}.ffn_up.weight", (inner, hidden), Q4_K)
        yield Tensor(f"{at}.ffn_down.weight", (hidden, inner), wide)
    yield Tensor("output_norm.weight", (hidden,), F32)
    yield Tensor("output.weight", (config["vocab_size"], hidden), Q6_K)


def metadata(config: dict[str, Any]) -> dict[str, str | int | float]:
    return {
        "general.architecture": "qwen2",
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.block_count": config["num_hidden_layers"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2.rope.freq_base": config["rope_theta"],
        "qwen2.vocab_size": config["vocab_size"],
    }


def header(config: dict[str, Any], held: list[Tensor]) -> bytes:
    """As https://github.com/ggml-org/ggml/blob/master/docs/gguf.md says, version 3."""
    values, offset = metadata(config), 0
    out = [b"GGUF", struct.pack("<IQQ", 3, len(held), len(values))]
    for key, value in values.items():
        out.append(_text(key))
        if isinstance(value, str):
            out += [struct.pack("<I", 8), _text(value)]
        else:
            out.append(struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))
    for tensor in held:
        out += [_text(tensor.name), struct.pack("<I", len(tensor.shape))]
        out.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        out.append(struct.pack("<IQ", tensor.type, offset))
        offset += -(-tensor.num_bytes // _ALIGNMENT) * _ALIGNMENT
    whole = b"".join(out)
    return whole + bytes(-len(whole) % _ALIGNMENT)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def blocks(kind: int, random: np.random.Generator) -> bytes:
    """Some megabytes of a type: numbers of about 0.02, as those of a model are."""
    if kind == F32:
        return np.ones(_PIECE // 4, np.float32).tobytes()
    _, num_bytes, halves = BYTES[kind]
    data = random.integers(0, 256, (_PIECE // num_bytes, num_bytes), dtype=np.uint8)
    for index, at in enumerate(halves):
        each = random.uniform(0.5, 1.5, len(data)) * (1e-5 if kind == Q6_K else 1e-4 * (1, 8)[index])
        data[:, at : at + 2] = each.astype(np.float16)[:, None].view(np.uint8)
    return data.tobytes()


def write(config: dict[str, Any], file: BinaryIO) -> None:
    held, random = list(tensors(config)), np.random.default_rng(0)
    pieces = {kind: blocks(kind, random) for kind in BYTES}
    file.write(header(config, held))
    for tensor in held:
        piece, left = pieces[tensor.type], tensor.num_bytes
        while left:
            left -= file.write(memoryview(piece)[:left])
        file.write(bytes(-tensor.num_bytes % _ALIGNMENT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path, help="the folder of a qwen2's config.json")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    config = json.loads((options.shape / "config.json").read_text())
    with options.output.open("wb") as file:
        write(config, file)
    print(f"{options.output}: {options.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
