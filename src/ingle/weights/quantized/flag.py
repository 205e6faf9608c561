"""`--quantization`, which vLLM's users give: it may name what the checkpoint is, and nothing else yet."""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ConfigError
from ingle.weights.quantized.scheme import Quantization

_METHODS = {
    "gptq": "GPTQ",
    "gptq_marlin": "GPTQ",
    "gptq_marlin_24": "GPTQ",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "awq_marlin": "AWQ",
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "modelopt": "ModelOpt",
    "modelopt_fp8": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "nvfp4": "ModelOpt",
    "bitsandbytes": "bitsandbytes",
    "bnb": "bitsandbytes",
    "inc": "AutoRound",
    "gptq_bitblas": "GPTQ",
    "compressed-tensors": "compressed-tensors",
}
"""By what vLLM's flag calls them."""
_NOTHING = ("auto", "none", "")


def check_flag(value: str | None, path: Path, quantization: Quantization | None) -> None:
    """Raises `ConfigError` for a value that is not what the model at `path` is."""
    wanted = "" if value is None else value.strip().lower()
    if wanted in _NOTHING or (wanted == "gguf" and not path.is_dir()):
        return
    if quantization is not None and _METHODS.get(wanted) == quantization.method:
        return
    if not path.is_dir():
        is_so = "a GGUF file, whose tensors say how each is stored"
    elif quantization is not None:
        is_so = f"quantized already: {quantization.name}"
    else:
        is_so = "not quantized, and this version quantizes nothing on load"
    raise ConfigError(f"--quantization {value}: {path} is {is_so}", alternative="leave the flag out")
