"""Compiles products of few rows of codes for GPUs, without one, and looks at what the assembly in them relies on.

A script, for in tests Triton interprets: python -m tests.kernels.compile_lanes
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ingle.kernels.coded import Coded, CodedKind
from ingle.kernels.gpu import few_rows_coded, lanes
from ingle.kernels.gpu.codes import FORMATS
from ingle.kernels.gpu.endings import ADD, PLAIN, ROTATE, SILU

ROWS, COLUMNS = 4608, 3584
POINTERS = {
    "squares": "*fp32", "squares_in": "*fp32", "parts": "*fp32", "arrived": "*i32", "cos_sin": "*fp32",
    "kv_places": "*i64", "x_words": "*i32",
}  # fmt: skip
CASES: list[tuple[CodedKind, int, bool, int, int]] = [
    ("int4", 128, False, SILU, 1), ("int4", 128, True, ADD, 2), ("int4", 64, False, PLAIN, 1),
    ("int4", 32, False, PLAIN, 2), ("int8", 128, False, SILU, 2), ("int8", COLUMNS, False, ROTATE, 1),
    ("fp8", COLUMNS, False, SILU, 1), ("fp8", 128, False, ADD, 2),
]  # fmt: skip
"""Kind, group size, whether groups have zeros, the end, and eights of rows."""


def compiled(capability: int, dtype: torch.dtype, case: tuple[CodedKind, int, bool, int, int]) -> Any:
    kind, group, zeros, ending, eights = case
    width, groups = COLUMNS // FORMATS[kind].columns_per_byte, COLUMNS // group
    some = torch.empty(ROWS, groups, dtype=torch.uint8, device="meta") if zeros else None
    coded = Coded(
        kind, torch.empty(ROWS, width, dtype=torch.uint8, device="meta"), torch.empty(ROWS, groups, device="meta"),
        some, group, min(group, 128) // 2,
    )  # fmt: skip
    number = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    constants = {
        "IN": COLUMNS, "OUT": ROWS, "N": eights, "WARPS": 4, "EPILOGUE": ending, "NORMED": ending in (SILU, ROTATE),
        "BIASED": ending == ROTATE, "SQUARED": ending == ADD and dtype == torch.bfloat16, "HALF": 64, "NUM_HEADS": 28,
        "NUM_KV_HEADS": 4, "PAGE_SIZE": 16, "SQUARES": 256, "PDL": capability >= 90,
        "STRIPS": 1 if ending in (SILU, ROTATE) else 2, "SPLITS": 1, "EARLY": ending == ADD,
        **lanes.constants(coded, dtype, compiled=True),
    }  # fmt: skip
    kernel = few_rows_coded._few_rows_coded_kernel
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        divides = [["tt.divisibility", 16]]
        if name == "matrix":
            signature[name] = ("*i32", "*fp32", "*u8", "*fp16", "*fp16", "*fp16")
            attributes.update({(index, part): divides for part in range(6)})
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name.removesuffix("_ptr"), number)
            attributes[index,] = divides
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name == "x_stride":
                attributes[index,] = divides
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 1})


def in_pairs(layout: str) -> bool:
    """Whether the last dimension's neighbours are in neighbouring registers."""
    first = re.match(r"register = \[\[([\d, ]+)\]", layout)
    if first is not None:
        *others, last = (int(value) for value in first[1].split(","))
        return last == 1 and not any(others)
    sizes, order = (
        [int(value) for value in re.search(rf"{key} = \[([\d, ]+)\]", layout)[1].split(",")]
        for key in ("sizePerThread", "order")
    )
    return sizes[-1] == 2 and order[0] == len(sizes) - 1


def look(made: Any) -> str:
    """Raises `AssertionError` where the assembly would be wrong, or numbers go a longer way than they should."""
    layouts = dict(re.findall(r"^#(\w+) = #ttg\.(?:blocked|linear)<\{(.*)\}>", made.asm["ttgir"], re.M))
    packed = re.findall(r"packed_element = 2 .* -> tensor<[^,]*, #(\w+)>", made.asm["ttgir"])
    assert packed, "no assembly on pairs"
    for name in packed:
        assert in_pairs(layouts[name]), f"a pair is not side by side: {layouts[name]}"
    blocks = re.split(r"^\$L__BB\d+_\d+:", made.asm["ptx"], flags=re.M)
    loops = [block for block in blocks if "mma.sync" in block]
    assert loops and not any("shared" in block.split("bra", 1)[0] for block in loops), "numbers pass through memory"
    wide = max(len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", block)) for block in loops)
    return f"{wide} loads of 16 bytes"


def main() -> None:
    for capability in (90, 80):
        for dtype in (torch.bfloat16, torch.float16):
            for case in CASES:
                made = compiled(capability, dtype, case)
                print(capability, dtype, case, look(made), flush=True)


if __name__ == "__main__":
    main()
