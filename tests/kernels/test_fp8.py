"""Products of FP8 with FP8, against float64 of what both stand for, and of what the inputs were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ingle.kernels.coded import Coded
from ingle.kernels.gpu import fp8, fp8_few
from ingle.kernels.gpu.fp8_rows import GROUP, quantize
from ingle.kernels.gpu.scaled import Product
from tests.kernels.fused import DEVICE, ON_GPU
from tests.kernels.test_coded import exact_product, made


def inputs(num_rows: int, size_in: int) -> torch.Tensor:
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, size_in, device=DEVICE)
    x[0] *= 100
    x[1, :GROUP] = 0
    x[-1, 5] = 300  # which its group's others are small beside
    return x.half()


def stands_for(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    size = values.shape[1]
    return values.double() * scales.double().repeat_interleave(size if scales.shape[1] == 1 else GROUP, 1)[:, :size]


def in_blocks(size_out: int, size_in: int) -> Coded:
    """With scales that 128 rows have in common."""
    coded = made("fp8", size_out, size_in, GROUP)
    scales = coded.scales[:: GROUP // 2].repeat_interleave(GROUP, 0)[:size_out]
    return Coded.of("fp8", coded.codes, scales.float(), None, GROUP, quantizes_inputs=True)


FEW = [
    (3, 40, 320, 1), (16, 72, 640, 3), (37, 72, 320, 2),
    *([(rows, *size, 0) for rows in (3, 16, 36, 256) for size in ((4608, 3584), (3584, 18944))] * ON_GPU),
]  # fmt: skip


@pytest.mark.parametrize("num_rows, size_out, size_in, num_splits", FEW)
@pytest.mark.parametrize("exact", [False, True])
def test_products_of_a_few_rows(
    num_rows: int, size_out: int, size_in: int, num_splits: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one program a tile, by several, and as they are shared out on a GPU."""
    if num_splits:
        monkeypatch.setattr(fp8_few, "tiling", lambda *sizes: fp8_few.Tiling(64, num_splits, 128, 2, most_rows=32))
    coded, rows = made("fp8", size_out, size_in, size_in), quantize(inputs(num_rows, size_in))
    bias = torch.randn(size_out, device=DEVICE).half()
    ours = fp8_few.multiply(rows, coded, bias, torch.float16, exact=exact)
    exactly = exact_product(stands_for(*rows), coded) + bias.double()
    assert float((ours.double() - exactly).norm() / exactly.norm()) < 3e-3
    assert not fp8_few.counters(coded.codes.device).any()


def test_which_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = made("fp8", 64, 128, 128)
    assert not fp8_few.suits(16, coded) or ON_GPU
    monkeypatch.setattr(fp8_few, "pdl", lambda device: True)
    assert fp8_few.suits(16, coded) and not fp8_few.suits(17, coded)
    monkeypatch.setattr(fp8_few, "_WIDE", 64)
    assert fp8_few.suits(64, coded) and not fp8_few.suits(65, coded)


@pytest.mark.parametrize("biased", [True, False])
def test_scales_behind_a_product(biased: bool) -> None:
    sums, rows, outs = (torch.randn(*shape, device=DEVICE) for shape in ((3, 40), (3, 1), (1, 40)))
    bias = torch.randn(40, device=DEVICE) if biased else None
    expected = sums * rows * outs + (bias if biased else 0)
    torch.testing.assert_close(fp8.finished(Product(sums.clone(), rows, outs, bias), torch.float32), expected)
    halves = fp8.finished(Product(sums, rows, outs, bias), torch.float16)
    torch.testing.assert_close(halves, expected.half())
    alone = fp8.finished(Product(sums, None, None, bias), torch.float16)
    torch.testing.assert_close(alone, (sums + (bias if biased else 0)).half())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 17, 33, 256, 1025])
@pytest.mark.parametrize("size_out, size_in", [(64, 256), (8192, 256), (4608, 3584), (256, 18944)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_the_library(num_rows: int, size_out: int, size_in: int, dtype: torch.dtype) -> None:
    coded = replace(made("fp8", size_out, size_in, size_in), quantizes_inputs=True)
    x, bias = inputs(num_rows, size_in).to(dtype), torch.randn(size_out, device=DEVICE).to(dtype)
    assert fp8.suits(x, coded)
    rows = stands_for(*quantize(x))
    for added in (bias, None):
        exact = exact_product(rows, coded) + (0 if added is None else added.double())
        ours = fp8.multiply(x, coded, added)
        assert ours.dtype == dtype
        assert float((ours.double() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size_in, numbers, off",
    [(3584, "random", 3e-3), (3584, "some large", 3.5e-3), (3584, "of one sign", 0.08),
     (18944, "random", 2.5e-3), (18944, "some large", 3e-3), (18944, "of one sign", 5e-3)],
)  # fmt: skip
def test_sums_that_grow(size_in: int, numbers: str, off: float) -> None:
    """Up to `fp8.FAST_INPUTS` what each addition cuts off adds up; bfloat16 itself rounds by 0.17 % of random sums."""
    codes = torch.randint(0, 256, (64, size_in), dtype=torch.uint8, device=DEVICE) & 0xB7 | 8  # 2**-6 to 2**1, signed
    x = torch.randn(32, size_in, device=DEVICE)
    if numbers == "some large":
        x[:, [7, 70, 700]] *= torch.tensor([300.0, 100.0, 30.0], device=DEVICE)
    if numbers == "of one sign":
        codes, x = codes % 8 + 56, x.abs() / 4 + 1  # 1 to 2
    coded = Coded.of("fp8", codes, torch.ones(64, 1, device=DEVICE), None, size_in, quantizes_inputs=True)
    rows = x.bfloat16()
    exact = exact_product(stands_for(*quantize(rows)), coded)
    ours = fp8.multiply(rows, coded, None)
    assert float((ours.double() - exact).norm() / exact.norm()) < off


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [17, 256, 1030])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_by_the_library(num_rows: int, dtype: torch.dtype) -> None:
    coded, x = in_blocks(384, 1024), inputs(num_rows, 1024).to(dtype)
    bias = torch.randn(384, device=DEVICE).to(dtype)
    assert fp8.suits(x, coded)
    exact = exact_product(stands_for(*quantize(x, GROUP)), coded) + bias.double()
    ours = fp8.multiply(x, coded, bias)
    assert float((ours.double() - exact).norm() / exact.norm()) < 5e-3


def test_scales_of_rows_need_no_conversion() -> None:
    """Which would be a kernel for each product."""
    made_so = made("fp8", 16, 64, 64)
    held = (made_so.codes, made_so.scales, None, 64)
    assert made_so.scales.dtype == torch.float16
    assert Coded.of("fp8", *held, quantizes_inputs=True).scales.dtype == torch.float32


def test_blocks_are_found() -> None:
    coded = in_blocks(384, 512)
    assert coded.blocks is not None and torch.equal(coded.blocks, coded.scales[::128])
    assert Coded.of("fp8", coded.codes, coded.scales, None, GROUP).blocks is None  # of weights that stand alone
    other = coded.scales.clone()
    other[200, 1] += 1
    assert Coded.of("fp8", coded.codes, other, None, GROUP, quantizes_inputs=True).blocks is None
    assert Coded.of("fp8", coded.codes[:300], other[:300], None, GROUP, quantizes_inputs=True).blocks is None


def test_what_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = replace(made("fp8", 16, 256, 256), quantizes_inputs=True)
    grouped = replace(made("fp8", 16, 256, 128), quantizes_inputs=True)
    many = torch.zeros(128, 256, dtype=torch.bfloat16, device=DEVICE)
    assert fp8.suits(many, coded) == ON_GPU and not fp8.suits(many[:1], coded)
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    assert fp8.suits(many, coded) and not fp8.suits(many.float(), coded)
    assert not fp8.suits(many, grouped)
    monkeypatch.setattr(fp8, "scales_blocks", lambda device: True)
    blocks = in_blocks(128, 512)
    assert fp8.suits(many, blocks) and not fp8.suits(many[:16], blocks)
    assert not fp8.suits(many, in_blocks(128, 384))
    monkeypatch.setattr(fp8, "scales_blocks", lambda device: False)
    assert not fp8.suits(many, blocks)
    assert not fp8.suits(many, replace(coded, quantizes_inputs=False))
    assert not fp8.suits(many, replace(made("int8", 16, 256, 256), quantizes_inputs=True))
    monkeypatch.setattr(fp8, "ENABLED", False)
    assert not fp8.suits(many, coded)
