"""Products of a few rows with matrices of codes and what is fused to them, against plain operators in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow
from ingle.kernels.gpu import few_rows_coded as few_rows
from ingle.kernels.gpu.few_rows_coded import Tiling
from ingle.model.layers import RMSNorm
from tests.kernels.fused import DEVICE, DTYPE, EPS, check_projection, close, norm_weight, randn
from tests.kernels.test_coded import made

SIZE_IN = 448  # no multiple of what an iteration takes
MATRICES: dict[str, Callable[[int], Coded]] = {
    "int4": lambda size_out: made("int4", size_out, SIZE_IN, 32, zeros=True),
    "int4-rows": lambda size_out: made("int4", size_out, SIZE_IN, SIZE_IN),
    "int8": lambda size_out: made("int8", size_out, SIZE_IN, 64),
    "fp8": lambda size_out: made("fp8", size_out, SIZE_IN, 64),
    "fp8-rows": lambda size_out: made("fp8", size_out, SIZE_IN, SIZE_IN),
}


@pytest.fixture(params=MATRICES)
def matrix(request: pytest.FixtureRequest) -> Callable[[int], Coded]:
    return MATRICES[request.param]


@pytest.fixture(params=[(1, 3), (16, 1)], ids=str)
def num_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, splits = request.param

    def tiling(coded: Coded, num_rows: int, *, paired: bool, num_sms: int) -> Tiling:
        return Tiling(1 if paired else 2, 2, splits, codes_ahead=1 + splits % 2, inputs_ahead=splits % 2)

    monkeypatch.setattr(few_rows, "tiling", tiling)
    return int(rows)


def flowing(num_rows: int) -> tuple[Flow, torch.Tensor]:
    """Rows on their way to a norm, their squares in two pieces; and what the norm makes of them."""
    residual, norm = randn(num_rows, SIZE_IN), norm_weight(SIZE_IN)
    wide = residual.float()
    squares = wide.square().view(num_rows, 2, -1).sum(-1)
    flow = Flow(residual, RMSNorm(norm, EPS), (wide * norm.float()).to(DTYPE), squares)
    return flow, reference.rms_norm(wide, norm.float(), EPS)


def exact(coded: Coded) -> torch.Tensor:
    return coded.decoded(slice(None), torch.float32)


def test_add(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    weight, x, bias = matrix(72), randn(num_rows, SIZE_IN), randn(72)
    residual, norm = randn(num_rows, 72), RMSNorm(torch.rand(72, device=DEVICE) + 0.5, EPS)
    total = x.float() @ exact(weight).T + bias.float() + residual.float()
    flow = few_rows.add(x, weight, bias, residual, norm)
    close(flow.residual, total)
    assert flow.values is not None and flow.squares is not None
    close(flow.values, total * norm.weight)
    close(flow.squares.sum(1), total.square().sum(1))


def test_gated(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    flow, normed = flowing(num_rows)
    weight = matrix(2 * 72)
    total = reference.gated(normed @ exact(weight).T, "silu")
    for form in (flow, Flow(flow.residual, flow.norm)):
        close(few_rows.gated(form, weight, None, "silu"), total)


def test_project_and_store(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    flow, normed = flowing(num_rows)
    weight = matrix(8 * 64)
    check_projection(
        lambda _, bias, rotation: few_rows.project_and_store(flow, weight, bias, rotation), normed, 64, qk_norm=False,
        weight=exact(weight),
    )  # fmt: skip


@pytest.mark.gpu
def test_codes_suit_on_hopper() -> None:
    x = torch.zeros(2, SIZE_IN, dtype=torch.bfloat16, device=DEVICE)
    assert all(few_rows.suits(x, make(8)) for make in MATRICES.values())
    assert not few_rows.suits(x, made("int8", 8, SIZE_IN, 32, order=True))
