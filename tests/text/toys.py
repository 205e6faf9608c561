"""Small tokenizers of the kinds that language models have."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what we'll do: don't stop!",
    "def f(x):\n    return x ** 2  # a comment\n\n\tprint(f(12345))",
    "你好，世界。今天天气很好！我们一起去公园吧。",
    "emoji 😀😀 👩‍👩‍👧 and naïve café — “quotes” … ½ ٣",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n",
    "  two leading spaces and   three inside \r\n\t end ",
    "1234567890 3.14 1,000 ２３ ½ ١٢",
    "<|im_start|>user\nhi<|im_end|>\n<tool> x</tool>",
    "it's WE'LL I'd",
    "a\u00a0b\u3000c\u200d\x00\x01",
    "مرحبا שלום नमस्ते ไทย 한국어 日本語",
]


@lru_cache
def byte_level_json() -> str:
    """Byte-level BPE with two special tokens and one added token that is plain."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False), AddedToken("日ĠĊ", special=False)])
    return backend.to_str()


def byte_level() -> Tokenizer:
    return Tokenizer.from_str(byte_level_json())


PIECES = [
    "▁",
    "a",
    "b",
    "c",
    "▁a",
    "ab",
    "▁ab",
    "bc",
    "▁bc",
    "abc",
    "▁abc",
    "你",
    "好",
    "你好",
    "▁你好",
    "▁▁",
    "▁▁▁▁",
    ".",
]


def sentence_piece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and GGUF token types of a SentencePiece model with byte fallback."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<tool>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4]
    return tokens, scores, types


def sentence_piece(decoder: Any = None) -> Tokenizer:
    """As Llama-2's `tokenizer.json`. No merges: tests of decoders choose token ids by themselves."""
    tokens, _, _ = sentence_piece_vocabulary()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder or llama_decoder()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def llama_decoder(strip: int = 1) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)


def write_folder(folder: Path, backend: Tokenizer | None = None, **files: Any) -> Path:
    """A model folder. `files` maps a name, `__` for the dot, to an object for JSON or to text."""
    folder.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    files.setdefault("config__json", {"model_type": "llama"})
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def sentence_piece_metadata(**changes: Any) -> dict[str, Any]:
    """The tokenizer keys of a GGUF file; None takes a key out."""
    tokens, scores, types = sentence_piece_vocabulary()
    return _metadata({"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}, changes)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    model = json.loads(byte_level_json())["model"]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": list(model["vocab"]),
        "token_type": [3] * 3 + [1] * (len(model["vocab"]) - 3),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _metadata(keys, changes)


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A file that holds no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind, gguf.GGUFValueType.get_type(value[0]) if kind.name == "ARRAY" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(keys: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}
    template = metadata.pop("tokenizer.ggml.chat_template", None)
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}
