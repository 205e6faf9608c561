"""A card that PyTorch has no code for, or that Triton does not support, is told before anything is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ingle import kernels
from ingle.config import EngineConfig
from ingle.engine import torch_build
from ingle.engine.gpu_card import Card, check_card, triton_notice
from ingle.errors import ConfigError
from ingle.parallel.group import Member
from ingle.parallel.layout import Layout

CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [
        ((6, 1), CUDA_12_6),  # by the binary for 6.0
        ((7, 0), CUDA_12_6),
        ((7, 5), CUDA_13),
        ((8, 9), CUDA_13),
        ((9, 0), CUDA_13),
        ((12, 1), CUDA_13),
        ((13, 0), CUDA_13),  # by PTX
        ((9, 0), ["sm_90a"]),
        ((10, 3), ["sm_100f"]),
        ((7, 0), []),  # a build that does not say
    ],
)
def test_cards_that_pytorch_has_code_for(capability: tuple[int, int], architectures: list[str]) -> None:
    check_card(Card("card", capability), architectures, "2.13.0")


@pytest.mark.parametrize(
    ("capability", "architectures", "advice"),
    [
        ((7, 0), CUDA_13, "whl/cu126"),
        ((6, 1), CUDA_13, "whl/cu126"),
        ((3, 7), CUDA_12_6, "no build that ingle runs with has; or give --device cpu"),
        ((10, 0), CUDA_12_6, "pip install --upgrade --force-reinstall torch"),
        ((12, 0), ["sm_90a", "sm_100a", "nonsense"], "pip install --upgrade"),
        ((9, 1), ["sm_90a"], "pip install --upgrade"),
    ],
)
def test_cards_that_it_has_none_for(capability: tuple[int, int], architectures: list[str], advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_card(Card("Tesla V100", capability), architectures, "2.13.0+cu130")
    told = str(refused.value)
    major, minor = capability
    assert f"Tesla V100, has compute capability {major}.{minor}, and PyTorch 2.13.0+cu130 has no code" in told
    assert advice in told and "\n" not in told


def test_the_advice_takes_a_pytorch_that_ingle_admits() -> None:
    with pytest.raises(ConfigError, match=re.escape("torch>=2.11,<2.15")):
        check_card(Card("V100", (7, 0)), CUDA_13, "2.13.0")


@pytest.mark.parametrize(("capability", "runs"), [((6, 1), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
@pytest.mark.parametrize("wanted", ["auto", "triton", "torch"])
def test_what_triton_does_not_support_runs_by_pytorchs_operators(
    capability: tuple[int, int], runs: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*CUDA_12_6, *CUDA_13])
    monkeypatch.setattr(kernels, "_with_triton", True)
    runner = torch_build.TorchRunner(EngineConfig.of("model", gpu_kernels=wanted), "cuda", our_kernels=False)
    with_triton = wanted == "triton" or (wanted == "auto" and runs)
    assert (runner._with_triton, kernels._with_triton) == (with_triton, with_triton)
    told = wanted == "auto" and not runs
    assert runner._card_notices == ([triton_notice(Card("a card", capability))] if told else [])


def test_a_card_without_code_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    with pytest.raises(ConfigError, match="V100"):
        torch_build.TorchRunner(EngineConfig.of("model"), "cuda", our_kernels=False)


@pytest.mark.parametrize(("others", "dtype"), [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_ranks_go_by_the_oldest_card_among_them(
    others: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of other types than the other ranks have would be wrong."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*CUDA_12_6, *CUDA_13])
    monkeypatch.setattr(kernels, "_with_triton", True)
    config, device = EngineConfig.of("model"), torch.device("cuda", 1)
    nobody: Any = None
    member = Member(Layout(2).place(1), device, nobody, nobody, nobody, capability=min(others, (8, 0)))
    runner = torch_build.TorchRunner(config, "cuda", our_kernels=False, member=member)
    assert torch_build.pick_dtype(config, {"torch_dtype": "bfloat16"}, runner._card)[0] == dtype
    assert runner._with_triton == (others >= (8, 0))
    assert [notice for notice in runner._card_notices if "another rank's GPU has" in notice] == runner._card_notices
