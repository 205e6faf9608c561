"""What latent attention keeps of a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.device.torch.device import TorchDevice
from ingle.engine.memory import plan_memory
from ingle.model.registry import decoder_config
from tests.model.checkpoints import CHECKPOINTS
from tests.support import engine_for, greedy, random_prompt, save_checkpoint

V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_token_takes_what_the_paper_counts() -> None:
    """512 + 64 numbers in each of 27 layers, of two bytes each."""
    decoder = decoder_config(V2_LITE)
    assert decoder.kv_spec("bfloat16").token_bytes == 27 * 576 * 2
    config = EngineConfig.of("", block_size=16, max_model_len=4096)
    memory = plan_memory(config, decoder, decoder.kv_spec("bfloat16"), on_gpu=True, budget=1 << 30, free=None)
    assert memory.kv_cache_bytes == memory.num_pages * 16 * 27 * 576 * 2
    assert memory.num_pages == (1 << 30) // (16 * 27 * 576 * 2)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3-yarn"])
def test_the_cache_holds_latents_alone(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    engine = engine_for(save_checkpoint(tmp_path, model_type, **overrides), block_size=8, cpu_kernels="torch")
    assert isinstance(engine.worker.device, TorchDevice)
    cache = engine.worker.device.kv_cache.pages
    assert cache.shape == (2, 1, cache.shape[2], 8, 1, 32 + 8)
    greedy(engine, random_prompt(0, 20), 4)
    written = cache.flatten(2, 3).count_nonzero(-1)[:, 0, :, 0]
    assert (written[written > 0] == 40).all() and ((written > 0).sum(dim=1) == 20 + 4 - 1).all()
