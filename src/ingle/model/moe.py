"""A mixture of experts in place of a decoder's MLP, and where its weights lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ingle import kernels
from ingle.model.architecture import Activation, MoeConfig, RouterConfig
from ingle.model.layers import GatedMLP, Parameter
from ingle.model.loader import Loader
from ingle.weights.experts import ExpertNames, Experts
from ingle.weights.source import WeightSource, in_stack


@dataclass(frozen=True)
class SparseMoe:
    """A token passes its best experts (https://arxiv.org/abs/2101.03961), and the shared one where there is one."""

    config: RouterConfig
    router: torch.Tensor
    """[num_experts, E]"""
    selection_bias: torch.Tensor | None
    """float32 [num_experts]"""
    experts: Experts
    activation: Activation
    shared: GatedMLP | None
    shared_gate: torch.Tensor | None
    """[1, E]"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x.to(self.router.dtype), self.router)
        expert_ids, weights = kernels.of(x).route(logits, self.selection_bias, self.config)
        out = self.experts(x, expert_ids, weights, self.activation)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(F.linear(x, self.shared_gate)) * shared
        return out + shared

    def parameters(self) -> Iterator[Parameter]:
        yield self.router
        yield from self.experts.parameters()
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
    names = _expert_names(load.source, f"{mlp}.experts", num_experts)
    return SparseMoe(
        config=config.router,
        router=router_load.tensor(f"{mlp}.gate.weight", num_experts, hidden_size),
        selection_bias=load.as_float32().tensor(bias_name, num_experts) if config.selection_bias else None,
        experts=load.matrices.load_experts(load.source, names, hidden_size, config.intermediate_size),
        activation=activation,
        shared=load.gated_mlp(
            [f"{shared}.gate_proj", f"{shared}.up_proj"], f"{shared}.down_proj", hidden_size, shared_size, activation
        )
        if shared_size
        else None,
        shared_gate=load.tensor(f"{mlp}.shared_expert_gate.weight", 1, hidden_size) if config.shared_gate else None,
    )


def _expert_names(source: WeightSource, experts: str, num_experts: int) -> list[ExpertNames]:
    """Whichever way they are stored.

    Gate and up of all experts in one tensor and down in another, as transformers 5 holds them in memory; three tensors,
    as GGUF files store them; or three for each expert, by the names of most checkpoints or by Mixtral's.
    """
    if f"{experts}.gate_up_proj" in source:
        gate_up, down = [f"{experts}.gate_up_proj"], f"{experts}.down_proj"
    elif f"{experts}.gate_proj.weight" in source:
        gate_up, down = [f"{experts}.gate_proj.weight", f"{experts}.up_proj.weight"], f"{experts}.down_proj.weight"
    else:
        gate, up, down = (
            ("w1", "w3", "w2") if f"{experts}.0.w1.weight" in source else ("gate_proj", "up_proj", "down_proj")
        )
        return [
            ExpertNames((f"{experts}.{i}.{gate}.weight", f"{experts}.{i}.{up}.weight"), f"{experts}.{i}.{down}.weight")
            for i in range(num_experts)
        ]
    return [
        ExpertNames(tuple(in_stack(name, i, num_experts) for name in gate_up), in_stack(down, i, num_experts))
        for i in range(num_experts)
    ]
