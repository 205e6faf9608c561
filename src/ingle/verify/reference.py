"""References to verify against: transformers' modelling code, or ingle's own float32 path where it has none.

transformers reads a folder of float weights by itself. For a format that it does not read, its model is filled with
what ingle decodes: then the computation is independent of ours, and the decoding is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ingle.config import DType, EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.startup import ModelFiles
from ingle.errors import ModelError
from ingle.model.fallback import quiet_transformers, tie_missing_head
from ingle.verify.scores import Scores, score_by_engine, scores_of
from ingle.weights.hf_config import read_config
from ingle.weights.source import WeightSource, in_stack

_DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True)
class Reference:
    """A model that is taken to be right. It is loaded when it is asked, and gone when it has answered."""

    description: str
    score: Callable[[torch.dtype, Sequence[list[int]], Callable[[str], None]], list[Scores]]
    """Of sequences, computed in a type; progress is reported."""
    independent: bool
    """Whether it is other code than what is verified."""


def reference_for(config: EngineConfig, path: Path, device: torch.device) -> Reference:
    """What the model at `path` is compared with. Raises `ModelError` when it cannot be read."""
    hf_config = read_config(path)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = hf_config["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.weights.trust_remote_code:
        return Reference(
            f"ingle's own float32 path, since transformers has no model_type {kind!r}",
            lambda dtype, sequences, report: _by_engine(config, path, dtype, sequences),
            independent=False,
        )

    files = ModelFiles.read(config, path)
    reads_itself = path.is_dir() and files.quantization is None and files.rounded_to is None

    def score(dtype: torch.dtype, sequences: Sequence[list[int]], report: Callable[[str], None]) -> list[Scores]:
        report(f"loading transformers' model as {_name(dtype)}")
        with quiet_transformers():
            if reads_itself:
                model = _read_folder(config, path, dtype)
            else:
                model = _filled_model(config, files, hf_config, dtype)
        model = model.to(device).eval()
        return list(_by_transformers(model, device, sequences, report))

    what = "reading the folder itself" if reads_itself else "on the weights as ingle decodes them"
    return Reference(f"transformers' code for {kind!r}, {what}", score, independent=True)


@torch.inference_mode()
def _by_transformers(
    model: Any, device: torch.device, sequences: Sequence[list[int]], report: Callable[[str], None]
) -> Iterator[Scores]:
    for number, sequence in enumerate(sequences, 1):
        report(f"transformers' model: sequence {number} of {len(sequences)}")
        logits = model(torch.tensor([sequence], device=device), use_cache=False).logits[0]
        yield scores_of(logits, sequence)


def _by_engine(config: EngineConfig, path: Path, dtype: torch.dtype, sequences: Sequence[list[int]]) -> list[Scores]:
    weights = dataclasses.replace(config.weights, dtype=_DTYPES[dtype])
    plain = dataclasses.replace(config, weights=weights, max_num_seqs=1, enforce_eager=True)
    engine, _ = build_engine(plain, path)
    return score_by_engine(engine, sequences)


def _read_folder(config: EngineConfig, path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained
    model, report = read(
        path,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=config.weights.trust_remote_code,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"])
    tie_missing_head(model, missing)
    if missing:
        raise ModelError(f"{path}: transformers misses {len(missing)} tensors, such as {min(missing)}")
    return model


def _filled_model(config: EngineConfig, files: ModelFiles, hf_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model of a .gguf file or a quantized folder, each tensor decoded into place."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = ("model_type", "quantization_config", "compression_config")
    values = {key: value for key, value in hf_config.items() if key not in ours}
    factors = (values.get("rope_scaling") or {}).get("factors")
    if factors is not None:  # which transformers has no name for
        values["rope_scaling"] = None
    hf = AutoConfig.for_model(hf_config["model_type"], **values)
    make: Any = AutoModelForCausalLM.from_config
    model = make(hf, dtype=dtype, attn_implementation="eager")
    with contextlib.closing(files.opened(config)) as opened:
        source = opened.source
        for name, parameter in model.named_parameters():
            _fill(source, name, parameter.data, gate_and_up_alternate=hf_config["model_type"] == "gpt_oss")
    if factors is not None:
        rotary = model.get_decoder().rotary_emb
        rotary.inv_freq /= torch.tensor(factors)
    return model


def _fill(source: WeightSource, name: str, out: torch.Tensor, *, gate_and_up_alternate: bool) -> None:
    """transformers keeps the experts of a layer in one tensor, and gate and up projection one below the other; or, in
    gpt-oss, each output of the one before that of the other, and outputs as columns."""
    prefix, found, matrix = name.rpartition(".experts.")
    if not found:
        source.load_into(name, out)
        return
    both, kind = matrix.startswith("gate_up_proj"), "bias" if matrix.endswith("_bias") else "weight"
    projections = ("gate_proj", "up_proj") if both else (matrix.removesuffix("_bias"),)
    for index, expert in enumerate(out):
        parts = expert.chunk(len(projections))
        if gate_and_up_alternate:
            rows = expert if kind == "bias" else expert.T
            parts = (rows[0::2], rows[1::2]) if both else (rows,)
        for projection, part in zip(projections, parts, strict=True):
            own = f"{prefix}.experts.{index}.{projection}.{kind}"
            stacked = in_stack(f"{prefix}.experts.{projection}.{kind}", index, len(out))
            source.load_into(own if own in source else stacked, part)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
