"""Products of up to 16 rows with FP8 matrices and what is fused to them, against plain operators in float32."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.flow import Flow
from ingle.kernels.gpu import fp8_lanes
from ingle.kernels.gpu.fp8_lanes import Tiling
from ingle.model.layers import RMSNorm
from tests.kernels.fused import DEVICE, EPS, check_projection, close, norm_weight, randn
from tests.kernels.test_coded import made
from tests.kernels.test_few_rows_coded import HEAD_DIM, SIZE_IN, exact, flowing


@pytest.fixture(params=[(1, 2, 1), (13, 4, 2)], ids=str)
def num_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, *shape = request.param
    monkeypatch.setattr(fp8_lanes, "tiling", lambda num_rows, size_in: Tiling(*shape))
    return int(rows)


def test_add(num_rows: int) -> None:
    weight, x, bias = made("fp8", 48, SIZE_IN, SIZE_IN), randn(num_rows, SIZE_IN), randn(48)
    residual, norm = randn(num_rows, 48), RMSNorm(torch.rand(48, device=DEVICE) + 0.5, EPS)
    total = x.float() @ exact(weight).T + bias.float() + residual.float()
    flow = fp8_lanes.add(x, weight, bias, residual, norm)
    close(flow.residual, total)
    assert flow.values is not None and flow.squares is not None
    close(flow.values, total * norm.weight)
    close(flow.squares.sum(1), total.square().sum(1))


def test_gated(num_rows: int) -> None:
    flow, normed = flowing(num_rows)
    weight = made("fp8", 2 * 24, SIZE_IN, SIZE_IN)
    total = reference.gated(normed @ exact(weight).T, "silu")
    for form in (flow, Flow(flow.residual, flow.norm)):
        close(fp8_lanes.gated(form, weight, None, "silu"), total)


def test_project_and_store(num_rows: int) -> None:
    flow, normed = flowing(num_rows)
    weight = made("fp8", 8 * HEAD_DIM, SIZE_IN, SIZE_IN)
    check_projection(
        lambda _, bias, rotation: fp8_lanes.project_and_store(flow, weight, bias, rotation), normed, HEAD_DIM,
        qk_norm=False, weight=exact(weight),
    )  # fmt: skip


def test_alone() -> None:
    coded, x, bias = made("fp8", 32, 336, 336), randn(3, 336), randn(32)
    close(fp8_lanes.multiply(x, coded, bias), x.float() @ exact(coded).T + bias.float())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, size_in", [(1, 3584), (2, 18944), (8, 3584), (16, 3584)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_types(dtype: torch.dtype, num_rows: int, size_in: int) -> None:
    """By the tilings themselves, of inputs that float16 would not hold."""
    coded = made("fp8", 512, size_in, size_in)
    x = torch.randn(num_rows, size_in, device=DEVICE).to(dtype)
    if dtype == torch.bfloat16:
        x[0, 7] = 3e5
    product = x.float() @ exact(coded).T
    close(fp8_lanes.multiply(x, coded, None), product)
    norm = norm_weight(512).to(dtype)
    residual = (1000 * torch.randn(num_rows, 512, device=DEVICE)).to(dtype)
    flow = fp8_lanes.add(x, coded, None, residual, RMSNorm(100 * norm, EPS))
    close(flow.residual, product + residual.float())
    wide = made("fp8", 64, 512, 512)
    normed = reference.rms_norm(flow.residual.float(), 100 * norm.float(), EPS)
    close(fp8_lanes.gated(flow, wide, None, "silu"), reference.gated(normed @ exact(wide).T, "silu"))


def test_what_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    coded, x = made("fp8", 32, 64, 64), torch.zeros(16, 64, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(fp8_lanes, "MAX_ROWS", 16)
    monkeypatch.setattr(fp8_lanes, "multiplies_fp8", lambda device: True)
    assert fp8_lanes.suits(x, coded) and not fp8_lanes.suits(torch.cat([x, x]), coded)
    assert not fp8_lanes.suits(x.float(), coded) and not fp8_lanes.suits(x, made("fp8", 32, 64, 32))
    assert not fp8_lanes.suits(x, made("int8", 32, 64, 64)) and not fp8_lanes.suits(x, made("fp8", 30, 64, 64))
    monkeypatch.setattr(fp8_lanes, "MAX_ROWS", 15)
    assert not fp8_lanes.suits(x, coded)
