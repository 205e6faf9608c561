"""What is fuzzed: each target reads a file as the engine and the server would. Only a `ModelError` may come out."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save

from ingle.errors import ModelError
from ingle.text.folder_tokenizer import tokenizer_from_folder
from ingle.text.gguf_tokenizer import tokenizer_from_gguf
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from ingle.weights.open import open_source
from ingle.weights.quantized.config import read_quantization
from ingle.weights.source import WeightSource
from ingle.weights.torch_pickle import PickleError, read_state_dict
from tests.text import toys
from tests.weights.quantized import packers
from tests.weights.quantized.packers import Written

SMALL = 1 << 16
"""Tensors of up to so many numbers are loaded, whatever shape the file gives them."""

TENSORS = {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.ones(40, 64, dtype=torch.bfloat16)}
NAMES = ("model.embed_tokens.weight", *TENSORS, "model.layers.0.self_attn.q_proj.weight")


@dataclass(frozen=True)
class Target:
    file: str
    seed: Callable[[], bytes]
    """A whole file, to be damaged."""
    readers: tuple[Callable[[Path], object], ...]
    """Each is given the file's path."""
    config: str = "{}"
    """What lies beside it as config.json."""

    def read(self, raw: bytes) -> None:
        """Whatever `raw` is, nothing but a model or a `ModelError` comes out."""
        for reader in self.readers:
            with suppress(ModelError):
                self.read_with(reader, raw)

    def read_with(self, reader: Callable[[Path], object], raw: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(self.config)
            path = Path(folder, self.file)
            path.write_bytes(raw)
            reader(path)


def _gguf_seed() -> bytes:
    tokenizer = {key.removeprefix("tokenizer.ggml."): value for key, value in toys.sentence_piece_metadata().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_block_count(1)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(tokenizer["model"])
        writer.add_token_list(tokenizer["tokens"])
        writer.add_token_scores(tokenizer["scores"])
        writer.add_token_types(tokenizer["token_type"])
        for name, kind in (
            ("token_embd.weight", "Q4_1"),
            ("blk.0.attn_q.weight", "Q8_0"),
            ("output_norm.weight", "F32"),
        ):
            values = np.ones((64, 64) if "norm" not in name else 64, np.float32)
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
        blocks = np.zeros((1, 144), np.uint8)
        writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _read_weights(path: Path) -> None:
    source = open_source(path if path.suffix == ".gguf" else path.parent, "auto", 0)
    for name in NAMES:
        if name in source:
            _load(source, name)
    source.close()


def _load(source: WeightSource, name: str) -> None:
    shape = source.shape(name) or ()
    if np.prod(shape, dtype=object) <= SMALL:
        source.load_into(name, torch.empty(shape))


def _read_folders_config(path: Path) -> None:
    read_config(path.parent)


def _read_gguf_tokenizer(path: Path) -> None:
    tokenizer_from_gguf(GgufFile(path).metadata, path).encode("abc 你好\n\n")


def _read_folders_tokenizer(path: Path) -> None:
    tokenizer = tokenizer_from_folder(path.parent)
    tokenizer.decode(tokenizer.encode("abc 你好\n\n"))


def _torch_seed() -> bytes:
    written = io.BytesIO()
    torch.save(TENSORS, written)
    return written.getvalue()


def _read_pickle(path: Path) -> None:
    try:
        read_state_dict(path.read_bytes())
    except PickleError as error:
        raise ModelError(str(error)) from error


def _pickle_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.bin")
        path.write_bytes(_torch_seed())
        return torch.PyTorchFileReader(str(path)).get_record("data.pkl")


def _sentencepiece_seed() -> bytes:
    """A few pieces, as protocol buffers spell them."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1), ("b", 1), ("ab", 1), ("▁", 1), ("<0x0A>", 6), ("▁▁", 4)]
    messages = []
    for index, (piece, kind) in enumerate(pieces):
        text = piece.encode()
        score = np.float32(-index).tobytes()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + score + b"\x18" + bytes([kind])
        messages.append(b"\x0a" + bytes([len(message)]) + message)
    return b"".join(messages) + b"\x12\x02\x18\x02" + b"\x1a\x04\x18\x01\x20\x00"


def _tiktoken_seed() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", "你".encode()]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


QUANTIZED: dict[str, Callable[[], Written]] = {
    "gptq": lambda: packers.gptq(16, 64, group_size=32, act_order=True, symmetric=False),
    "awq-gemv": lambda: packers.gemv(16, 64, group_size=32),
    "bitsandbytes": lambda: packers.bitsandbytes(16, 64),
    "bitsandbytes-int8": lambda: packers.bitsandbytes_int8(16, 64),
    "fp8": lambda: packers.fp8(16, 64, block=(8, 32)),
    "nvfp4": lambda: packers.modelopt_nvfp4(16, 64),
}
"""A layer each."""


def _quantized(name: str) -> Target:
    written = QUANTIZED[name]()
    tensors = {
        f"model.layers.0.mlp.up_proj.{suffix}": tensor.contiguous() for suffix, tensor in written.tensors.items()
    }
    config = json.dumps({"quantization_config": written.settings})
    return Target("model.safetensors", lambda: save(tensors), (_read_quantized,), config)


def _read_quantized(path: Path) -> None:
    config = json.loads(Path(path.parent, "config.json").read_text())
    source = open_source(path.parent, "auto", 0, quantization=read_quantization(path.parent, config))
    own = [f"model.layers.0.mlp.experts.1.{name}" for name in ("up_proj.weight", "down_proj.weight", "up_proj.bias")]
    for name in ("model.layers.0.mlp.up_proj.weight", *own, *NAMES):
        if name in source:
            shape = source.shape(name) or ()
            if source.is_coded(name) and np.prod(shape, dtype=object) <= SMALL:
                source.groups(name, *shape).decoded()
            source.check(name, int(np.prod(shape, dtype=object)))
    assert source.stored_types is not None
    source.close()


def _experts() -> Target:
    """In one tensor, as gpt-oss has them: MXFP4, and floats."""
    stacks = {
        "gate_up_proj_blocks": np.ones((2, 8, 2, 16), np.uint8),
        "gate_up_proj_scales": np.full((2, 8, 2), 120, np.uint8),
        "gate_up_proj_bias": np.ones((2, 8), np.float32), "down_proj": np.ones((2, 4, 64), np.float32),
    }  # fmt: skip
    config = json.dumps({"quantization_config": {"quant_method": "mxfp4"}})
    tensors = {f"model.layers.0.mlp.experts.{name}": torch.from_numpy(array) for name, array in stacks.items()}
    return Target("model.safetensors", lambda: save(tensors), (_read_quantized,), config)


CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 40,
    "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "eos_token_id": [1, 2],
}  # fmt: skip

TARGETS = {
    "gguf": Target("model.gguf", _gguf_seed, (read_config, _read_gguf_tokenizer, _read_weights)),
    "safetensors": Target("model.safetensors", lambda: save(TENSORS), (_read_weights,)),
    "torch_bin": Target("pytorch_model.bin", _torch_seed, (_read_weights,)),
    "pickle": Target("data.pkl", _pickle_seed, (_read_pickle,)),
    "sentencepiece": Target("tokenizer.model", _sentencepiece_seed, (_read_folders_tokenizer,)),
    "tiktoken": Target("qwen.tiktoken", _tiktoken_seed, (_read_folders_tokenizer,)),
    **{f"quantized-{name}": _quantized(name) for name in QUANTIZED},
    "quantized-experts": _experts(),
    "config": Target("config.json", lambda: json.dumps(CONFIG).encode(), (_read_folders_config,)),
}


@lru_cache
def seed_of(name: str) -> bytes:
    return TARGETS[name].seed()
