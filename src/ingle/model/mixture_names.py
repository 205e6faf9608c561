"""What a checkpoint calls the matrices of a mixture of experts, whichever way it stores them."""

from __future__ import annotations

from typing import NamedTuple

from ingle.model.architecture import MoeConfig
from ingle.weights.source import ExpertNames, WeightSource, in_stack


class MixtureNames(NamedTuple):
    """Of one layer."""

    router: str
    router_bias: str
    selection_bias: str
    experts: list[ExpertNames]
    shared: ExpertNames
    shared_gate: str


_ROUTERS = ("mlp.gate", "mlp.router", "block_sparse_moe.gate")


def bias_of(name: str) -> str:
    """Of the projection whose matrix has this name, maybe in a stack."""
    name, stacked, place = name.partition("[")
    return f"{name.removesuffix('.weight')}.bias{stacked}{place}"


def mixture_names(source: WeightSource, config: MoeConfig, layer: str) -> MixtureNames:
    """`layer` begins the names of a layer's tensors. What the configuration does not ask for need not be there."""
    router = next((name for name in _ROUTERS if f"{layer}.{name}.weight" in source), _ROUTERS[-1])
    mlp = f"{layer}.{router.rpartition('.')[0]}"
    shared = f"{mlp}.{config.shared_name}"
    return MixtureNames(
        router=f"{layer}.{router}.weight",
        router_bias=f"{layer}.{router}.bias",
        selection_bias=f"{mlp}.gate.e_score_correction_bias",
        experts=_expert_names(source, f"{mlp}.experts", config.router.num_experts),
        shared=ExpertNames((f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"), f"{shared}.down_proj.weight"),
        shared_gate=f"{mlp}.shared_expert_gate.weight",
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
