"""What kernels of codes take of a card that is not here: python -m tests.kernels.resources 90 [KIND…]

Compiles the products of Qwen2-7B's layers with one, 2, 8 and 16 rows, and prints registers, bytes of the stack (what
does not fit registers), bytes of shared memory, and how many programs an SM of a Hopper card runs at once.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernels.compiled import compiling  # before Triton: it is to compile

import torch  # isort: skip
import triton
from triton.runtime.jit import JITFunction

from ingle.kernels import gpu
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Rotation
from ingle.model.layers import Linear, RMSNorm
from ingle.weights.coded_part import CodedPart
from ingle.weights.matrix import Weight

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, DTYPE = 3584, 18944, 28, 4, 128, torch.bfloat16
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def folder(kind: str, group_size: int, *, zeros: bool = False) -> Callable[[int, int], Coded]:
    def make(rows: int, columns: int) -> Coded:
        size = group_size or columns
        codes = torch.zeros(rows, columns // 2 if kind == "int4" else columns, dtype=torch.uint8)
        held = torch.zeros(rows, columns // size, dtype=torch.uint8) if zeros else None
        return Coded.of(kind, codes, torch.ones(rows, columns // size).half(), held, size)  # type: ignore[arg-type]

    return make


def blocks(kind: str, group_size: int, *, minima: bool = False) -> Callable[[int, int], Coded]:
    def make(rows: int, columns: int) -> Coded:
        shape, factors = (rows, columns // group_size), torch.ones(rows, columns // 256).half()
        steps = torch.zeros(shape, dtype=torch.uint8 if minima else torch.int8)
        more: dict[str, Any] = {"minima": steps, "minimum_factors": factors} if minima else {}
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        return Coded(kind, codes, steps, None, group_size, 1, factors=factors, **more).into_planes()  # type: ignore[arg-type]

    return make


KINDS = {
    "int4-128": folder("int4", 128),
    "int4-128-zeros": folder("int4", 128, zeros=True),
    "int8-128": folder("int8", 128),
    "fp8-rows": folder("fp8", 0),
    "Q4_K": blocks("int4", 32, minima=True),
    "Q5_K": blocks("int5", 32, minima=True),
    "Q6_K": blocks("int6", 16),
}


def layer(make: Callable[[int, int], Coded], rows: int) -> None:
    def linear(size_out: int, size_in: int) -> Linear:
        return Linear(Weight((CodedPart(make(size_out, size_in), DTYPE),)))

    x, norm = torch.zeros(rows, HIDDEN, dtype=DTYPE), RMSNorm(torch.ones(HIDDEN, dtype=DTYPE), 1e-6)
    flow = Flow(x, norm, x, torch.zeros(rows, HIDDEN // 16)) if rows > 2 else Flow(x, norm)
    cache, places = torch.zeros(2, 8, 16, KV_HEADS, HEAD_DIM, dtype=DTYPE), torch.zeros(rows, dtype=torch.int64)
    rotation = Rotation(HEADS, torch.zeros(rows, HEAD_DIM), None, None, 1e-6, cache, places)
    gpu.project_and_store(flow, linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), rotation)
    gpu.project_and_add(x, linear(HIDDEN, HIDDEN), flow, norm)
    gpu.project_gated(flow, linear(2 * INNER, HIDDEN), "silu")
    gpu.project_and_add(torch.zeros(rows, INNER, dtype=DTYPE), linear(HIDDEN, INNER), flow, norm)


def usage(made: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    capability, *kinds = sys.argv[1:]
    with compiling(int(capability)):
        launch, label, seen = JITFunction.run, "", set()

        def told(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
            made = launch(self, *args, grid=grid, **options)
            if any(part in self.fn.__name__ for part in ("coded", "ring", "blocks")) and made.hash not in seen:
                seen.add(made.hash)
                registers, stack = usage(made)
                threads, shared = 32 * made.metadata.num_warps, made.metadata.shared
                at_once = min((1 << 16) // (-(-registers // 8) * 8 * threads), (227 << 10) // (shared + 1024))
                print(
                    f"{label:18} {self.fn.__name__:26} {grid!s:10} {registers:3} registers, {stack:3} bytes of stack,"
                    f" {shared:6} of shared memory, {at_once:2} at once of {threads} threads",
                    flush=True,
                )
            return made

        JITFunction.run = told
        for kind in kinds or KINDS:
            for rows in (1, 2, 8, 16):
                label = f"{kind} {rows}"
                layer(KINDS[kind], rows)


if __name__ == "__main__":
    main()
