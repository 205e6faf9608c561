"""A matrix is its parts one below the other, in whatever formats they are."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.cpu import library
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.matrix import PlainPart, Weight, total_size
from ingle.weights.packed_matrix import PackedPart
from ingle.weights.source import StoredRows
from tests.weights.packed_rows import PackedRows


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)


def packed(tensor: torch.Tensor) -> tuple[PackedRows, torch.Tensor]:
    """The tensor [rows, columns] in Q8_0, and the numbers that it then holds."""
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(tensor.numpy(), kind)
    rows = StoredRows("Q8_0", stored, None)
    part = PackedPart.empty(CODE_TYPES[rows.type], *tensor.shape)
    part.pack(0, rows)
    return PackedRows(part), torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind)))


def check(weight: Weight, exact: torch.Tensor, tolerance: float) -> None:
    bias = torch.randn(len(exact))
    for x in (torch.randn(5, 64), torch.randn(2, 3, 64), torch.randn(4, 128)[:, ::2]):
        for added in (None, bias):
            expected = reference.multiply(x, exact, added)
            close = {"atol": tolerance * float(expected.abs().max()), "rtol": 0}
            torch.testing.assert_close(weight.multiply(x, added), expected, **close)
    x = torch.randn(7, 64)
    torch.testing.assert_close(
        weight.multiply_gated(x, bias, "silu"), reference.multiply_gated(x, exact, bias, "silu"), atol=tolerance * 100,
        rtol=0,
    )  # fmt: skip
    assert weight.num_parameters == exact.numel()


def test_plain_parts() -> None:
    exact = torch.randn(96, 64)
    whole = Weight.of(exact)
    assert whole.plain is exact and torch.equal(whole.rows(torch.tensor([3, 3, 95])), exact[[3, 3, 95]])
    assert total_size([whole, whole, exact]) == (2 * 96 * 64, 2 * 96 * 64 * 4)
    parts = Weight(tuple(PlainPart(part) for part in exact.split((10, 22, 64))))
    assert parts.plain is None and parts.num_bytes == whole.num_bytes
    for weight in (whole, parts):
        check(weight, exact, 1e-6)


def test_parts_of_several_formats() -> None:
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)
    plain = torch.randn(40, 64)
    first, first_exact = packed(torch.randn(32, 64))
    last, last_exact = packed(torch.randn(24, 64))
    weight = Weight((first, PlainPart(plain), last))
    assert weight.plain is None
    assert weight.num_bytes == first.num_bytes + 40 * 64 * 4 + last.num_bytes
    check(weight, torch.cat((first_exact, plain, last_exact)), 2e-2)
    assert torch.allclose(Weight((last,)).rows(torch.tensor([23, 0])), last_exact[[23, 0]], atol=1e-6)
