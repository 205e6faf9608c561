"""The first Qwen in plain PyTorch, from its report (https://arxiv.org/abs/2309.16609) and the code published with it.

transformers has no such model. This one keeps no cache: a forward pass over whole sequences is all there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 1024,
    "seq_length": 64,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 256,
}


def save_checkpoint(folder: Path, **overrides: Any) -> Path:
    """Random float32 weights under the names of the published checkpoints."""
    config = {**CONFIG, **overrides}
    torch.manual_seed(0)
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["kv_channels"]
    inner = config["intermediate_size"] // 2
    tensors = {
        "transformer.wte.weight": torch.randn(config["vocab_size"], hidden) * 0.08,
        "transformer.ln_f.weight": 1 + 0.3 * torch.randn(hidden),
        "lm_head.weight": torch.randn(config["vocab_size"], hidden) * 0.08,
    }
    for index in range(config["num_hidden_layers"]):
        shapes = {"attn.c_attn": (3 * heads, hidden), "attn.c_proj": (hidden, heads), "mlp.w1": (inner, hidden),
                  "mlp.w2": (inner, hidden), "mlp.c_proj": (hidden, inner)}  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"transformer.h.{index}.{name}.weight"] = torch.randn(shape) * 0.08
            if name == "attn.c_attn" or not config["no_bias"]:
                tensors[f"transformer.h.{index}.{name}.bias"] = torch.randn(shape[0]) * 0.3
        for name in ("ln_1", "ln_2"):
            tensors[f"transformer.h.{index}.{name}.weight"] = 1 + 0.3 * torch.randn(hidden)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Reference:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    def logits(self, token_ids: Sequence[int], prompt_length: int) -> torch.Tensor:
        """[len(token_ids), vocab_size]; the prompt's length fixes the rotary base for the answer too."""
        x = self.tensors["transformer.wte.weight"][list(token_ids)]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"transformer.h.{index}"
            x = x + self.attention(layer, self.norm(f"{layer}.ln_1", x), prompt_length)
            h = self.norm(f"{layer}.ln_2", x)
            h = self.linear(f"{layer}.mlp.w1", h) * F.silu(self.linear(f"{layer}.mlp.w2", h))
            x = x + self.linear(f"{layer}.mlp.c_proj", h)
        return self.norm("transformer.ln_f", x) @ self.tensors["lm_head.weight"].T

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids, len(prompt))[-1].argmax()))
        return ids[len(prompt) :]

    def attention(self, layer: str, x: torch.Tensor, prompt_length: int) -> torch.Tensor:
        count, head_dim = len(x), self.config["kv_channels"]
        q, k, v = self.linear(f"{layer}.attn.c_attn", x).chunk(3, dim=-1)
        q, k, v = (part.view(count, -1, head_dim).transpose(0, 1) for part in (q, k, v))
        q, k = self.rotate(q, prompt_length), self.rotate(k, prompt_length)
        length = self.config["seq_length"]
        if self.config["use_logn_attn"]:
            factors = [math.log(i, length) if i > length else 1 for i in range(1, count + 1)]
            q = q * torch.tensor(factors)[:, None]
        scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
        return self.linear(f"{layer}.attn.c_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def rotate(self, x: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """The two halves of each head's first dimensions are the two coordinates of points in the plane."""
        dim = int(self.config["kv_channels"] * self.config["rotary_pct"])
        alpha = 1
        if self.config["use_dynamic_ntk"]:
            doublings = math.ceil(math.log(prompt_length / self.config["seq_length"], 2) + 1)
            alpha = max(2**doublings - 1, 1)
        base = self.config["rotary_emb_base"] * alpha ** (dim / (dim - 2))
        inv_freq = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.arange(x.shape[1]).float()[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        first, second = x[..., : dim // 2], x[..., dim // 2 : dim]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., dim:]), dim=-1)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"])
        return x * scale * self.tensors[f"{name}.weight"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
