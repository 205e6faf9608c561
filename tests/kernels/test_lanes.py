"""What the inline assembly of `lanes` makes of codes, carried out instruction by instruction; and what it relies on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ingle.kernels.gpu import lanes
from ingle.weights.quantized.groups import E4M3
from tests.kernels.test_coded import made

Registers = dict[str, int]


def by_bits(left: int, middle: int, right: int, table: int) -> int:
    """LOP3: bit by bit, what the table says of three bits."""
    out = 0
    for bit in range(32):
        index = (left >> bit & 1) << 2 | (middle >> bit & 1) << 1 | right >> bit & 1
        out |= (table >> index & 1) << bit
    return out


def in_pairs(operate: Callable[..., torch.Tensor], *registers: int) -> int:
    halves = [torch.tensor([each & 0xFFFF, each >> 16]).to(torch.uint16).view(torch.bfloat16) for each in registers]
    low, high = (int(bits) for bits in operate(*halves).view(torch.uint16).int())
    return low | high << 16


def fma(left: torch.Tensor, right: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return (left.double() * right.double() + added.double()).bfloat16()


def bytes_of(low: int, high: int, choice: int) -> int:
    """PRMT, without signs."""
    held = (low | high << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(held[choice >> 4 * index & 7] for index in range(4)), "little")


_OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda number: number,
    "mov.u32": lambda number: number,
    "shr.b32": lambda number, by: number >> by,
    "shl.b32": lambda number, by: number << by & 0xFFFFFFFF,
    "and.b32": lambda left, right: left & right,
    "xor.b32": lambda left, right: left ^ right,
    "lop3.b32": by_bits,
    "prmt.b32": bytes_of,
    "cvt.u32.u16": lambda number: number & 0xFFFF,
    "bfe.u32": lambda number, first, count: number >> first & (1 << count) - 1,
    "fma.rn.bf16x2": lambda *registers: in_pairs(fma, *registers),
    "mul.rn.bf16x2": lambda *registers: in_pairs(torch.mul, *registers),
}


def run(text: str, inputs: Registers) -> int:
    """Of PTX what these texts consist of: returns `$0`."""
    return run_all(text, inputs)["$0"]


def run_all(text: str, inputs: Registers) -> Registers:
    """The same, for all registers."""
    values, predicate = dict(inputs), False

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in re.sub(r"[{}]", "", text).split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        out, *others = (operand.strip() for operand in operands.split(","))
        if name == "setp.ne.s32":
            predicate = value(others[0]) != value(others[1])
            continue
        if name == "selp.b32":
            values[out] = value(others[0] if predicate else others[1])
            continue
        values[out] = _OPERATIONS[name](*(value(each) for each in others))
    return values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", range(3), ids=["int4", "int8", "fp8"])
def test_every_code(kind: int, dtype: torch.dtype) -> None:
    texts = lanes._BF16_ASM if dtype == torch.bfloat16 else lanes._FP16_ASM
    bias, unit = lanes._BIAS[dtype][kind], lanes._UNIT[dtype][kind]
    for byte in range(0, 256, 1 if kind else 17):
        words = [
            byte * 0x01010101 ^ 0x5A0F3C96,
            byte * 0x01010101 ^ 0x23C1840D,
        ]  # of row r, and of the one eight further
        for second in range(2):
            for far in range(0, 16, 8 if kind else 4):
                registers = {"$1": words[0], "$2": words[0], "$3": words[1], "$4": words[1]}
                registers |= {"$5": second, "$6": second, "$7": far, "$8": far}
                packed = run(texts.value[kind], registers)
                bits = torch.tensor([packed & 0xFFFF, packed >> 16]).to(torch.uint16)
                ours = bits.view(dtype).double() * unit - bias
                codes = [words[second] >> shift & (255 if kind else 15) for shift in (far, far + 16)]
                exact = [float(E4M3[code]) for code in codes] if kind == 2 else [float(code) for code in codes]
                wrong = [a != b for a, b in zip(ours.tolist(), exact, strict=True) if not np.isnan(b)]
                assert not any(wrong), f"{codes} became {ours.tolist()}"


def test_what_is_read_so() -> None:
    sizes = {128: 64, 64: 32, 32: 16, 16: None}
    for group_size, size in sizes.items():
        assert lanes.block_bytes(made("int4", 8, 256, group_size)) == size
    assert [lanes.block_bytes(made("int8", 8, 256, size)) for size in (64, 32, 16, 8)] == [64, 32, 16, None]
    coded = made("int4", 8, 256, 128)
    assert lanes.block_bytes(replace(coded, table=torch.zeros(16))) is None
    assert lanes.block_bytes(replace(coded, kind="int5")) is None
    assert lanes.block_bytes(replace(coded, codes=coded.codes.t().contiguous().t())) is None


@pytest.mark.slow
def test_compiled_for_gpus() -> None:
    """By a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_lanes"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("loads of 16 bytes") == 32


@pytest.mark.slow
def test_a_ring_compiled_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ring"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("_few_rows_ring_kernel") == 20
    assert done.stdout.count("_few_rows_blocks_kernel") == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4-128", "Q4_K"])
def test_registers_hold_all(kind: str) -> None:
    """But for some bytes at most, where tilings limit them, so that SMs hold as many programs as those count on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.resources", "90", kind],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r" (\d+) +(_\w+) +\((\d+),\S* .* (\d+) bytes of stack.* (\d+) at once of (\d+)", done.stdout)
    assert len(lines) >= 8 and all(int(stack) <= 64 for _, _, _, stack, _, _ in lines), done.stdout
    for rows, kernel, programs, _, at_once, threads in lines:
        wanted = (16 if rows == "1" else 12) * 32 if kernel == "_coded_vector_kernel" else 3 * 128
        assert int(at_once) * int(threads) >= wanted or int(at_once) * 132 >= int(programs), done.stdout
