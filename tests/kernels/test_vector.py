"""Products of one and two rows with what is fused to them, against the plain operators in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.gpu import vector
from ingle.kernels.gpu.vector import Tiling
from ingle.kernels.options import Activation
from ingle.model.layers import RMSNorm
from tests.kernels.fused import DEVICE, DTYPE, EPS, ON_GPU, check_projection, close, norm_weight, randn, weights
from tests.kernels.interpreted import pairwise


class Shape(NamedTuple):
    """Rows and their size, and a tile's."""

    num_rows: int
    size_in: int
    outs: int
    depth: int


SHAPES = [Shape(1, 200, 4, 256), Shape(2, 200, 2, 128), Shape(1, 200, 4, 32), Shape(2, 520, 8, 64)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Rows and their size: one iteration, two or several, with tiles of several sizes; some before the wait."""
    num_rows, size_in, outs, depth = request.param
    monkeypatch.setattr(vector, "tiling", lambda size_in, *, paired: Tiling(outs, depth, 3 * 2 * outs * depth))
    torch.manual_seed(outs)
    return num_rows, size_in


def normed_rows(num_rows: int, size_in: int) -> tuple[torch.Tensor, RMSNorm, torch.Tensor]:
    """Rows, a norm, and what that makes of them."""
    rows, norm = randn(num_rows, size_in), RMSNorm(norm_weight(size_in), EPS)
    return rows, norm, reference.rms_norm(rows.float(), norm.weight.float(), EPS)


@pytest.mark.parametrize("size_out", [64, 99])
def test_add(shape: tuple[int, int], size_out: int) -> None:
    num_rows, size_in = shape
    x, residual = randn(num_rows, size_in), randn(num_rows, size_out)
    weight, bias = weights(size_out, size_in), randn(size_out)
    exact = x.float() @ weight.float().T
    close(vector.add(x, weight, None, None), exact)
    close(vector.add(x, weight, None, residual), exact + residual.float())
    close(vector.add(x, weight, bias, residual), exact + residual.float() + bias.float())


@pytest.mark.parametrize(
    ("shape", "size", "activation"), pairwise(SHAPES, [64, 73], ["silu", "gelu_tanh"]), indirect=["shape"]
)
def test_gated(shape: tuple[int, int], size: int, activation: Activation) -> None:
    rows, norm, normed = normed_rows(*shape)
    weight = weights(2 * size, shape[1])
    exact = reference.gated(normed @ weight.float().T, activation)
    close(vector.gated(rows, norm, weight, None, activation), exact)
    close(vector.gated(normed.to(DTYPE), None, weight, None, activation), exact)


@pytest.mark.parametrize(
    ("shape", "qk_norm", "is_normed"), pairwise(SHAPES, [False, True], [False, True]), indirect=["shape"]
)
def test_project_and_store(shape: tuple[int, int], qk_norm: bool, is_normed: bool) -> None:
    rows, norm, normed = normed_rows(*shape)
    x, pending = (normed.to(DTYPE), None) if is_normed else (rows, norm)
    check_projection(
        lambda weight, bias, rotation: vector.project_and_store(x, pending, weight, bias, rotation),
        normed,
        64,
        qk_norm=qk_norm,
    )


@pytest.mark.parametrize("size_in", [200, 1024, 3584, 5120, 14336])
def test_every_size_of_row(size_in: int) -> None:
    """The tilings themselves, not those of the other tests."""
    torch.manual_seed(size_in)
    x, weight = randn(1, size_in), weights(36, size_in)
    exact = x.double() @ weight.double().T
    close(vector.add(x, weight, None, None), exact)
    close(vector.gated(x, None, weight, None, "silu"), reference.gated(exact, "silu"))


def fp8(num_rows: int, size_in: int) -> Coded:
    """All that there is but NaN, with a scale for each row."""
    codes = torch.randint(0, 256, (num_rows, size_in), dtype=torch.uint8, device=DEVICE)
    codes[codes & 127 == 127] = 1
    scales = (torch.rand(num_rows, 1, device=DEVICE) + 0.5) / 100 / size_in**0.5
    return Coded.of("fp8", codes, scales, None, size_in)


@pytest.mark.parametrize("num_rows, size_in", [(2, 1040), *([(1, 208), (1, 3584), (2, 3584), (1, 18944)] * ON_GPU)])
@pytest.mark.parametrize("tiling", [None, Tiling(2, 512, 1 << 12, 2, True)], ids=["usual", "ahead"])
def test_fp8(num_rows: int, size_in: int, tiling: Tiling | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size_in)
    monkeypatch.setattr(vector, "_hopper", lambda x, weight: None)
    if tiling is not None:
        monkeypatch.setattr(vector, "fp8_tiling", lambda *_, paired: tiling)
    rows, norm, normed = normed_rows(num_rows, size_in)
    size_out = 72 if tiling is None else 70  # whole tiles, and not
    held, residual, bias = fp8(size_out, size_in), randn(num_rows, size_out), randn(size_out)
    matrix = held.decoded(slice(None), torch.float32)
    exact = rows.float() @ matrix.T
    close(vector.add(rows, held, None, None), exact)
    close(vector.add(rows, held, bias, residual), exact + residual.float() + bias.float())
    close(vector.gated(rows, norm, held, None, "silu"), reference.gated(normed @ matrix.T, "silu"))
    for qk_norm in (False, True) if ON_GPU else (False,):
        heads = fp8(8 * 32, size_in)
        check_projection(
            lambda _, bias, rotation: vector.project_and_store(rows, norm, heads, bias, rotation),  # noqa: B023
            normed, 32, qk_norm=qk_norm, weight=heads.decoded(slice(None), torch.float32),
        )  # fmt: skip


def test_which_fp8_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, held = torch.zeros(2, 256, dtype=torch.bfloat16, device=DEVICE), fp8(8, 256)
    row = x[:1]
    monkeypatch.setattr(vector, "_hopper", lambda x, weight: None)
    monkeypatch.setattr(vector, "multiplies_fp8", lambda device: True)
    assert vector.suits(row, held) and vector.suits(row.half(), held) and not vector.suits(row.float(), held)
    assert not vector.suits(x, held)
    assert not vector.suits(row, Coded.of("fp8", held.codes, held.scales.expand(8, 2).contiguous(), None, 128))
    assert not vector.suits(row[:, :248], fp8(8, 248)) and not vector.suits(row, replace(held, kind="int8"))
    monkeypatch.setattr(vector, "FP8_ROWS", 2)
    assert vector.suits(x, held)
    monkeypatch.setattr(vector, "FP8_ROWS", 0)
    assert not vector.suits(row, held)
    monkeypatch.undo()
    monkeypatch.setattr(vector, "_hopper", lambda x, weight: None)
    monkeypatch.setattr(vector, "multiplies_fp8", lambda device: False)
    assert not vector.suits(row, held)


def test_what_suits() -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert vector.suits(x, weight) and vector.suits(x[:1], weight)
    assert not vector.suits(x[:0], weight) and not vector.suits(torch.cat([x, x]), weight)
    assert not vector.suits(x.float(), weight.float()) and not vector.suits(x.half(), weight)
    assert not vector.suits(x[:, :60].contiguous(), weight[:, :60].contiguous())
    assert not vector.suits(x[:, :32], weight[:, :32].contiguous()) and not vector.suits(x, weight[::2])
