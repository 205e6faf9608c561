"""Products of one or two rows with matrices of codes and what is fused to them, against plain operators in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.gpu import coded_vector
from ingle.kernels.gpu.coded_vector import Tiling
from ingle.model.layers import RMSNorm
from ingle.weights.gguf_coded import TYPES, coded_of
from tests.kernels.fused import DEVICE, DTYPE, EPS, TOLERANCE, check_projection, norm_weight, randn
from tests.kernels.test_coded import made
from tests.weights.test_gguf_coded import stored

SIZE_IN = 768  # no multiple of what an iteration takes


def of_type(kind: str) -> Callable[[int], Coded]:
    def make(size_out: int) -> Coded:
        return coded_of(stored(kind, size_out, SIZE_IN)[0], DEVICE)

    return make


MATRICES: dict[str, Callable[[int], Coded]] = {
    "int4": lambda size_out: made("int4", size_out, SIZE_IN, 128, zeros=True),
    "int4-rows": lambda size_out: made("int4", size_out, SIZE_IN, SIZE_IN),
    "int8": lambda size_out: made("int8", size_out, SIZE_IN, 64),
    **{kind: of_type(kind) for kind in TYPES},
}


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Inputs keep 16 bits of the largest."""
    error = float((ours.float() - exact).norm() / exact.norm())
    assert error < max(TOLERANCE, 5e-5), f"off by {error:.1e} of the norm"


@pytest.fixture(autouse=True)
def tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_vector, "tiling", lambda *_, **__: Tiling(4, 2, 16, 1))


@pytest.mark.parametrize("kind", MATRICES)
def test_add(kind: str) -> None:
    weight, x, bias, residual = MATRICES[kind](27), randn(2, SIZE_IN), randn(27), randn(2, 27)
    assert coded_vector.suits(x.half(), [weight])
    total = x.float() @ weight.decoded(slice(None), torch.float32).T
    for rows in (1, 2):
        near(coded_vector.multiply(x[:rows], weight, None), total[:rows])
    near(coded_vector.add(x, weight, bias, residual), total + bias.float() + residual.float())
