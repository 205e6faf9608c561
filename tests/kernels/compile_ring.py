"""Compiles products of few rows with int4 and with GGUF's blocks for Hopper, without one, and looks at what the
assembly in them relies on.

A script, for in tests Triton interprets: python -m tests.kernels.compile_ring
"""

from __future__ import annotations

import re
from typing import Any

from tests.kernels.compiled import compiling  # before Triton: it is to compile

import torch  # isort: skip
from triton.runtime.jit import JITFunction

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Rotation
from ingle.kernels.gpu import few_rows_coded as few_rows
from ingle.model.layers import RMSNorm
from tests.kernels.compile_lanes import in_pairs
from tests.kernels.resources import KINDS, folder, usage

ROWS, COLUMNS = 4608, 3584


def products(num_rows: int, dtype: torch.dtype, weight: Coded) -> None:
    """With all ends."""
    x, norm = torch.zeros(num_rows, COLUMNS, dtype=dtype), RMSNorm(torch.ones(COLUMNS, dtype=dtype), 1e-6)
    flow = Flow(x, norm, x, torch.zeros(num_rows, 56))
    few_rows.gated(flow, weight, None, "silu")
    few_rows.add(x, weight, None, torch.zeros(num_rows, ROWS, dtype=dtype), norm)
    for head_dim in (64, 128):
        cache, places = torch.zeros(2, 8, 16, 4, head_dim, dtype=dtype), torch.zeros(num_rows, dtype=torch.int64)
        num_heads = ROWS // head_dim - 8
        rotation = Rotation(num_heads, torch.zeros(num_rows, head_dim), None, None, 1e-6, cache, places)
        few_rows.project_and_store(flow, [weight], torch.zeros(ROWS, dtype=dtype), rotation)


def look(made: Any) -> str:
    """Raises `AssertionError` where the assembly would be wrong, or numbers go a longer way than they should."""
    layouts = dict(re.findall(r"^#(\w+) = #ttg\.linear<\{(.*)\}>", made.asm["ttgir"], re.M))
    packed = re.findall(r"packed_element = 2 .* -> tensor<[^,]*, #(\w+)>", made.asm["ttgir"])
    assert packed, "no assembly on pairs"
    for name in packed:
        assert in_pairs(layouts[name]), f"a pair is not side by side: {layouts[name]}"
    loop = next(block for block in re.split(r"^\$L__BB\d+_\d+:", made.asm["ptx"], flags=re.M) if "mma.sync" in block)
    loop = loop[: loop.rindex("mma.sync")]
    assert "st.shared" not in loop, "numbers pass through memory"
    widths = set(re.findall(r"ld\.shared\.v(\d)", loop))
    assert widths - {"2"} == {"4"}  # Q5_K's upper bits are of 8 bytes
    registers, stack = usage(made)
    return f"{registers} registers, {stack} bytes of stack, {made.metadata.shared} of shared memory"


def main() -> None:
    with compiling(90):
        launch = JITFunction.run

        def looked_at(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
            made = launch(self, *args, grid=grid, **options)
            print(self.fn.__name__, look(made), flush=True)
            return made

        JITFunction.run = looked_at
        for dtype in (torch.bfloat16, torch.float16):
            for num_rows in (4, 16):
                products(num_rows, dtype, folder("int4", 128, zeros=num_rows == 4)(ROWS, COLUMNS))
        products(16, torch.bfloat16, folder("int4", 0)(ROWS, COLUMNS))
        for num_rows, kind in ((16, "Q4_K"), (4, "Q5_K"), (16, "Q6_K")):
            products(num_rows, torch.bfloat16, KINDS[kind](ROWS, COLUMNS))


if __name__ == "__main__":
    main()
