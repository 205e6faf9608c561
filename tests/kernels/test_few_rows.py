"""Products of a few rows with what is fused to them, against the plain operators in float32."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.flow import Flow
from ingle.kernels.gpu import few_rows
from ingle.kernels.gpu.device import counters
from ingle.kernels.gpu.few_rows import Tiling
from ingle.kernels.options import Activation
from ingle.model.layers import RMSNorm
from tests.kernels.fused import DEVICE, DTYPE, EPS, check_projection, close, norm_weight, randn, weights

SIZE_IN = 200  # no multiple of what an iteration takes


@pytest.fixture(params=[(1, 1, 64), (1, 3, 16), (5, 2, 64), (16, 1, 32)], ids=lambda p: "{}x{}x{}".format(*p))
def num_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, splits, outs = request.param

    def tiling(size_in: int, size_out: int, outs: int, *, paired: bool, num_sms: int) -> Tiling:
        return Tiling(outs, splits, 64, 3, 64)

    monkeypatch.setattr(few_rows, "tiling", tiling)
    monkeypatch.setattr(few_rows, "_OUTS", outs)
    torch.manual_seed(rows)
    return int(rows)


def flowing(num_rows: int) -> tuple[Flow, torch.Tensor]:
    """Rows on their way to a norm, their squares in four pieces; and what the norm makes of them."""
    residual, norm = randn(num_rows, SIZE_IN), norm_weight(SIZE_IN)
    wide = residual.float()
    squares = wide.square().view(num_rows, 4, -1).sum(-1)
    flow = Flow(residual, RMSNorm(norm, EPS), (wide * norm.float()).to(DTYPE), squares)
    return flow, reference.rms_norm(wide, norm.float(), EPS)


@pytest.mark.parametrize("size_out", [64, 96])
def test_add(num_rows: int, size_out: int) -> None:
    x, weight, bias = randn(num_rows, SIZE_IN), weights(size_out, SIZE_IN), randn(size_out)
    residual, norm = randn(num_rows, size_out), RMSNorm(torch.rand(size_out, device=DEVICE) + 0.5, EPS)
    exact = x.float() @ weight.float().T + bias.float() + residual.float()
    flow = few_rows.add(x, weight, bias, residual, norm)
    close(flow.residual, exact)
    assert flow.norm is norm and flow.values is not None and flow.squares is not None
    close(flow.values, exact * norm.weight)
    close(flow.squares.sum(1), exact.square().sum(1))
    close(few_rows.add(x, weight, None, residual, norm).residual, exact - bias.float())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [64, 72])
def test_gated(num_rows: int, size: int, activation: Activation) -> None:
    flow, normed = flowing(num_rows)
    weight = weights(2 * size, SIZE_IN)
    exact = reference.gated(normed @ weight.float().T, activation)
    done = Flow(flow.residual, flow.norm, normed.to(DTYPE))
    for form in (flow, done, Flow(flow.residual, flow.norm)):
        close(few_rows.gated(form, weight, None, activation), exact)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_project_and_store(num_rows: int, qk_norm: bool) -> None:
    flow, normed = flowing(num_rows)
    check_projection(
        lambda weight, bias, rotation: few_rows.project_and_store(flow, weight, bias, rotation), normed, 128,
        qk_norm=qk_norm,
    )  # fmt: skip


def test_the_counters_are_left_at_zero() -> None:
    assert not counters(DEVICE).any()


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("size_out", [64, 576, 3584, 37888])
@pytest.mark.parametrize("size_in", [64, 576, 3584, 18944])
def test_tilings_fill_the_device_once(size_in: int, size_out: int, paired: bool) -> None:
    outs, splits, depth, *_ = few_rows.tiling(size_in, size_out, 64, paired=paired, num_sms=132)
    num_tiles = -(-size_out // (outs * (1 + paired)))
    assert 1 <= splits <= -(-size_in // depth), "a split without inputs"
    assert splits == 1 or splits * num_tiles <= 132
