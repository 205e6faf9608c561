"""Products of more rows than few with codes, by warpgroups, against the decoded matrix in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ingle.kernels.coded import Coded, CodedKind
from ingle.kernels.gpu import coded as gpu_coded
from ingle.kernels.gpu.coded import multiply_coded
from ingle.kernels.gpu.device import counters
from tests.kernels.fused import DEVICE
from tests.kernels.test_coded import close, exact_product, made

warpgroups = pytest.importorskip("ingle.kernels.gpu.warpgroups")
CASES: list[tuple[CodedKind, int, int, int, bool]] = [
    ("int4", 640, 1024, 128, True), ("int4", 264, 1152, 128, False), ("int4", 200, 1024, 256, True),
    ("int4", 136, 1088, 64, True), ("int4", 392, 1056, 32, False), ("int4", 264, 1280, 1280, True),
    ("int8", 264, 1152, 128, True), ("int8", 136, 1040, 1040, False), ("int8", 264, 1024, 32, False),
    ("fp8", 392, 1024, 128, False), ("fp8", 264, 1040, 1040, False),
]  # fmt: skip
"""Kind, rows of weights, inputs, group size, whether groups have zeros."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: tuple[CodedKind, int, int, int, bool], dtype: torch.dtype) -> None:
    kind, size_out, size_in, group_size, zeros = case
    coded = made(kind, size_out, size_in, group_size, zeros=zeros)
    bias = torch.randn(size_out, device=DEVICE).to(dtype)
    for num_rows in (17, 64, 300):
        x = torch.randn(num_rows, size_in, device=DEVICE).to(dtype)
        assert warpgroups.suits(x, coded)
        exact = exact_product(x, coded)
        for shape in (warpgroups.Tiling(64, 3), warpgroups.Tiling(128, 3)):
            close(warpgroups.multiply(x, coded, None, shape), exact, dtype)
        first = warpgroups.multiply(x, coded, bias)
        close(first, exact + bias.double(), dtype)
        assert torch.equal(first, warpgroups.multiply(x, coded, bias)), "sums of another order"
    assert not counters(DEVICE).any()


@pytest.mark.gpu
def test_more_tiles_than_programs() -> None:
    """Of which some are whole, and some are shared out."""
    coded = made("int4", 20_000, 256, 128, zeros=True)
    for num_rows in (100, 700):
        x = torch.randn(num_rows, 512, device=DEVICE).bfloat16()[:, 128:384]
        close(warpgroups.multiply(x, coded, None), exact_product(x, coded), torch.bfloat16)


def test_what_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warpgroups, "has_warpgroups", lambda device: True)
    x, coded = torch.zeros(32, 256, dtype=torch.bfloat16, device=DEVICE), made("int4", 16, 256, 128)
    assert warpgroups.suits(x, coded)
    assert not warpgroups.suits(x.float(), coded)
    assert not warpgroups.suits(torch.zeros(32, 260, device=DEVICE).bfloat16()[:, :256], coded)
    assert not warpgroups.suits(x, replace(coded, table=torch.zeros(16)))
    assert not warpgroups.suits(x, replace(coded, kind="int5"))
    assert not warpgroups.suits(x, replace(coded, codes=coded.codes.t().contiguous().t()))
    assert not warpgroups.suits(x, made("int4", 12, 256, 128))
    assert not warpgroups.suits(x, made("int4", 16, 256, 16))
    monkeypatch.setattr(warpgroups, "has_warpgroups", lambda device: False)
    assert not warpgroups.suits(x, coded)


def test_what_is_not_right_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever a compiler made of it; tried once for a matrix's form, and not while a graph is captured."""
    x, coded = torch.randn(40, 256, device=DEVICE).half(), made("int4", 16, 256, 128)
    right, asked = multiply_coded(x, coded, None), []

    def wrong(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append(len(x))
        return x.new_zeros(len(x), coded.num_rows)

    monkeypatch.setattr(gpu_coded, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(warpgroups, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(warpgroups, "multiply", wrong)
    monkeypatch.setattr(warpgroups, "_right", {})
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        if x.is_cuda:
            assert torch.equal(multiply_coded(x, coded, None), right) and not asked
    for _ in range(2):
        assert torch.equal(multiply_coded(x, coded, None), right)
    assert asked == [40] and caplog.text.count("are off by 1.000") == 1
    monkeypatch.setattr(warpgroups, "multiply", lambda x, coded, bias: 1.01 * exact_product(x, coded).to(x.dtype))
    monkeypatch.setattr(warpgroups, "_right", {})
    assert not torch.equal(multiply_coded(x, coded, None), right), "near enough"


@pytest.mark.parametrize("num_shared, units", [(1, 28), (16, 28), (32, 28), (112, 148), (131, 3), (28, 148)])
def test_tiles_are_shared_out(num_shared: int, units: int) -> None:
    """No program has units of three tiles: it has room for what two leave."""
    sharers = warpgroups.num_sharers(num_shared, units, 132)
    assert num_shared <= sharers <= 132
    starts = [program * num_shared * units // sharers for program in range(sharers + 1)]
    assert all((end - 1) // units - start // units <= 1 for start, end in pairwise(starts))


@pytest.mark.slow
def test_compiled_for_hopper() -> None:
    """By a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_warpgroups"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("waits") == 14
