"""By what two hosts know that they have the same model, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 64 << 10
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")


def digest_of(path: Path) -> str:
    """Of a folder or a .gguf file: its configuration, and of each file of weights the size, the beginning, where its
    header is, and the end: checkpoints of one shape differ there."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        weights = file.suffix in _SUFFIXES or file == path
        if not file.is_file() or not (weights or file.name in _CONFIGS):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name if file != path else ''} {size}\n".encode())
        with file.open("rb") as stream:
            if not weights:
                digest.update(stream.read())
                continue
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
