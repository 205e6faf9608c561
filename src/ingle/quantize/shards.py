"""Safetensors files written tensor by tensor: no more than one is in memory (https://huggingface.co/docs/safetensors)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingle.quantize.entries import Entry

SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 8


def write_shards(folder: Path, entries: Sequence[Entry], written: Callable[[int], None]) -> int:
    """`written` is told the bytes so far. Returns those of all tensors."""
    shards, total, so_far = _split(entries), sum(entry.num_bytes for entry in entries), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for entry in shard:
                for tensor, made in zip(entry.tensors, entry.make(), strict=True):
                    assert made.nbytes == tensor.num_bytes, f"{tensor.name} has {made.nbytes} bytes"
                    file.write(np.ascontiguousarray(made).data)
                    weight_map[tensor.name] = name
                so_far += entry.num_bytes
                written(so_far)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _split(entries: Sequence[Entry]) -> list[list[Entry]]:
    """In order, each file as full as it may be; what is larger by itself has one of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.num_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        for tensor in entry.tensors:
            stop = start + tensor.num_bytes
            header[tensor.name] = {"dtype": tensor.type, "shape": list(tensor.shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
