"""Every family in every format gives what its decoded self gives, by both devices of a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.errors import ModelError
from tests.model import qwen1
from tests.model.test_quantized import FORMATS, PROMPT, off
from tests.support import engine_for, engine_logits, save_checkpoint
from tests.weights.quantized.packers import installed

pytestmark = pytest.mark.slow

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "n_shared_experts": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
            "v_head_dim": 16, "first_k_dense_replace": 1, "q_lora_rank": 32}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen": {"intermediate_size": 192},  # of both halves
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 30, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 30},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**MOE, "head_dim": 32},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
}
_KEPT = re.compile(r"embed_tokens|lm_head|wte|norm|\bgate\.weight|shared_expert_gate|router")
_STACKED = re.compile(r"(.*experts)\.(gate_up_proj|down_proj)$")


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked experts one by one, as quantizers store them."""
    split = {}
    for name, tensor in tensors.items():
        match = _STACKED.match(name)
        if match is None:
            split[name] = tensor
            continue
        for expert, each in enumerate(tensor):
            parts = {"gate_proj": each.chunk(2)[0], "up_proj": each.chunk(2)[1]} if "gate" in match[2] else {
                "down_proj": each}  # fmt: skip
            split |= {f"{match[1]}.{expert}.{part}.weight": piece.clone() for part, piece in parts.items()}
    return split


def write(tmp_path: Path, family: str, name: str) -> tuple[Path, Path]:
    """The decoded checkpoint and the quantized one, of which one layer's projection stays what it is."""
    if family == "qwen":
        plain = qwen1.save_checkpoint(tmp_path / "plain", **FAMILIES[family])
    else:
        plain = save_checkpoint(tmp_path / "plain", family, **{"intermediate_size": 96, **FAMILIES[family]})
    tensors = apart(load_file(plain / "model.safetensors"))
    stored: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    quantized = 0
    for seed, (key, tensor) in enumerate(sorted(tensors.items())):
        module = key.removesuffix(".weight")
        if tensor.dim() != 2 or _KEPT.search(key) or key.endswith("layers.1.self_attn.o_proj.weight"):
            stored[key] = tensor.contiguous()
            continue
        written = FORMATS[name](*tensor.shape, seed)
        quantized, settings = quantized + 1, written.settings
        stored |= {f"{module}.{each}": part.contiguous() for each, part in written.tensors.items()}
        tensors[key] = torch.from_numpy(written.exact).float()
    assert quantized >= 6
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, plain / "model.safetensors")
    coded = tmp_path / "coded"
    coded.mkdir()
    save_file(stored, coded / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain, coded


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path: Path, family: str, name: str) -> None:
    if not installed(name):
        pytest.skip("compressed-tensors is not installed")
    plain, coded = write(tmp_path, family, name)
    expected = engine_logits(engine_for(plain), PROMPT)
    assert off(engine_logits(engine_for(coded), PROMPT), expected) < 2e-5
    has_experts = "moe" in family or family in ("mixtral", "deepseek_v2", "deepseek_v3")
    length = 8 if has_experts else len(PROMPT)  # up to where rounding chooses other experts
    kept = engine_logits(engine_for(coded, dtype="auto"), PROMPT[:length])
    assert off(kept, expected[:length]) < 0.03
    try:
        by_pytorch = engine_for(coded, cpu_kernels="torch")
    except ModelError as error:
        assert has_experts and "runs no mixture of such yet" in str(error)
        return
    assert off(engine_logits(by_pytorch, PROMPT), expected) < 2e-5
