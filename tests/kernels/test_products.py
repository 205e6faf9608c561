"""A gated MLP's first product with its activation, against the plain operators in float32."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.gpu.products import Tiling, multiply_gated, multiply_gated_by
from ingle.kernels.options import Activation

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-6


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    error = (ours.float() - exact).norm() / exact.norm()
    assert error < TOLERANCE, f"off by {float(error):.1e} of the norm"  # also where an element was not written: NaN


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("num_rows", [1, 32, 33, 70])
def test_every_row_and_column_is_there(num_rows: int, size: int, activation: Activation) -> None:
    torch.manual_seed(num_rows)
    x, weight = randn(num_rows, 200), randn(2 * size, 200) / 200**0.5  # 200: no multiple of what an iteration takes
    exact = reference.multiply_gated(x.float(), weight.float(), None, activation)
    close(multiply_gated_by(Tiling(rows=32, outs=32, depth=64, num_stages=3), x, weight, activation), exact)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_whichever_kernels_run(num_rows: int, with_bias: bool) -> None:
    torch.manual_seed(num_rows)
    x, weight = randn(num_rows, 128), randn(512, 128) / 128**0.5
    bias = randn(512) if with_bias else None
    exact = reference.multiply_gated(x.float(), weight.float(), None if bias is None else bias.float(), "silu")
    close(multiply_gated(x, weight, bias, "silu"), exact)
