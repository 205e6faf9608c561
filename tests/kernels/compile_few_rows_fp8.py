"""Compiles products of few rows with FP8 for Hopper, without one, and looks at what the assembler makes of them.

A script, for in tests Triton interprets: python -m tests.kernels.compile_few_rows_fp8
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

from ingle.kernels.flow import Rotation
from ingle.kernels.gpu import few_rows_fp8
from ingle.kernels.gpu.few_rows_fp8 import Tiling
from ingle.model.layers import RMSNorm
from tests.kernels.resources import DTYPE, HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, folder

_ADD, _ROTATE, _SILU = 0, 1, 2
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def look(code: bytes) -> str:
    """Raises `AssertionError` where products are waited for one by one, numbers go through the stack, or a number that
    became FP8 is read again, which CUDA 12.8's assembler gets wrong."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(_CUOBJDUMP), "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    num_products, num_waits = text.count("QGMMA"), text.count("WARPGROUP.DEPBAR")
    assert 4 * num_waits < num_products, f"{num_waits} waits for {num_products} products"
    assert "LDL" not in text and "STL" not in text, "numbers go through local memory"
    assert "E4M3.UNPACK" not in text, "what became FP8 is read again"
    return f"{num_products} products, {num_waits} waits"


def products(num_rows: int, shape: Tiling) -> None:
    """Of a layer of Qwen2-7B, that of long rows left out."""
    make = folder("fp8", 0)
    x, norm = torch.zeros(num_rows, HIDDEN, dtype=DTYPE), RMSNorm(torch.ones(HIDDEN, dtype=DTYPE), 1e-6)
    cache, places = torch.zeros(2, 8, 16, KV_HEADS, HEAD_DIM, dtype=DTYPE), torch.zeros(num_rows, dtype=torch.int64)
    rotation = Rotation(HEADS, torch.zeros(num_rows, HEAD_DIM), None, None, 1e-6, cache, places)
    qkv, out, gate_up = (make(size, HIDDEN) for size in ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, 2 * INNER))
    bias, q = torch.zeros(qkv.num_rows, dtype=DTYPE), x.new_zeros(num_rows, HEADS, HEAD_DIM)
    few_rows_fp8.run_by(shape, x, norm, qkv, bias, _ROTATE, q, rotation=rotation)
    few_rows_fp8.run_by(shape, x, None, out, None, _ADD, x.clone(), residual=x)
    few_rows_fp8.run_by(shape, x, norm, gate_up, None, _SILU, x.new_zeros(num_rows, INNER))


def main() -> None:
    with compiling(90):
        launch = JITFunction.run

        def looked_at(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
            made = launch(self, *args, grid=grid, **options)
            print(self.fn.__name__, look(made.asm["cubin"]), flush=True)
            return made

        JITFunction.run = looked_at
        for num_rows in (1, 2):
            products(num_rows, few_rows_fp8.tiling(num_rows))


if __name__ == "__main__":
    main()
