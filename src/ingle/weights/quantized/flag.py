"""`--quantization`, which vLLM's users give: what the checkpoint is, or what one of floats is to be rounded to."""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ConfigError
from ingle.weights.quantized.scheme import Quantization, Target

_CALLED: dict[str, str] = {
    "GPTQ": "gptq gptq_marlin gptq_marlin_24 gptqmodel gptq_bitblas gptq-int4 gptq-int8 marlin exllama moe_wna16",
    "AWQ": "awq awq_marlin cpu_awq awq_triton ipex moe_wna16",
    "AutoRound": "auto-round auto_round autoround inc gptq gptq_marlin awq awq_marlin",
    "FP8": "fp8 fbgemm_fp8 deepspeedfp8 blockwise_fp8 block_fp8 w8a8_fp8",
    "ModelOpt": "modelopt modelopt_fp8 modelopt_fp4 modelopt_mixed nvfp4 petit_nvfp4",
    "bitsandbytes": "bitsandbytes bnb bitsandbytes-nf4 bitsandbytes-fp4 load_in_4bit load_in_8bit nf4",
    "MXFP4": "mxfp4 gpt_oss_mxfp4",
    "Quark": "quark quark_int4fp8_moe",
    "compressed-tensors": "compressed-tensors compressed_tensors sparseml w8a8_int8 w8a8_fp8 wna16",
}
"""What the flags of vLLM, SGLang and TGI call each method."""
_METHODS = {name: {method for method, names in _CALLED.items() if name in names.split()}
            for name in " ".join(_CALLED.values()).split()}  # fmt: skip
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
    if quantization is not None and quantization.method in _METHODS.get(wanted, ()):
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
