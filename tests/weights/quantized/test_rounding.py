"""Floats become the codes of least error: by the C++ kernels as by PyTorch, and never worse than the nearest are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.model.rounding import TARGETS
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.rounding import Loss, Rounded, ScaleType, round_matrix, round_natively
from ingle.weights.quantized.rounding_torch import round_by_torch
from ingle.weights.quantized.scheme import Scheme

SCHEMES = {
    **TARGETS,
    "int4-32": replace(TARGETS["int4"], group_size=32),
    "int4-symmetric": replace(TARGETS["int4"], has_zeros=False),
    "int8-row": replace(TARGETS["int8"], group_size=None),
}


@pytest.fixture(autouse=True)
def kernels() -> None:
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)


def numbers(rows: int = 24, columns: int = 256, seed: int = 0) -> np.ndarray:
    """With tails, a group of zeros, and one of numbers that are all above 0."""
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32) * np.float32(0.02)
    values[1, :128] = 0
    values[2] = np.abs(values[2]) + np.float32(0.01)
    return values


def rounded(values: np.ndarray, scheme: Scheme, scale_type: ScaleType = "BF16") -> tuple[Groups, Loss]:
    def round_rows(start: int, stop: int) -> Rounded:
        return round_natively(values[start:stop], scheme, scale_type)

    return round_matrix("a", *values.shape, scheme, scale_type, round_rows)


def error(values: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.square(values.astype(np.float64) - decoded).sum())


@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_pytorch_finds_the_same(name: str, scale_type: ScaleType) -> None:
    scheme, values = SCHEMES[name], numbers()
    ours = round_natively(values, scheme, scale_type)
    theirs = round_by_torch(torch.from_numpy(values), scheme, scale_type)
    assert np.mean(ours.codes != theirs.codes) < 2e-3  # sums in another order may prefer a neighbour as good
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_loss_is_that_of_what_is_held(name: str) -> None:
    values = numbers()
    groups, loss = rounded(values, SCHEMES[name])
    assert loss.error == pytest.approx(error(values, groups.decoded()), rel=1e-4)
    assert loss.squares == pytest.approx(np.square(values.astype(np.float64)).sum())
    assert loss.relative == pytest.approx((loss.error / loss.squares) ** 0.5)
    assert np.isfinite(groups.decoded()).all() and not groups.decoded()[1, :128].any()


def nearest(values: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Round to nearest, the largest number being the largest code, as quantizers do without data."""
    grouped = values.reshape(len(values), -1, size)
    scales = np.abs(grouped).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.rint(grouped / np.where(scales == 0, 1, scales)) * scales).reshape(values.shape)


def test_error_is_below_that_of_the_nearest_codes() -> None:
    values = numbers(64, 512)
    plain = error(values, nearest(values, 4, 128))
    symmetric = rounded(values, SCHEMES["int4-symmetric"], "F32")[1].error
    with_zeros = rounded(values, SCHEMES["int4"], "F32")[1].error
    assert with_zeros < symmetric < plain
    assert with_zeros < 0.75 * plain
    assert rounded(values, SCHEMES["int8"], "F32")[1].error <= error(values, nearest(values, 8, 128))
    assert rounded(values, SCHEMES["fp8"])[1].relative < 0.03


def test_what_codes_can_hold_is_kept() -> None:
    """A matrix that was rounded before comes out nearly as it went in."""
    for name, scheme in SCHEMES.items():
        once, _ = rounded(numbers(), scheme)
        _, loss = rounded(once.decoded(), scheme)
        assert loss.relative < 0.03, name


def test_a_last_group_may_be_shorter() -> None:
    values = numbers(5, 200)
    groups, loss = rounded(values, SCHEMES["int8"])
    assert groups.scales.shape == (5, 2)
    assert loss.error == pytest.approx(error(values, groups.decoded()), rel=1e-4)


def test_pieces_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    values, scheme = numbers(), SCHEMES["int4"]
    whole, _ = rounded(values, scheme)
    asked: list[tuple[int, int]] = []

    def round_rows(start: int, stop: int) -> Rounded:
        asked.append((start, stop))
        return round_natively(values[start:stop], scheme, "BF16")

    monkeypatch.setattr("ingle.weights.quantized.rounding._CHUNK_NUMBERS", 7 * 256)
    pieces, _ = round_matrix("a", *values.shape, scheme, "BF16", round_rows)
    assert asked == [(0, 7), (7, 14), (14, 21), (21, 24)]
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.scales, pieces.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", TARGETS)
def test_numbers_that_are_not_finite(name: str, bad: float) -> None:
    values = numbers()
    values[3, 5] = bad
    with pytest.raises(ModelError, match="tensor a has numbers that are not finite"):
        rounded(values, SCHEMES[name])
    assert np.isnan(round_by_torch(torch.from_numpy(values), SCHEMES[name], "F16").losses[3, 0])
