"""One row times codes by the integers of Hopper's tensor cores, and what is fused to it, against float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Rotation
from ingle.kernels.gpu import coded_vector
from ingle.kernels.gpu.device import has_warpgroups
from ingle.model.layers import RMSNorm
from ingle.weights.gguf_coded import coded_of
from tests.kernels.fused import DEVICE, EPS, ON_GPU, check_projection, norm_weight, randn
from tests.kernels.test_coded import made
from tests.weights.test_gguf_coded import stored

coded_row = pytest.importorskip("ingle.kernels.gpu.coded_row")
on_hopper = pytest.mark.skipif(not ON_GPU or not has_warpgroups(DEVICE), reason="needs a Hopper card")
SIZES_IN = [768, 3584]
"""In units of 128 columns and of 512."""


def of_type(kind: str) -> Callable[[int, int], Coded]:
    return lambda size_out, size_in: coded_of(stored(kind, size_out, size_in)[0], DEVICE)


MATRICES: dict[str, Callable[[int, int], Coded]] = {
    "int4": lambda size_out, size_in: made("int4", size_out, size_in, 128),
    "int4-zeros": lambda size_out, size_in: made("int4", size_out, size_in, 128, zeros=True),
    "int4-rows": lambda size_out, size_in: made("int4", size_out, size_in, size_in, zeros=True),
    "Q4_K": of_type("Q4_K"),
}


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((ours.float() - exact).norm() / exact.norm())
    assert error < 4e-3, f"off by {error:.1e} of the norm"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size_in", SIZES_IN)
@pytest.mark.parametrize("kind", MATRICES)
def test_add(kind: str, size_in: int) -> None:
    weight, x, bias, residual = MATRICES[kind](192, size_in), randn(1, size_in), randn(192), randn(1, 192)
    x[0, 100], x[0, 64:96] = 30, 0
    total = x.float() @ weight.decoded(slice(None), torch.float32).T
    for shape in ((1, 4), (1, 8), (2, 8)):
        for added, exact in ((None, total), (residual, total + bias.float() + residual.float())):
            out = torch.empty_like(residual)
            own = None if added is None else bias
            coded_row.run_by(coded_row.Tiling(*shape), x, None, weight, own, 0, out, residual=added)
            near(out, exact)
    assert coded_row.tiling(x, weight, 0, None) is not None
    near(coded_vector.add(x, weight, bias, residual), total + bias.float() + residual.float())
    x[0, 40] = torch.inf
    assert coded_vector.add(x, weight, bias, residual).isnan().all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", [kind for kind in MATRICES if kind != "Q4_K"])
def test_project_and_store(kind: str) -> None:
    x, norm, heads = randn(1, 3584), RMSNorm(norm_weight(3584), EPS), MATRICES[kind](8 * 64, 3584)

    def project(_: torch.Tensor, bias: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        assert coded_row.tiling(x, heads, 1, rotation) is not None
        return coded_vector.project_and_store(x, norm, [heads], bias, rotation)

    normed = reference.rms_norm(x.float(), norm.weight.float(), EPS)
    weight = heads.decoded(slice(None), torch.float32)
    check_projection(project, normed, 64, qk_norm=False, weight=weight, tolerance=4e-3)


def test_fits() -> None:
    x = randn(1, 768).half()
    assert all(coded_row.fits(x, make(64, 768)) for make in MATRICES.values())
    others = made("int4", 64, 768, 64), made("int8", 64, 768, 128), of_type("Q6_K")(64, 768)
    assert not any(coded_row.fits(x, each) for each in others)
    assert not coded_row.fits(randn(2, 768).half(), MATRICES["int4"](64, 768))
    assert coded_row.tiling(x, MATRICES["int4"](64, 768), 2, None) is None
