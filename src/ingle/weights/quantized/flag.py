"""`--quantization`, which vLLM's users give: what the checkpoint is, or what one of floats is to be rounded to."""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ConfigError
from ingle.weights.quantized.scheme import Quantization, Target

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
    "mxfp4": "MXFP4",
    "gpt_oss_mxfp4": "MXFP4",
    "gptq_bitblas": "GPTQ",
    "compressed-tensors": "compressed-tensors",
}
"""By what vLLM's flag calls them."""
_NOTHING = ("auto", "none", "")
_ROUNDED: dict[str, Target] = {"int4": "int4", "int8": "int8", "fp8": "fp8", "ptpc_fp8": "fp8"}
_INSTEAD = "give int4, int8 or fp8, which rounds the weights while they are loaded"


def check_flag(value: str | None, path: Path, quantization: Quantization | None) -> Target | None:
    """What the weights of the model at `path` are to be rounded to.

    Raises `ConfigError` for a value that is neither that nor what the model is.
    """
    wanted = "" if value is None else value.strip().lower()
    if wanted in _NOTHING or (wanted == "gguf" and not path.is_dir()):
        return None
    if quantization is not None and _METHODS.get(wanted) == quantization.method:
        return None
    alternative = "leave the flag out"
    if not path.is_dir():
        is_so = "a GGUF file, whose tensors say how each is stored"
    elif quantization is not None:
        is_so = f"quantized already: {quantization.name}"
    elif wanted in _ROUNDED:
        return _ROUNDED[wanted]
    elif wanted in _METHODS or wanted == "gguf":
        is_so, alternative = "not quantized", f"leave the flag out, or {_INSTEAD}"
    else:
        is_so, alternative = "not quantized, and ingle does not quantize so", _INSTEAD
    raise ConfigError(f"--quantization {value}: {path} is {is_so}", alternative=alternative)
