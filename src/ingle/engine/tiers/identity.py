"""Which model keys and values were computed by: all on which they depend but the tokens, in 16 bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ingle.config import EngineConfig
from ingle.engine.startup import Loaded, Numerics, OpenModel
from ingle.engine.tiers import IDENTITY_BYTES
from ingle.model.rope import length_notice
from ingle.parallel.layout import Layout
from ingle.version import __version__
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES

_HEAD_BYTES = 1 << 20
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


def identity(config: EngineConfig, opened: OpenModel, numerics: Numerics, loaded: Loaded, layout: Layout) -> bytes:
    """Differs where the weights do, the configuration, the types, how pages are laid out and divided, or ingle's
    version.

    Weights are known by the size and time of their files, their headers and samples of their numbers: to read all of
    them would take as long as to load the model. Which kernels multiply is not part of it: they differ by rounding, as
    steps of other sizes do.
    """
    kv, limits = loaded.facts.kv, loaded.memory.limits
    parts = [
        __version__,
        sys.byteorder,
        "gpu" if loaded.facts.on_gpu else "cpu",
        repr((kv, limits.page_size)),
        repr((numerics.dtype, numerics.kv_dtype, numerics.product_dtype)),
        repr((sorted(numerics.kept_types), numerics.float_itemsize)),
        json.dumps(opened.files.hf_config, sort_keys=True, default=repr),
        repr(opened.decoder),
        repr(opened.rounding),
        _length(opened, limits.max_model_len),
    ]
    if layout.num_ranks > 1:
        parts.append(repr((layout, config.parallel.pipeline_layers)))
    digest = hashlib.blake2b(digest_size=IDENTITY_BYTES)
    for part in parts:
        digest.update(part.encode(errors="surrogatepass") + b"\0")
    if config.weights.load_format == "dummy":
        digest.update(f"dummy {config.seed}".encode())
    else:
        for piece in _pieces(opened):
            digest.update(piece)
    return digest.digest()


def _length(opened: OpenModel, max_model_len: int) -> str:
    """The longest sequence, where rotations depend on it, or may."""
    ropes = () if opened.decoder is None else opened.decoder.ropes
    depends = opened.decoder is None or any(length_notice(rope, max_model_len) is not None for rope in ropes)
    return str(max_model_len) if depends else ""


def _pieces(opened: OpenModel) -> Iterator[bytes]:
    """Of the weights' files."""
    for path in _files(opened):
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            yield f"{path.name} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape")
            yield os.pread(file.fileno(), _HEAD_BYTES, 0)
            for number in range(_NUM_SAMPLES):
                yield os.pread(file.fileno(), _SAMPLE_BYTES, found.st_size * number // _NUM_SAMPLES)
            yield os.pread(file.fileno(), _SAMPLE_BYTES, max(found.st_size - _SAMPLE_BYTES, 0))


def _files(opened: OpenModel) -> list[Path]:
    path, gguf = opened.files.path, opened.files.gguf
    if gguf is not None:
        return sorted({path, *(tensor.path for tensor in gguf.tensors.values())})
    return sorted({file for files in (SAFETENSORS_FILES, TORCH_FILES) for file in files.paths(path)})
