"""Tiny embedding models and rerankers, as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from tests.support import save_checkpoint
from tests.text import toys

QUERY = "Instruct: find it\nQuery:"
CARD = "---\nlicense: apache-2.0\npipeline_tag: text-ranking\n---\n# A reranker\n"


def tokenizer(end: bool) -> Tokenizer:
    """Byte-level, with words for yes and no; `end` puts <|endoftext|> after each text, as Qwen3-Embedding does."""
    backend = toys.byte_level()
    backend.add_tokens(["yes", "no"])
    if end:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        )
    return backend


def save_model(folder: Path, *, end: bool = False, **overrides: Any) -> Path:
    """A tiny Qwen3 with a tokenizer."""
    backend = tokenizer(end)
    save_checkpoint(
        folder, "qwen3", **{"tie_word_embeddings": True, "vocab_size": backend.get_vocab_size(), **overrides}
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def save_embedding_model(
    folder: Path, mode: str = "lasttoken", *, kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")
) -> Path:
    """As Qwen3-Embedding is published."""
    save_model(folder, end=True)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": paths.get(kind, kind), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config = {"word_embedding_dimension": 64, **{f"pooling_mode_{name}": name == mode for name in modes}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    prompts = {"prompts": {"query": QUERY, "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def save_reranker(folder: Path) -> Path:
    """As Qwen3-Reranker is published: all that tells it is its card."""
    save_model(folder)
    (folder / "README.md").write_text(CARD)
    return folder
