"""Products of Qwen2-7B's matrices in bf16 and as codes, on a GPU: python benchmarks/quantized.py --output FILE

Of each matrix and number of rows: milliseconds, bytes of weights a second and their share of what a copy reaches in the
same run, and how many times as fast as bf16. Weights are several copies in turn, so that no cache holds them; `fused`
is the operator of a layer with all that stands around its product. Every result is held against float64 first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from ingle.kernels import gpu
from ingle.kernels.coded import BITS, Coded
from ingle.kernels.flow import Flow
from ingle.kernels.gpu.codes import FORMATS
from ingle.model.layers import Linear, RMSNorm
from ingle.weights.coded_part import CodedPart
from ingle.weights.matrix import Weight

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
MATRICES = {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 1024, 4096)
KINDS = {
    "bf16": None,
    "int4-128": ("int4", 128, False),
    "int4-128-zeros": ("int4", 128, True),
    "int4-32": ("int4", 32, False),
    "int8-128": ("int8", 128, False),
    "int8-rows": ("int8", 0, False),
    "fp8-128": ("fp8", 128, False),
    "fp8-rows": ("fp8", 0, False),
    "fp8-128-inputs": ("fp8", 128, False),
    "fp8-rows-inputs": ("fp8", 0, False),
}
"""Kind, group size (0 for one a row), whether groups have zeros; with inputs, the model was made for FP8 inputs."""
BLOCKS = {"Q4_K": ("int4", 32), "Q5_K": ("int5", 32), "Q6_K": ("int6", 16), "Q8_0": ("int8", 32)}
"""GGUF's: kind and group size."""
_COPIED_BYTES = 300 << 20
"""Of weights in turn: five times what the second-level cache holds."""


def random_blocks(size_out: int, size_in: int, kind: str) -> Weight:
    code, group_size = BLOCKS[kind]
    shape, blocks = (size_out, size_in // group_size), (size_out, size_in // 256)
    codes = torch.randint(0, 2 ** sum(BITS[code]), (size_out, size_in), dtype=torch.uint8, device=DEVICE)
    steps = torch.randint(1, 64, shape, dtype=torch.uint8, device=DEVICE)
    factors = ((torch.rand(blocks, device=DEVICE) + 0.5) / 2000 / size_in**0.5).half()
    if kind == "Q8_0":
        held = Coded(code, codes, (steps / 6000 / size_in**0.5).half(), None, group_size, 1)
    elif kind == "Q6_K":
        held = Coded(code, codes, steps.to(torch.int8), None, group_size, 1, factors=factors)
    else:
        lows = torch.randint(0, 64, shape, dtype=torch.uint8, device=DEVICE)
        more = {"factors": factors, "minima": lows, "minimum_factors": -8 * factors}
        held = Coded(code, codes, steps, None, group_size, 1, **more)
    return Weight((CodedPart(held.into_planes(), DTYPE),))


def random_weight(size_out: int, size_in: int, kind: str) -> Weight:
    if kind in BLOCKS:
        return random_blocks(size_out, size_in, kind)
    if KINDS[kind] is None:
        return Weight.of((torch.randn(size_out, size_in, device=DEVICE) / size_in**0.5).to(DTYPE))
    code, group_size, has_zeros = KINDS[kind]
    groups = size_in // group_size if group_size else 1
    codes = torch.randint(
        0, 256, (size_out, size_in // FORMATS[code].columns_per_byte), device=DEVICE, dtype=torch.uint8
    )
    if code == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    largest = {"int4": 8, "int8": 128, "fp8": 100}[code]
    scales = ((torch.rand(size_out, groups, device=DEVICE) + 0.5) / largest / size_in**0.5).half()
    zeros = torch.randint(0, 16, (size_out, groups), device=DEVICE, dtype=torch.uint8) if has_zeros else None
    of_inputs = kind.endswith("inputs")
    coded = Coded.of(code, codes, scales, zeros, group_size or size_in, quantizes_inputs=of_inputs)
    return Weight((CodedPart(coded, DTYPE),))


def decoded(weight: Weight) -> torch.Tensor:
    (part,) = weight.parts
    return part.tensor if part.plain is not None else part.coded.decoded(slice(None), torch.float32)


def operators(name: str, num_rows: int, size_out: int, size_in: int) -> dict[str, Callable[[Weight], torch.Tensor]]:
    x = torch.randn(num_rows, size_in, device=DEVICE).to(DTYPE)
    norm = RMSNorm(torch.ones(size_in, device=DEVICE, dtype=DTYPE), 1e-6)
    flow = Flow(x, norm, x, x.float().square().sum(1, keepdim=True))
    done = {"product": lambda weight: weight.multiply(x)}
    if name == "gate_up":
        done["fused"] = lambda weight: gpu.project_gated(flow, Linear(weight), "silu")
    elif name in ("out", "down"):
        residual = torch.zeros(num_rows, size_out, device=DEVICE, dtype=DTYPE)
        other = RMSNorm(torch.ones(size_out, device=DEVICE, dtype=DTYPE), 1e-6)
        done["fused"] = lambda weight: gpu.project_and_add(x, Linear(weight), Flow(residual, other), other).residual
    return {**done, "exact": lambda weight: x.double() @ decoded(weight).double().T}


def milliseconds(run: Callable[[Weight], torch.Tensor], weights: list[Weight]) -> float:
    def all_of_them() -> None:
        for weight in weights:
            run(weight)

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=40, return_mode="median") / len(weights)


def copy_bandwidth() -> float:
    """Bytes read and written in a second."""
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), warmup=10, rep=50, return_mode="median")
    return 2 * source.numel() * 4 / ms * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *BLOCKS), default=(*KINDS, *BLOCKS))
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=tuple(MATRICES))
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, results = copy_bandwidth(), []
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for name in options.matrices:
        size_out, size_in = MATRICES[name]
        plain: dict[tuple[int, str], float] = {}
        for kind in dict.fromkeys(("bf16", *options.kinds)):
            first = random_weight(size_out, size_in, kind)
            copies = max(2, -(-_COPIED_BYTES // first.num_bytes))
            weights = [first, *(random_weight(size_out, size_in, kind) for _ in range(copies - 1))]
            for num_rows in options.rows:
                done = operators(name, num_rows, size_out, size_in)
                exact = done.pop("exact")(first)
                error = float((done["product"](first).double() - exact).norm() / exact.norm())
                for operator, run in done.items():
                    ms = milliseconds(run, weights)
                    plain.setdefault((num_rows, operator), ms)
                    result = {
                        "matrix": name, "kind": kind, "rows": num_rows, "operator": operator, "ms": ms,
                        "share": first.num_bytes / ms * 1e3 / bandwidth,
                        "tflop_per_s": 2 * num_rows * size_out * size_in / ms / 1e9,
                        "times_bf16": plain[num_rows, operator] / ms, "error": error,
                    }  # fmt: skip
                    results.append(result)
                    print(
                        f"{name:8} {kind:15} {num_rows:5} rows {operator:8} {ms * 1e3:9.1f} us "
                        f"{result['share']:6.1%} of a copy {result['tflop_per_s']:6.0f} TFLOP/s "
                        f"{result['times_bf16']:5.2f} x bf16 error {error:.1e}"
                    )
                    if error > (0.06 if kind.endswith("inputs") else 1e-2):
                        raise SystemExit(f"{name} in {kind} with {num_rows} rows is off by {error:.1e}")
            del weights, first
    if options.output:
        card = torch.cuda.get_device_name()
        options.output.write_text(json.dumps({"card": card, "copy": bandwidth, "results": results}, indent=1))


if __name__ == "__main__":
    main()
