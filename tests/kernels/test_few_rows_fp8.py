"""Few rows with FP8 by Hopper's tensor cores, each number in two parts, against the plain operators in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.gpu import vector
from ingle.kernels.gpu.device import has_warpgroups
from ingle.kernels.options import Activation
from tests.kernels.fused import DEVICE, check_projection, close, randn
from tests.kernels.test_vector import fp8, normed_rows

few_rows_fp8 = pytest.importorskip("ingle.kernels.gpu.few_rows_fp8")
Tiling = few_rows_fp8.Tiling
ON_HOPPER = torch.cuda.is_available() and has_warpgroups(DEVICE)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card")
CLOSE = 4e-3
"""bfloat16 rounds 1.7e-3 of the norm away, of inputs as of sums."""


@pytest.fixture(autouse=True)
def matrices_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows_fp8, "_LEAST_ROWS", 0)


def with_tiling(tiling: NamedTuple | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiling is not None:
        monkeypatch.setattr(few_rows_fp8, "tiling", lambda *_: tiling)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("num_rows", "size_in", "activation", "tiling"),
    [
        (1, 128, "gelu_tanh", None),
        (1, 1152, "silu", Tiling(8, 2, 1)),
        (2, 640, "silu", Tiling(4, 4, 3)),
        (2, 3584, "silu", None),
    ],
)
def test_products(
    num_rows: int, size_in: int, activation: Activation, tiling: NamedTuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose chunks fit the ring, and do not."""
    torch.manual_seed(size_in)
    with_tiling(tiling, monkeypatch)
    rows, norm, normed = normed_rows(num_rows, size_in)
    held, residual, bias = fp8(140, size_in), randn(num_rows, 140), randn(140)
    assert vector.suits(rows, held) and vector._hopper(rows, held) is few_rows_fp8
    matrix = held.decoded(slice(None), torch.float32)
    exact = rows.float() @ matrix.T
    close(vector.add(rows, held, None, None), exact, CLOSE)
    close(vector.add(rows, held, bias, residual), exact + residual.float() + bias.float(), CLOSE)
    exact = reference.gated(rows.float() @ matrix.T + bias.float(), activation)
    close(vector.gated(rows, None, held, bias, activation), exact, 2 * CLOSE)
    exact = reference.gated(normed @ matrix.T, activation)
    close(vector.gated(rows, norm, held, None, activation), exact, 2 * CLOSE)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("num_rows", "head_dim", "qk_norm", "tiling"),
    [(1, 64, False, Tiling(8, 4, 3)), (2, 128, False, None), (1, 128, True, None)],
)
def test_projection(
    num_rows: int, head_dim: int, qk_norm: bool, tiling: NamedTuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(head_dim)
    with_tiling(tiling, monkeypatch)
    rows, norm, normed = normed_rows(num_rows, 640)
    heads = fp8(8 * head_dim, 640)
    check_projection(
        lambda _, bias, rotation: vector.project_and_store(rows, norm, heads, bias, rotation),
        normed, head_dim, qk_norm=qk_norm, weight=heads.decoded(slice(None), torch.float32),
    )  # fmt: skip


@pytest.mark.gpu
@needs_hopper
def test_numbers_far_from_each_other() -> None:
    """Chunks of columns have scales of their own, zeros among them."""
    torch.manual_seed(0)
    held, rows = fp8(64, 1024), randn(1, 1024)
    rows[:, :128] *= 1e8
    rows[:, 256:384] = 0
    rows[:, 400] *= 1e4
    rows[:, 512:] *= 1e-20
    matrix = held.decoded(slice(None), torch.float32)
    close(vector.add(rows, held, None, None), rows.float() @ matrix.T, CLOSE)
    rows[:, :512] = 0
    close(vector.add(rows, held, None, None), rows.float() @ matrix.T, CLOSE)
    rows[:, 5] = float("nan")
    assert vector.add(rows, held, None, None).isnan().all()


@pytest.mark.gpu
@needs_hopper
def test_what_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.zeros(1, 256, dtype=torch.bfloat16, device=DEVICE)
    assert few_rows_fp8.suits(row, fp8(8, 256))
    assert not few_rows_fp8.suits(row.half(), fp8(8, 256)) and not few_rows_fp8.suits(row[:, :208], fp8(8, 208))
    assert not few_rows_fp8.suits(row.expand(3, 256).contiguous(), fp8(8, 256))
    monkeypatch.setattr(few_rows_fp8, "_LEAST_ROWS", 16)
    assert not few_rows_fp8.suits(row, fp8(8, 256))


@pytest.mark.slow
def test_compiled_for_hopper() -> None:
    """By a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_few_rows_fp8"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("waits") == 6
