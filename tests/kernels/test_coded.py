"""Products with matrices of codes, against the decoded matrix in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ingle.kernels import reference_coded
from ingle.kernels.coded import Coded, CodedKind
from ingle.kernels.gpu import coded as gpu
from ingle.kernels.gpu import decoded
from ingle.kernels.gpu.coded import Tiling
from ingle.kernels.gpu.codes import FORMATS, suits
from ingle.kernels.gpu.device import counters
from tests.kernels.fused import DEVICE, ON_GPU

DTYPES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16, torch.float32)
"""The interpreter multiplies bfloat16 wrongly."""
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6}


def made(
    kind: CodedKind,
    size_out: int,
    size_in: int,
    group_size: int,
    *,
    zeros: bool = False,
    order: bool = False,
    seed: int = 0,
) -> Coded:
    torch.manual_seed(seed)
    groups, width = -(-size_in // group_size), size_in // FORMATS[kind].columns_per_byte
    codes = torch.randint(0, 256, (size_out, width), dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
        codes[0, :16] = torch.arange(16)  # those without an exponent
    per_code = {"int4": 8, "int8": 128, "fp8": 100}[kind]
    scales = (torch.rand(size_out, groups) + 0.5) / per_code / size_in**0.5
    some = torch.randint(0, 2 * per_code, (size_out, groups), dtype=torch.uint8) if zeros else None
    return Coded.of(
        kind, codes.to(DEVICE), scales.half().to(DEVICE), None if some is None else some.to(DEVICE), group_size,
        torch.randperm(size_in).to(DEVICE) if order else None,
    )  # fmt: skip


def with_steps(kind: CodedKind, size_out: int, size_in: int, group_size: int, *, minima: bool) -> Coded:
    """Scales, and minima, in small integers under a factor for each 256 columns, as GGUF's larger blocks have them."""
    base = made(kind, size_out, size_in, group_size)
    groups, blocks = size_in // group_size, size_in // 256
    lows = torch.randint(0, 64, (size_out, groups), dtype=torch.uint8, device=DEVICE) if minima else None
    signed = (0, 64, torch.uint8) if minima else (-64, 64, torch.int8)
    steps = torch.randint(*signed[:2], (size_out, groups), dtype=signed[2], device=DEVICE)

    def factors(sign: int) -> torch.Tensor:
        return (sign * (torch.rand(size_out, blocks, device=DEVICE) + 0.5) * 1e-3).half()

    return replace(base, scales=steps, factors=factors(1), minima=lows, minimum_factors=factors(-8) if minima else None)


def exact_product(x: torch.Tensor, coded: Coded) -> torch.Tensor:
    return coded.ordered(x).double() @ coded.decoded(slice(None), torch.float64).T


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < TOLERANCES[dtype], f"off by {float(error):.1e} of the norm"


CASES: list[tuple[CodedKind, int, int, bool]] = [
    ("int4", 384, 128, False), ("int4", 384, 128, True), ("int4", 320, 64, True), ("int4", 224, 32, False),
    ("int4", 416, 416, False), ("int8", 384, 128, False), ("int8", 200, 200, True), ("int8", 96, 32, True),
    ("fp8", 384, 128, False), ("fp8", 200, 200, False), ("fp8", 208, 16, False), ("fp8", 320, 128, False),
]  # fmt: skip
"""Kind, inputs, group size, whether groups have zeros."""
SHAPES = [Tiling(16, 32, 64, 4, 3, 3), Tiling(64, 64, 32, 4, 2, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: tuple[CodedKind, int, int, bool], dtype: torch.dtype) -> None:
    kind, size_in, group_size, zeros = case
    coded = made(kind, 40, size_in, group_size, zeros=zeros)
    bias = torch.randn(40, device=DEVICE).to(dtype)
    x = torch.randn(5, size_in, device=DEVICE).to(dtype)
    exact = exact_product(x, coded)
    close(reference_coded.multiply_coded(x, coded, None), exact, dtype)
    assert suits(coded)
    for shape in SHAPES:
        close(gpu.multiply_by(shape, x, coded, None), exact, dtype)
    close(gpu.multiply_by(SHAPES[0], x[:3], coded, bias), exact[:3] + bias.double(), dtype)
    assert not counters(DEVICE).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, group_size, minima", [("int4", 32, True), ("int8", 16, False), ("int8", 32, True)])
def test_steps(kind: CodedKind, group_size: int, minima: bool, dtype: torch.dtype) -> None:
    coded = with_steps(kind, 40, 512, group_size, minima=minima)
    x = torch.randn(5, 512, device=DEVICE).to(dtype)
    exact = exact_product(x, coded)
    close(reference_coded.multiply_coded(x, coded, None), exact, dtype)
    for shape in (*SHAPES, Tiling(16, 32, 16, 4, 3, 2)):
        close(gpu.multiply_by(shape, x, coded, None), exact, dtype)
    assert coded.span == 256 // group_size


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64, 128, 1000] if ON_GPU else [3, 17, 100])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_of_rows(kind: CodedKind, num_rows: int) -> None:
    """By the tilings themselves, and with inputs in another order."""
    coded = made(kind, 136 if ON_GPU else 40, 256, 64, order=True, zeros=kind != "fp8")
    x = torch.randn(2, num_rows, 256, device=DEVICE).half()[1]
    close(gpu.multiply_coded(x, coded, None), exact_product(x, coded), torch.float16)


@pytest.mark.parametrize("case", [("int4", 256, 64, True), ("int8", 200, 200, True), ("fp8", 208, 16, False)], ids=str)
def test_by_a_scratch(case: tuple[CodedKind, int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes some rows of the matrix at a time."""
    kind, size_in, group_size, zeros = case
    scratch = torch.empty(20 * size_in, dtype=torch.float16, device=DEVICE)
    monkeypatch.setattr(decoded, "_scratch", lambda device, dtype: scratch)
    coded, x = made(kind, 48, size_in, group_size, zeros=zeros), torch.randn(7, size_in, device=DEVICE).half()
    bias = torch.randn(48, device=DEVICE).half()
    close(decoded.multiply(x, coded, bias), exact_product(x, coded) + bias.double(), torch.float16)
    assert torch.equal(decoded.multiply(x, coded, None)[:, :20], x @ coded.decoded(slice(0, 20), torch.float16).T)


def test_what_no_kernel_reads() -> None:
    """Odd groups of codes that share bytes: plain operators multiply them, by chunks."""
    coded = made("int4", 24, 72, 9)
    assert not suits(coded) and suits(made("int4", 24, 72, 8))
    x = torch.randn(3, 5, 72, device=DEVICE)
    close(gpu.multiply_coded(x, coded, None), exact_product(x, coded), torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_tilings(kind: CodedKind) -> None:
    for size_in, size_out, group_size in ((3584, 4608, 128), (3584, 37888, 128), (18944, 3584, 64), (896, 128, 32)):
        coded = made(kind, 8, size_in, group_size)
        wide = Coded(
            kind, coded.codes.expand(size_out // 8, 8, -1).flatten(0, 1), coded.scales, None, group_size, coded.half
        )
        for num_rows in (1, 16, 17, 64, 65, 1000):
            shape = gpu.tiling(num_rows, wide, 132, 228 << 10)
            tiles = -(-size_out // shape.outs) * -(-num_rows // shape.rows)
            assert shape.num_splits == 1 or tiles * shape.num_splits <= 2 * 132
            columns = shape.num_bytes * FORMATS[kind].columns_per_byte
            assert columns in (64, 128) and (group_size < 64 or group_size % columns == 0), "a tile of several groups"
            assert tiles <= len(counters(DEVICE))
