"""A mixture of experts in place of a decoder's MLP, and where its weights lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ingle import kernels
from ingle.kernels.flow import ExpertBiases, Flow
from ingle.kernels.group import Group
from ingle.kernels.options import Activation, RouterConfig
from ingle.model.architecture import MoeConfig
from ingle.model.layers import GatedMLP, Parameter, RMSNorm
from ingle.model.loader import Loader
from ingle.model.mixture_names import bias_of, mixture_names
from ingle.weights.experts import Experts
from ingle.weights.source import ExpertNames


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
    router_bias: torch.Tensor | None = None
    """[num_experts]"""
    expert_biases: ExpertBiases | None = None
    group: Group | None = None
    """Ranks that have shares of every expert: `add_to` adds up what they give."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, E] to [T, E]"""
        logits = F.linear(x.to(self.router.dtype), self.router, self.router_bias)
        expert_ids, weights = kernels.of(x).route(logits, self.selection_bias, self.config)
        out = self.experts(x, expert_ids, weights, self.activation, self.expert_biases)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(F.linear(x, self.shared_gate)) * shared
        return out + shared

    def add_to(self, flow: Flow, norm: RMSNorm, post_norm: RMSNorm | None) -> Flow:
        """As `GatedMLP.add_to`."""
        run = kernels.of(flow.residual)
        return run.add(self(run.normed(flow)), flow, norm, post_norm, self.group)

    def expert_parameters(self) -> Iterator[Parameter]:
        return self.experts.parameters()

    def parameters(self) -> Iterator[Parameter]:
        yield self.router
        yield from self.experts.parameters()
        for tensor in (self.selection_bias, self.shared_gate, self.router_bias):
            if tensor is not None:
                yield tensor
        yield from self.expert_biases or ()
        if self.shared is not None:
            yield from self.shared.parameters()


def load_moe(config: MoeConfig, load: Loader, prefix: str, hidden_size: int, activation: Activation) -> SparseMoe:
    """The mixture of experts of the layer whose names begin with `prefix`."""
    num_experts, shared_size = config.router.num_experts, config.shared_intermediate_size
    names = mixture_names(load.source, config, prefix)
    router_load = load.as_float32() if config.float32_router else load
    return SparseMoe(
        config=config.router,
        router=router_load.tensor(names.router, num_experts, hidden_size),
        selection_bias=load.as_float32().tensor(names.selection_bias, num_experts) if config.selection_bias else None,
        experts=load.matrices.load_experts(load.source, names.experts, hidden_size, config.intermediate_size),
        activation=activation,
        shared=load.gated_mlp(
            [name.removesuffix(".weight") for name in names.shared.gate_up],
            names.shared.down.removesuffix(".weight"),
            hidden_size,
            shared_size,
            activation,
            reduced=False,
        )
        if shared_size
        else None,
        shared_gate=load.tensor(names.shared_gate, 1, hidden_size) if config.shared_gate else None,
        router_bias=router_load.tensor(names.router_bias, num_experts) if config.router_bias else None,
        expert_biases=_expert_biases(config, load, names.experts, hidden_size) if config.expert_biases else None,
        group=load.group,
    )


def _expert_biases(config: MoeConfig, load: Loader, names: Sequence[ExpertNames], hidden_size: int) -> ExpertBiases:
    inner, num_experts = config.intermediate_size, len(names)
    gate_up, down = load.empty(num_experts, 2 * inner), load.empty(num_experts, hidden_size).zero_()
    adds_down = load.group is None or load.group.place == 0  # for what ranks give is added up
    for expert, of_expert in enumerate(names):
        for name, part in zip(of_expert.gate_up, gate_up[expert].chunk(len(of_expert.gate_up)), strict=True):
            load.source.load_into(bias_of(name), part)
        if adds_down:
            load.source.load_into(bias_of(of_expert.down), down[expert])
    return ExpertBiases(gate_up, down)
