"""The weights of a model by the format that its files have.

GGUF and safetensors are read without PyTorch for a CPU that multiplies what is stored as it is; the sources in
`tensor_sources` read by it.
"""

from __future__ import annotations

from pathlib import Path

from ingle.config import LoadFormat
from ingle.errors import ConfigError, ModelError
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_source import GgufSource
from ingle.weights.quantized.scheme import Quantization
from ingle.weights.quantized.source import QuantizedSource
from ingle.weights.single_experts import SingleExperts, lie_so
from ingle.weights.source import Files, WeightSource


def open_source(
    path: Path,
    load_format: LoadFormat,
    seed: int,
    *,
    gguf: GgufFile | None = None,
    quantization: Quantization | None = None,
) -> WeightSource:
    """The weights of the model at `path`, a Hugging Face folder or a GGUF file.

    `seed` is that of the random weights of `load_format` "dummy". `gguf` is the file at `path`, where somebody has read
    it already; `quantization` says what a folder's codes mean, and which of random weights are codes.
    Raises `ConfigError` when `load_format` does not fit what is there, `ModelError` when that cannot be read.
    """
    if load_format == "dummy":
        from ingle.weights.tensor_sources import DummySource

        return DummySource(seed, quantization)
    found = _found_format(path)
    if load_format not in ("auto", found):
        raise ConfigError(f"--load-format {load_format}: {path} is {found}; leave the flag out or give {found}")
    if found == "gguf":
        return GgufSource(gguf or GgufFile(path))
    if found == "safetensors":
        from ingle.weights.safetensors_source import SafetensorsSource

        files: Files = SafetensorsSource(path)
        if lie_so(files):
            files = SingleExperts(files)
        return files if quantization is None else QuantizedSource(files, quantization)
    if quantization is not None:
        raise ModelError(
            f"{path}: its weights are quantized ({quantization.name}) in PyTorch's files, which ingle reads from "
            "safetensors alone",
            alternative="convert them with safetensors, or give a folder that has them",
        )
    from ingle.weights.tensor_sources import TorchSource

    return TorchSource(path)


def _found_format(path: Path) -> LoadFormat:
    """A folder that has both kinds of files is read as safetensors."""
    if not path.is_dir():
        return "gguf"
    return "pt" if TORCH_FILES.are_in(path) and not SAFETENSORS_FILES.are_in(path) else "safetensors"
