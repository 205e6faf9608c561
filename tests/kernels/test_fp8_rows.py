"""Rows that become FP8 as they are made, against the plain operators and what their results are in FP8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.flow import Quantized
from ingle.kernels.gpu import fp8_rows
from ingle.kernels.gpu.fp8_rows import GROUP
from ingle.kernels.gpu.scaled import Product
from ingle.model.layers import RMSNorm
from tests.kernels.fused import DEVICE, EPS, ON_GPU
from tests.kernels.interpreted import exact_fp8

DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)
SIZES = (3584, 18944, 328, 16) if ON_GPU else (4100, 328)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def special(x: torch.Tensor) -> torch.Tensor:
    """With a row of zeros, one of the largest numbers, and one of a number that all others are small beside."""
    x[0] = 0
    x[1] *= 2.0**13
    x[2, 3] = 3e4
    return x


def check(ours: Quantized, exact: torch.Tensor, group: int) -> None:
    """What it stands for is within a step of FP8 of what it should be, and each scale that of the largest number."""
    num_rows, size = exact.shape
    width = group or size
    padded = torch.nn.functional.pad(exact.float(), (0, -size % width)).view(num_rows, -1, width)
    largest = padded.abs().amax(-1)
    assert ours.values.dtype == torch.float8_e4m3fn and ours.values.shape == exact.shape
    assert ours.scales.shape == largest.shape and ours.scales.stride(0) == 1
    assert ours.scales.shape[1] > 1 or ours.scales.stride(1) == 1
    rtol = max(2 * torch.finfo(exact.dtype).eps, 1e-2)
    torch.testing.assert_close(ours.scales, largest.clamp(min=1e-20) / 448, rtol=rtol, atol=0)
    scales = ours.scales.repeat_interleave(width, 1)[:, :size]
    values = ours.values.float()
    assert values.isfinite().all()
    wanted = exact.float() / scales
    step = torch.exp2((wanted.abs().clamp(min=2.0**-6)).log2().floor() - 3)
    kind = torch.finfo(exact.dtype)  # in which what becomes FP8 is rounded a few times
    rounded = 4 * kind.eps * wanted.abs() + 4 * kind.smallest_normal * kind.eps / scales
    assert ((values - wanted).abs() <= 0.501 * step + rounded).all()


@pytest.fixture(autouse=True)
def rounded_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not ON_GPU:
        exact_fp8(monkeypatch)


@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_rows(size: int, group: int, dtype: torch.dtype) -> None:
    x = special(randn(5, size)).to(dtype)
    ours = fp8_rows.quantize(x, group)
    check(ours, x, group)
    assert not ours.values[0].float().any()
    apart = torch.stack([x, x], 1)[:, 1]  # rows that do not lie side by side
    for one, other in zip(fp8_rows.quantize(apart, group), ours, strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scaled, biased", [(True, True), (False, False), (False, True)])
def test_gated(size: int, group: int, scaled: bool, biased: bool) -> None:
    """Of sums that still have to be multiplied with their scales, and of products."""
    dtype, activation = DTYPES[scaled], ("gelu_tanh" if biased else "silu")
    sums, rows, outs = randn(4, 2 * size), torch.rand(4, 1, device=DEVICE) + 0.5, torch.rand(1, 2 * size) + 0.5
    outs, bias = outs.to(DEVICE), randn(2 * size, dtype=dtype) if biased else None
    sums[0] = 0
    sums = sums.to(torch.bfloat16 if ON_GPU else dtype)
    product = Product(sums, rows if scaled else None, outs if scaled else None, bias)
    exact = sums.float() * (rows * outs if scaled else 1) + (bias.float() if bias is not None else 0)
    ours = fp8_rows.gated(product, randn(1, dtype=dtype), activation, group)
    check(ours, reference.gated(exact, activation).to(dtype), group)


@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normed_rows(size: int, group: int, dtype: torch.dtype) -> None:
    residual, norm = special(randn(4, size)).to(dtype), RMSNorm(randn(size, dtype=dtype), EPS)
    before = residual.clone()
    check(fp8_rows.normed_rows(residual, norm, group), reference.rms_norm(residual, norm.weight, EPS), group)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scaled, biased, post", [(True, True, False), (True, False, True), (False, False, False)])
def test_add_normed(size: int, group: int, scaled: bool, biased: bool, post: bool) -> None:
    dtype = DTYPES[biased]
    residual, norm = special(randn(4, size)).to(dtype), RMSNorm(randn(size, dtype=dtype), EPS)
    post_norm = RMSNorm(randn(size, dtype=torch.float32 if group else dtype), EPS) if post else None
    sums, rows, outs = randn(4, size), torch.rand(4, 1, device=DEVICE) + 0.5, torch.rand(1, size, device=DEVICE) + 0.5
    sums[0], bias = 0, randn(size, dtype=dtype) if biased else None
    product = Product(
        sums.to(torch.bfloat16 if ON_GPU else dtype), rows if scaled else None, outs if scaled else None, bias
    )
    added = product.sums.float() * (rows * outs if scaled else 1) + (bias.float() if bias is not None else 0)
    if post_norm is not None:
        added = reference.rms_norm(added.to(dtype), post_norm.weight, EPS).float()
    total = (residual.float() + added).to(dtype)
    ours = fp8_rows.add_normed(product, residual, norm, post_norm, group)
    rounded = torch.finfo(dtype).eps * torch.maximum(added.abs(), total.float().abs())  # one sum or the other
    assert ((residual.float() - total.float()).abs() <= 2 * rounded).all()
    check(ours, reference.rms_norm(residual, norm.weight, EPS), group)


@pytest.mark.parametrize("make", [fp8_rows.quantize, lambda x: fp8_rows.normed_rows(x, RMSNorm(x[0] * 0 + 1, EPS))])
def test_no_rows(make: Callable[[torch.Tensor], Quantized]) -> None:
    x = torch.ones(1, 32, dtype=DTYPES[0], device=DEVICE)
    assert make(x).values.shape == (1, 32)


def test_rows_that_the_library_takes() -> None:
    """A multiple of 16 of them, of which the first are those that were made, and scales side by side."""
    rows = fp8_rows.quantize(randn(17, 328).half(), GROUP)
    whole = fp8_rows.padded(rows)
    assert whole.values.shape == (32, 328) and whole.values.is_contiguous()
    assert whole.scales.shape == (32, 3) and whole.scales.stride() == (1, 32)
    assert all(torch.equal(all_of[:17].float(), part.float()) for all_of, part in zip(whole, rows, strict=True))
