"""Products with layers of every format against float64, for numbers of rows on each side of those that kernels know."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ingle.kernels.cpu import library
from ingle.kernels.reference_coded import multiply_coded
from ingle.weights.coded_part import CodedPart
from ingle.weights.packed_matrix import pack_groups
from ingle.weights.quantized.groups import Groups
from tests.weights.quantized.packers import Written

pytestmark = pytest.mark.slow

Make = Callable[[int, int], Written]
Read = Callable[[Written], Groups]
ROWS, COLUMNS = 160, 448  # 7 groups of 64
COUNTS = (1, 3, 16, 17, 64, 128, 1000)
RANKS = ((0, 192), (192, 448))
"""Inputs of two ranks: along groups of 64, and for some formats through them."""


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    """The largest of all rows, each as a part of its largest number."""
    return float((np.abs(ours - exact).max(1) / np.abs(exact).max(1)).max())


@pytest.fixture
def x() -> np.ndarray:
    x = np.random.default_rng(9).standard_normal((max(COUNTS), COLUMNS)).astype(np.float32)
    x[2] *= 300  # each row has a scale of its own
    return x


def test_on_the_cpu(case: Make, read: Read, x: np.ndarray) -> None:
    """Whole; and as ranks have it, some outputs each, and some inputs each, whose products add up."""
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)
    written = case(ROWS, COLUMNS)
    groups, exact = read(written), x.astype(np.float64) @ written.exact.T
    whole = pack_groups([groups], COLUMNS)
    outputs = [pack_groups([groups.rows(start, start + 80)], COLUMNS) for start in (0, 80)]
    inputs = [pack_groups([groups.columns(start, stop)], stop - start) for start, stop in RANKS]
    for count in COUNTS:
        of = x[:count]
        assert error(whole.multiply(of), exact[:count]) < 4e-3
        assert error(np.hstack([part.multiply(of) for part in outputs]), exact[:count]) < 4e-3
        parts = [
            part.multiply(np.ascontiguousarray(of[:, slice(*cut)])) for part, cut in zip(inputs, RANKS, strict=True)
        ]
        assert error(parts[0] + parts[1], exact[:count]) < 6e-3


@pytest.mark.parametrize("dtype, most", [(torch.float32, 3e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_with_pytorch(case: Make, read: Read, x: np.ndarray, dtype: torch.dtype, most: float) -> None:
    written = case(ROWS, COLUMNS)
    groups, inputs = read(written), torch.from_numpy(x).to(dtype)
    exact = inputs.double().numpy() @ written.exact.T
    part = CodedPart.of([groups], dtype, torch.device("cpu")).coded
    ranks = [CodedPart.of([groups.columns(*cut)], dtype, torch.device("cpu")).coded for cut in RANKS]
    for count in COUNTS:
        of = inputs[:count]
        assert error(multiply_coded(of, part).double().numpy(), exact[:count]) < most
        total = sum(multiply_coded(of[:, slice(*cut)], rank).double() for rank, cut in zip(ranks, RANKS, strict=True))
        assert isinstance(total, torch.Tensor) and error(total.numpy(), exact[:count]) < most
