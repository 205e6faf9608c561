from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ingle.weights.quantized import layouts
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import Module
from ingle.weights.safetensors_source import SafetensorsSource
from tests.weights.quantized.packers import CASES, Written, installed

Read = Callable[[Written], Groups]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Callable[[int, int], Written]:
    if not installed(request.param):
        pytest.skip("compressed-tensors is not installed")
    return CASES[request.param]


@pytest.fixture
def module_of(tmp_path: Path) -> Callable[[Written], Module]:
    """The layer `m` of a file that has its tensors."""

    def make(written: Written, **changes: torch.Tensor | None) -> Module:
        tensors = {name: tensor for name, tensor in {**written.tensors, **changes}.items() if tensor is not None}
        named = {f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, tmp_path / "model.safetensors")
        return Module("m", written.scheme, SafetensorsSource(tmp_path))

    return make


@pytest.fixture
def read(module_of: Callable[[Written], Module]) -> Read:
    return lambda written: layouts.read(module_of(written), *written.exact.shape)
