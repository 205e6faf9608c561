"""Writes a made-up checkpoint of a shape, to measure how fast it loads: python benchmarks/checkpoint.py qwen2-7b FOLDER

Random bfloat16 weights in safetensors files, as a model hub has them. `ingle bench startup FOLDER` then says how long
they take to load; from the disk itself after `sync; echo 3 > /proc/sys/vm/drop_caches`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ingle.model.load import load_decoder
from ingle.model.registry import decoder_config
from ingle.weights.formats import PlainFormat
from ingle.weights.hf_config import read_config
from ingle.weights.tensor_sources import DummySource

SHAPES = Path(__file__).parent / "shapes"
SHARD_BYTES = 4 << 30


class Recorder(DummySource):
    """Learns which tensors a model asks for, and gives none."""

    def __init__(self) -> None:
        super().__init__(0)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def load_into(self, name: str, out: torch.Tensor) -> None:
        self.shapes[name] = tuple(out.shape)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the order in which a checkpoint would have them."""
    config, device, dtype = decoder_config(read_config(folder)), torch.device("cpu"), torch.bfloat16
    recorder = Recorder()
    load_decoder(config, recorder, matrices=PlainFormat(dtype, device), dtype=dtype, device=device, max_model_len=1)
    return dict(sorted(recorder.shapes.items()))


def write(shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, shape in shapes.items():
        if num_bytes > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += 2 * torch.Size(shape).numel()
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
        print(f"{folder / file}: {len(names)} tensors", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shape", help=f"a folder with config.json, or one of {sorted(p.name for p in SHAPES.iterdir())}"
    )
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    shape = SHAPES / options.shape if (SHAPES / options.shape).is_dir() else Path(options.shape)
    options.folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(shape / "config.json", options.folder)
    write(shapes_of(shape), options.folder)


if __name__ == "__main__":
    main()
