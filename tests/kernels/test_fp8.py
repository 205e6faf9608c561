"""Products of FP8 with FP8, against float64 of what both stand for, and of what the inputs were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ingle.kernels.gpu import fp8
from ingle.kernels.gpu.fp8 import GROUP, Tiling
from tests.kernels.fused import DEVICE, ON_GPU
from tests.kernels.test_coded import exact_product, made


def inputs(num_rows: int, size_in: int) -> torch.Tensor:
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, size_in, device=DEVICE)
    x[0] *= 100
    x[1, :GROUP] = 0
    x[2, 5] = 300  # which its group's others are small beside
    return x.half()


def test_inputs() -> None:
    x = inputs(5, 328)  # the last group is shorter
    values, scales = fp8.quantized(x)
    spread = scales.repeat_interleave(GROUP, 1)[:, :328]
    back = values.float() * spread
    close = (back - x.float()).abs() <= spread * 16  # half a step of the largest numbers
    assert scales.shape == (5, 3)
    assert close.float().mean() >= (1 if ON_GPU else 0.95), "the interpreter loses what rounding carries over"
    assert not back[1, :GROUP].any()
    wide = torch.randn(2, 3, 328, device=DEVICE).half()[1]
    assert torch.equal(fp8.quantized(wide)[0].float(), fp8.quantized(wide.clone())[0].float())


@pytest.mark.parametrize("size_in, group_size", [(384, 128), (512, 256), (328, 328), (320, 128)])
def test_products(size_in: int, group_size: int) -> None:
    coded = made("fp8", 40, size_in, group_size)
    x, bias = inputs(19, size_in), torch.randn(40, device=DEVICE).half()
    ours = fp8.multiply_by(Tiling(32, 32, 4, 2) if not ON_GPU else Tiling(64, 64, 4, 3), x, coded, bias)
    values, scales = fp8.quantized(x)
    stands_for = values.double() * scales.double().repeat_interleave(GROUP, 1)[:, :size_in]
    exact = exact_product(stands_for, coded) + bias.double()
    assert float((ours.double() - exact).norm() / exact.norm()) < 3e-3
    of_inputs = exact_product(x, coded) + bias.double()
    assert float((ours.double() - of_inputs).norm() / of_inputs.norm()) < 0.08


def test_scales_behind_a_product() -> None:
    out, rows, outs, bias = torch.randn(3, 40), torch.rand(3, 1), torch.rand(1, 40), torch.randn(40)
    out, rows, outs, bias = (each.to(DEVICE) for each in (out, rows, outs, bias))
    expected = out * rows * outs + bias
    torch.testing.assert_close(fp8._scaled(out.clone(), rows, outs, bias), expected)
    assert fp8._scaled(out, rows, outs, None) is out


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [33, 256, 1025])
@pytest.mark.parametrize("size_out", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_the_library(num_rows: int, size_out: int, dtype: torch.dtype) -> None:
    coded = replace(made("fp8", size_out, 256, 256), quantizes_inputs=True)
    x, bias = inputs(num_rows, 256).to(dtype), torch.randn(size_out, device=DEVICE).to(dtype)
    assert fp8.suits(x, coded)
    values, scales = fp8.quantized(x, 256)
    for added in (bias, None):
        exact = exact_product(values.double() * scales.double(), coded) + (0 if added is None else added.double())
        ours = fp8.multiply(x, coded, added)
        assert ours.dtype == dtype
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-2


def test_what_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = replace(made("fp8", 16, 256, 256), quantizes_inputs=True)
    grouped = replace(made("fp8", 16, 256, 128), quantizes_inputs=True)
    many = torch.zeros(128, 256, dtype=torch.bfloat16, device=DEVICE)
    assert fp8.suits(many, coded) == ON_GPU and not fp8.suits(many[:8], coded)
    assert not fp8.suits(many, grouped)
    monkeypatch.setattr(fp8, "BY_GROUPS", True)
    assert fp8.suits(many, grouped) == ON_GPU
    assert not fp8.suits(many, replace(coded, quantizes_inputs=False))
    assert not fp8.suits(many, replace(made("fp8", 16, 256, 64), quantizes_inputs=True))
    assert not fp8.suits(many, replace(made("int8", 16, 256, 256), quantizes_inputs=True))
