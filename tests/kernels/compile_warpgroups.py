"""Compiles products by warpgroups for Hopper, without one, and looks whether decoding runs beside the tensor cores, and
leaves alone what those still read.

A script, for in tests Triton interprets: python -m tests.kernels.compile_warpgroups
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.kernels.compiled import compiling  # before Triton: it is to compile

import torch  # isort: skip
import triton
from triton.runtime.jit import JITFunction

from ingle.kernels.coded import Coded, CodedKind
from ingle.kernels.gpu import warpgroups
from tests.kernels.test_coded import made
from tests.kernels.test_warpgroups import blocks

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CASES: list[tuple[CodedKind, int, bool, int]] = [
    ("int4", 128, True, 256), ("int4", 128, False, 32), ("int4", 32, False, 64), ("int8", 128, True, 256),
    ("fp8", 1280, False, 64), ("int4", 128, True, 64), ("int8", 128, False, 32), ("int4", 128, True, 128),
]  # fmt: skip
"""Kind, group size, whether groups have zeros, rows."""
BLOCKS = [
    ("Q4_K", 256), ("Q4_K", 64), ("Q4_K", 32), ("Q5_K", 256), ("Q5_K", 64), ("Q6_K", 256), ("Q6_K", 64), ("Q6_K", 32),
]  # fmt: skip
"""Kind, rows."""


def look(code: bytes) -> str:
    """Raises `AssertionError` where the assembler has every product waited for, or registers are too few."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(_CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    products = text[text.index("HGMMA") : text.rindex("HGMMA")]
    assert "LDL" not in products and "STL" not in products, "numbers go through local memory"
    num_products, num_waits = text.count("HGMMA"), text.count("WARPGROUP.DEPBAR")
    assert num_waits < num_products, f"{num_waits} waits for {num_products} products"
    written = written_in_flight(text)
    assert not written, f"products read or write what changes meanwhile: {written[:3]}"
    return f"{num_products} products, {num_waits} waits"


def written_in_flight(text: str) -> list[str]:
    """Instructions of the loop, three times over, whose result is a register of a product that is not waited for."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?(\S+) ?(.*?);", text)
    steps = [(int(at, 16), name, operands) for at, name, operands in found]
    products = [index for index, (_, name, _) in enumerate(steps) if name.startswith("HGMMA")]
    back = next(
        (index, int(operands, 16))
        for index, (_, name, operands) in enumerate(steps)
        if index > products[-1] and name == "BRA" and int(operands, 16) <= steps[products[0]][0]
    )
    loop = [step for step in steps[: back[0]] if step[0] >= back[1]]
    flights: list[set[int]] = [set()]  # the last one is not yet committed
    written = []
    for at, name, operands in 3 * loop:
        registers = [int(register) for register in re.findall(r"\bR(\d+)", operands)]
        if name.startswith("HGMMA"):
            sums, numbers = registers[:2]
            size = int(name.split("x")[1]) // 2
            flights[-1] |= {*range(sums, sums + size), *range(numbers, numbers + 4)}
            if "gsb0" in operands:
                flights.append(set())
        elif name == "WARPGROUP.DEPBAR.LE":
            flights = flights[-1 - int(operands.split()[-1], 16) :]
        elif re.match(r"(P\d, )?R\d", operands) and not name.startswith(("BAR", "R2UR")):
            size = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1
            if set.union(*flights).intersection(range(registers[0], registers[0] + size)):
                written.append(f"{at:x} {name} {operands}")
    return written


def main() -> None:
    with compiling(90):
        launch = JITFunction.run

        def told(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
            kernel = launch(self, *args, grid=grid, **options)
            print(case, dtype, look(kernel.asm["cubin"]), flush=True)
            return kernel

        JITFunction.run = told
        for dtype in (torch.bfloat16, torch.float16):
            for case in CASES:
                kind, group_size, zeros, num_rows = case
                compile_one(num_rows, dtype, made(kind, 520, 1280, group_size, zeros=zeros))
        for case in BLOCKS:
            kind, num_rows = case
            compile_one(num_rows, dtype := torch.bfloat16, blocks(kind, 520, 1280))


def compile_one(num_rows: int, dtype: torch.dtype, coded: Coded) -> None:
    x = torch.zeros(num_rows, coded.num_columns, dtype=dtype)
    assert warpgroups.suits(x, coded)
    warpgroups.multiply(x, coded, None)


if __name__ == "__main__":
    main()
