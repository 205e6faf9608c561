"""A mixture of experts in place of a decoder's MLP, and where its weights lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ingle import kernels
from ingle.model.architecture import Activation, MoeConfig, RouterConfig
from ingle.model.layers import GatedMLP, Parameter

if TYPE_CHECKING:
    from ingle.model.load import Loader


@dataclass(frozen=True)
class SparseMoe:
    """A token passes its best experts (https://arxiv.org/abs/2101.03961), and the shared one where there is one."""

    config: RouterConfig
    router: torch.Tensor
    """[num_experts, E]"""
    selection_bias: torch.Tensor | None
    """float32 [num_experts]"""
    gate_up: torch.Tensor
    """[num_experts, 2 * I, E]: of each expert the gate's rows, then those of the up projection."""
    down: torch.Tensor
    """[num_experts, E, I]"""
    activation: Activation
    shared: GatedMLP | None
    shared_gate: torch.Tensor | None
    """[1, E]"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        run = kernels.of(x)
        logits = F.linear(x.to(self.router.dtype), self.router)
        expert_ids, weights = run.route(logits, self.selection_bias, self.config)
        out = run.experts(x, expert_ids, weights, self.gate_up, self.down, self.activation)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(F.linear(x, self.shared_gate)) * shared
        return out + shared

    @property
    def experts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_up, self.down

    def parameters(self) -> Iterator[Parameter]:
        yield from (self.router, *self.experts)
        for tensor in (self.selection_bias, self.shared_gate):
            if tensor is not None:
                yield tensor
        if self.shared is not None:
            yield from self.shared.parameters()


def load_moe(config: MoeConfig, load: Loader, prefix: str, hidden_size: int, activation: Activation) -> SparseMoe:
    """The mixture of experts of the layer whose names begin with `prefix`."""
    num_experts, shared_size = config.router.num_experts, config.shared_intermediate_size
    mlp = f"{prefix}.mlp" if f"{prefix}.mlp.gate.weight" in load.source else f"{prefix}.block_sparse_moe"
    shared = f"{mlp}.{config.shared_name}"
    router_load = load.as_float32() if config.float32_router else load
    bias_name = f"{mlp}.gate.e_score_correction_bias"
    gate_up, down = _load_experts(load, mlp, num_experts, config.intermediate_size, hidden_size)
    return SparseMoe(
        config=config.router,
        router=router_load.tensor(f"{mlp}.gate.weight", num_experts, hidden_size),
        selection_bias=load.as_float32().tensor(bias_name, num_experts) if config.selection_bias else None,
        gate_up=gate_up,
        down=down,
        activation=activation,
        shared=load.gated_mlp(
            [f"{shared}.gate_proj", f"{shared}.up_proj"], f"{shared}.down_proj", hidden_size, shared_size, activation
        )
        if shared_size
        else None,
        shared_gate=load.tensor(f"{mlp}.shared_expert_gate.weight", 1, hidden_size) if config.shared_gate else None,
    )


def _load_experts(
    load: Loader, mlp: str, num_experts: int, inner: int, hidden: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [num_experts, 2 * inner, hidden] and down [num_experts, hidden, inner], whichever way they are stored.

    Both in one tensor each, as transformers 5 holds them in memory; gate, up and down of all experts in one tensor
    each, as GGUF files store them; or a tensor for each expert, by the names of most checkpoints or by Mixtral's.
    """
    gate_up = load.empty(num_experts, 2 * inner, hidden)
    down = load.empty(num_experts, hidden, inner)
    source, experts = load.source, f"{mlp}.experts"
    if f"{experts}.gate_up_proj" in source:
        source.load_into(f"{experts}.gate_up_proj", gate_up)
        source.load_into(f"{experts}.down_proj", down)
    elif f"{experts}.gate_proj.weight" in source:
        source.load_into(f"{experts}.gate_proj.weight", gate_up[:, :inner])
        source.load_into(f"{experts}.up_proj.weight", gate_up[:, inner:])
        source.load_into(f"{experts}.down_proj.weight", down)
    else:
        names = ("w1", "w3", "w2") if f"{experts}.0.w1.weight" in source else ("gate_proj", "up_proj", "down_proj")
        for expert in range(num_experts):
            parts = (gate_up[expert, :inner], gate_up[expert, inner:], down[expert])
            for name, part in zip(names, parts, strict=True):
                source.load_into(f"{experts}.{expert}.{name}.weight", part)
    return gate_up, down
