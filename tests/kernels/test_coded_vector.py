"""Products of one or two rows with matrices of codes and what is fused to them, against plain operators in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.gpu import coded_vector
from ingle.kernels.gpu.coded import multiply_coded
from ingle.kernels.gpu.coded_vector import Tiling
from ingle.kernels.gpu.device import counters
from ingle.model.layers import RMSNorm
from ingle.weights.gguf_coded import TYPES, coded_of
from tests.kernels.fused import DEVICE, EPS, ON_GPU, TOLERANCE, check_projection, close, norm_weight, randn
from tests.kernels.test_coded import made
from tests.weights.test_gguf_coded import stored

SIZE_IN = 768  # no power of two of chunks
TILING = coded_vector.tiling


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


QUICK = ["int4", "Q2_K", "Q4_K", "Q6_K", "MXFP4"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in MATRICES if kind not in QUICK]


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Inputs keep 16 bits of the largest."""
    error = float((ours.float() - exact).norm() / exact.norm())
    assert error < max(TOLERANCE, 2e-4), f"off by {error:.1e} of the norm"


@pytest.fixture(autouse=True)
def tilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several tiles a program, and of chunks that there are not."""

    def tiling(coded: Coded, num_sms: int, num_rows: int, *, paired: bool, whole: bool) -> Tiling:
        return Tiling(2 if paired else 4, 32, 1, 2, 1) if whole else Tiling(4, 16, 2, 3, 1)

    monkeypatch.setattr(coded_vector, "tiling", tiling)


@pytest.mark.parametrize("kind", MATRICES if ON_GPU else QUICK + SLOW)
def test_add(kind: str) -> None:
    weight, x, bias, residual = MATRICES[kind](7), randn(2, SIZE_IN), randn(7), randn(2, 7)
    assert coded_vector.suits(x.half(), [weight])
    total = x.float() @ weight.decoded(slice(None), torch.float32).T
    if ON_GPU:
        near(coded_vector.multiply(x[:1], weight, None), total[:1])
    near(coded_vector.add(x, weight, bias, residual), total + bias.float() + residual.float())
    assert not counters(DEVICE).any()


def test_more_rows() -> None:
    """Two at a time, where nothing faster reads them."""
    weight, x = MATRICES["Q6_K"](7), randn(5, SIZE_IN).half()
    assert not coded_vector.fits(x, weight)
    exact = x.float() @ weight.decoded(slice(None), torch.float32).T
    close(multiply_coded(x, weight, None), exact, max(TOLERANCE, 1e-3))


def test_gated() -> None:
    weight, x, norm = MATRICES["Q4_K"](2 * 6), randn(2, SIZE_IN), RMSNorm(norm_weight(SIZE_IN), EPS)
    normed = reference.rms_norm(x.float(), norm.weight.float(), EPS)
    both = normed @ weight.decoded(slice(None), torch.float32).T
    near(coded_vector.gated(x, norm, weight, None, "silu"), reference.gated(both, "silu"))


@pytest.mark.parametrize("qk_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_project_and_store(qk_norm: bool) -> None:
    """Of a matrix whose values are stored in another type than its queries and keys."""
    x, norm = randn(2, SIZE_IN), RMSNorm(norm_weight(SIZE_IN), EPS)
    normed = reference.rms_norm(x.float(), norm.weight.float(), EPS)
    parts = MATRICES["Q4_K"](6 * 8), MATRICES["Q6_K"](2 * 8)
    check_projection(
        lambda _, bias, rotation: coded_vector.project_and_store(x, norm, parts, bias, rotation), normed, 8,
        qk_norm=qk_norm, weight=torch.cat([part.decoded(slice(None), torch.float32) for part in parts]),
        tolerance=max(TOLERANCE, 2e-4),
    )  # fmt: skip


def test_a_tile_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of programs that have no second tile."""

    def tiling(coded: Coded, num_sms: int, num_rows: int, *, paired: bool, whole: bool) -> Tiling:
        tiles = -(-coded.num_rows // 4)
        return Tiling(2 if paired else 4, 32, 1, tiles, 1) if whole else Tiling(4, 16, 2, tiles, 1)

    monkeypatch.setattr(coded_vector, "tiling", tiling)
    test_add("int4")
    test_gated()
    test_project_and_store(False)


@pytest.mark.parametrize("not_a_number", [torch.inf, torch.nan])
def test_inputs_that_are_no_numbers(not_a_number: float) -> None:
    """Make their rows NaN and no others; chunks of zeros stay zeros."""
    weight, x = MATRICES["Q4_0"](8), randn(2, SIZE_IN)
    x[0, 40], x[1, :64] = not_a_number, 0
    out = coded_vector.multiply(x, weight, None)
    assert out[0].isnan().all()
    near(out[1:], x[1:].float() @ weight.decoded(slice(None), torch.float32).T)


def test_tilings() -> None:
    for size_out, size_in in ((4608, 3584), (37888, 3584), (3584, 18944), (152064, 3584), (256, 896), (8192, 28672)):
        one = made("int4", 1, size_in, 32)
        coded = replace(one, codes=one.codes.expand(size_out, -1), scales=one.scales.expand(size_out, -1))
        for paired in (False, True):
            shape = TILING(coded, 132, 1, paired=paired, whole=paired)
            assert shape.chunks * shape.num_splits * 32 >= size_in and (shape.num_splits == 1 or not paired)
            assert shape.num_programs <= len(counters(DEVICE)) and shape.num_warps <= 16
