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
from ingle.kernels.gpu.device import counters, gathers_programs
from ingle.weights.gguf_coded import coded_of
from ingle.weights.source import StoredRows
from tests.kernels.fused import DEVICE
from tests.kernels.test_coded import close, exact_product, made
from tests.kernels.test_lanes import run_all
from tests.weights.gguf_blocks import random_blocks

warpgroups = pytest.importorskip("ingle.kernels.gpu.warpgroups")
blocks_module = pytest.importorskip("ingle.kernels.gpu.warpgroups_blocks")
CASES: list[tuple[CodedKind, int, int, int, bool]] = [
    ("int4", 640, 1024, 128, True), ("int4", 264, 1152, 128, False), ("int4", 200, 1024, 256, True),
    ("int4", 136, 1088, 64, True), ("int4", 392, 1056, 32, False), ("int4", 264, 1280, 1280, True),
    ("int8", 264, 1152, 128, True), ("int8", 136, 1040, 1040, False), ("int8", 264, 1024, 32, False),
    ("fp8", 392, 1024, 128, False), ("fp8", 264, 1040, 1040, False),
]  # fmt: skip
"""Kind, rows of weights, inputs, group size, whether groups have zeros."""
BLOCKS = ["Q4_K", "Q5_K", "Q6_K"]


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
        shapes = warpgroups.Tiling(32, 4), warpgroups.Tiling(64, 3), warpgroups.Tiling(128, 3)
        for shape in (*shapes, *([warpgroups.Tiling(256, 4, 128, 32)] if kind == "int4" else [])):
            close(warpgroups.multiply(x, coded, None, shape), exact, dtype)
        first = warpgroups.multiply(x, coded, bias)
        close(first, exact + bias.double(), dtype)
        assert torch.equal(first, warpgroups.multiply(x, coded, bias)), "sums of another order"
    assert not counters(DEVICE).any()


def blocks(kind: str, size_out: int, size_in: int) -> Coded:
    return coded_of(StoredRows(kind, random_blocks(kind, size_out, size_in, std=size_in**-0.5)), DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str) -> None:
    for size_out, size_in in ((640, 1024), (264, 2816), (20_000, 256)):
        coded = blocks(kind, size_out, size_in)
        bias = torch.randn(size_out, device=DEVICE).bfloat16()
        for num_rows in (1, 17, 36, 64, 128, 200, 256):
            x = torch.randn(num_rows, size_in, device=DEVICE).bfloat16()
            assert warpgroups.suits(x, coded)
            exact = exact_product(x, coded)
            first = warpgroups.multiply(x, coded, None)
            close(first, exact, torch.bfloat16)
            close(warpgroups.multiply(x, coded, bias), exact + bias.double(), torch.bfloat16)
            assert torch.equal(first, warpgroups.multiply(x, coded, None)), "sums of another order"
    assert not counters(DEVICE).any()


@pytest.mark.parametrize("scale, other", [(1.0, 0.0), (0.0078125, -3.5), (-(2.0**21), 2.0**24), (2.0**-24, 0.0)])
def test_every_code_of_blocks(scale: float, other: float) -> None:
    """By the instructions, one after the other: bytes 0, 1, 8 and 9 of a block's 16, and the first of its others."""

    def word(low: float, high: float) -> int:
        first, second = (int(bits) for bits in torch.tensor([low, high]).bfloat16().view(torch.uint16))
        return first | second << 16

    for byte in range(256):
        given = [byte, byte * 7 & 255, ~byte & 255, byte * 3 & 255]
        registers = {"$4": given[0] | given[1] << 8, "$5": given[2] | given[3] << 8}
        lower, upper = [each & 15 for each in given], [each >> 4 for each in given]
        int4 = run_all(blocks_module._int4(), {**registers, "$6": word(scale * 1024, other)})
        exact = [(code - 8) * scale + other for code in lower + upper]
        assert numbers_of(int4) == torch.tensor(exact).bfloat16().tolist()
        high = [byte, byte * 5 & 255]
        for lane in range(4):  # of whose bits it has the even ones, or the others
            five = {**registers, "$6": high[0] | high[1] << 8, "$7": word(scale * 1024, other), "%laneid": lane}
            bits = [high[index % 2] >> index // 2 * 2 + lane // 2 & 1 for index in range(8)]
            exact = [(code + 16 * bit - 16) * scale + other for code, bit in zip(lower + upper, bits, strict=True)]
            assert numbers_of(run_all(blocks_module._int5(), five)) == torch.tensor(exact).bfloat16().tolist()
        int6 = run_all(
            blocks_module._int6(),
            {**registers, "$6": high[0] | high[1] << 8, "$7": word(scale * 1024, scale * -512)},
        )
        codes = [code | (high[index % 2] >> 2 * (index // 2) & 3) << 4 for index, code in enumerate(lower + upper)]
        exact = [(code - 32) * scale * (1 if index < 4 else -0.5) for index, code in enumerate(codes)]
        assert numbers_of(int6) == torch.tensor(exact).bfloat16().tolist()


def numbers_of(registers: dict[str, int]) -> list[float]:
    halves = [registers[f"${index}"] >> shift & 0xFFFF for index in range(4) for shift in (0, 16)]
    return torch.tensor(halves).to(torch.uint16).view(torch.bfloat16).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_odd_scales(kind: str) -> None:
    """Zeros, the largest there are, those below float16's lowest exponent, and minima of either sign, each in rows of
    its own."""
    coded = blocks(kind, 640, 1024)
    factors = coded.factors if coded.factor_pairs is None else coded.factor_pairs
    steps = coded.scales if coded.pairs is None else coded.pairs
    assert factors is not None
    steps[:16] = 0
    factors[16:32] = 0
    factors[32:48] = 65504
    factors[48:64] = 6e-8
    if coded.pairs is not None and coded.factor_pairs is not None:
        coded.pairs[64:80, :, 0] = 0
        coded.pairs[80:96, :, 1] = 0
        coded.factor_pairs[96:112, :, 1] *= -1
    x = torch.randn(64, 1024, device=DEVICE).bfloat16()
    ours, exact = warpgroups.multiply(x, coded, None), exact_product(x, coded)
    assert not ours[:, :32].any()
    for first in range(32, 640, 16):
        close(ours[:, first : first + 16], exact[:, first : first + 16], torch.bfloat16)


@pytest.mark.gpu
def test_more_tiles_than_programs() -> None:
    """Of which some are whole, and some are shared out."""
    coded = made("int4", 20_000, 256, 128, zeros=True)
    for num_rows in (100, 700):
        x = torch.randn(num_rows, 512, device=DEVICE).bfloat16()[:, 128:384]
        close(warpgroups.multiply(x, coded, None), exact_product(x, coded), torch.bfloat16)


def test_beside_kernels_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not gathers_programs.__wrapped__()
    (tmp_path / "control").touch()
    assert gathers_programs.__wrapped__()


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
    coded = blocks("Q6_K", 16, 256)
    assert warpgroups.suits(x, coded)
    assert not warpgroups.suits(x.half(), coded)
    assert coded.high is not None
    assert not warpgroups.suits(x, replace(coded, high=coded.high.t().contiguous().t()))
    assert not warpgroups.suits(x, blocks("Q3_K", 16, 256))
    monkeypatch.setattr(warpgroups, "has_warpgroups", lambda device: False)
    assert not warpgroups.suits(x, coded)


def test_what_is_not_right_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever a compiler made of it; tried once for a matrix's form, and not while a graph is captured."""
    x, coded = torch.randn(40, 256, device=DEVICE).half(), made("int4", 16, 256, 128)
    right, asked = multiply_coded(x, coded, None), []

    def wrong(x: torch.Tensor, coded: Coded, *_rest: object) -> torch.Tensor:
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
    monkeypatch.setattr(warpgroups, "multiply", lambda x, coded, *_: 1.01 * exact_product(x, coded).to(x.dtype))
    monkeypatch.setattr(warpgroups, "_right", {})
    assert not torch.equal(multiply_coded(x, coded, None), right), "near enough"


@pytest.mark.parametrize("num_shared, units", [(1, 28), (16, 28), (32, 28), (112, 148), (131, 3), (28, 148)])
def test_tiles_are_shared_out(num_shared: int, units: int) -> None:
    """No program has units of three tiles: it has room for what two leave."""
    sharers = warpgroups.num_sharers(num_shared, units, 132)
    assert num_shared <= sharers <= min(132, num_shared * min(units, 8))
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
    assert done.stdout.count("waits") == 24
