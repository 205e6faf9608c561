"""What an engine is told of the model that its device holds."""

from __future__ import annotations

from dataclasses import dataclass

from ingle.kv import KvSpec
from ingle.model.sizes import ModelConfig, WeightSizes


@dataclass(frozen=True)
class EngineFacts:
    """Sizes that plans, checks and measurements go by."""

    model: ModelConfig
    weights: WeightSizes
    on_gpu: bool
    kv: KvSpec
    num_devices: int = 1
    """That hold it together."""

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size
