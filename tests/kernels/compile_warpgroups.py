"""Compiles products by warpgroups for Hopper, without one, and looks whether decoding runs beside the tensor cores.

A script, for in tests Triton interprets: python -m tests.kernels.compile_warpgroups
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.kernels.compiled import compiling  # before Triton: it is to compile

import torch  # isort: skip
import triton
from triton.runtime.jit import JITFunction

from ingle.kernels.coded import CodedKind
from ingle.kernels.gpu import warpgroups
from tests.kernels.test_coded import made

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CASES: list[tuple[CodedKind, int, bool, int]] = [
    ("int4", 128, True, 256), ("int4", 128, False, 32), ("int4", 32, False, 64), ("int8", 128, True, 256),
    ("fp8", 1280, False, 64),
]  # fmt: skip
"""Kind, group size, whether groups have zeros, rows."""


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
    return f"{num_products} products, {num_waits} waits"


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
                x, coded = torch.zeros(num_rows, 1280, dtype=dtype), made(kind, 520, 1280, group_size, zeros=zeros)
                assert warpgroups.suits(x, coded)
                warpgroups.multiply(x, coded, None)


if __name__ == "__main__":
    main()
