"""A layer of Qwen2-7B's shape but for its attention, in bf16 and FP8, on a GPU: python benchmarks/fp8.py --output FILE

Microseconds of its four products and all that stands around them, by rows: with inputs of FP8 and what makes them so
fused to norms and activation, by kernels of their own, with all sums left in the tensor cores, and with inputs of 16
bits. Then those kernels alone. Layers are two in turn, so that no cache holds their weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ingle.kernels import gpu
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Rotation
from ingle.kernels.gpu import elementwise, fp8, fp8_rows, vector
from ingle.kernels.gpu.scaled import Product
from ingle.model.layers import GatedMLP, Linear, RMSNorm
from ingle.weights.coded_part import CodedPart
from ingle.weights.matrix import Weight

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
SIZE, INNER, HEADS, KV_HEADS, HEAD_DIM = 3584, 18944, 28, 4, 128
ROWS = (1, 2, 4, 8, 16, 17, 36, 64, 128, 256, 512, 1024, 4096)
VARIANTS: dict[str, dict[str, bool | int]] = {
    "bf16": {},
    "fp8": {},
    "apart": {"FUSED": False},
    "fast": {"FAST_INPUTS": 1 << 20},
    "slow": {"FAST_INPUTS": 0},
    "16 bits": {"ENABLED": False},
}
"""And the constants of `ingle.kernels.gpu.fp8` that they change."""


class Layer(NamedTuple):
    qkv: Linear
    out: Linear
    mlp: GatedMLP
    input_norm: RMSNorm
    mlp_norm: RMSNorm

    @classmethod
    def random(cls, coded: bool) -> Layer:
        def linear(size_out: int, size_in: int, *, bias: bool = False) -> Linear:
            plain = (torch.randn(size_out, size_in, device=DEVICE) / size_in**0.5).to(DTYPE)
            weight = Weight((CodedPart(rounded(plain), DTYPE),)) if coded else Weight.of(plain)
            return Linear(weight, torch.randn(size_out, device=DEVICE).to(DTYPE) if bias else None)

        qkv = linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, SIZE, bias=True)
        mlp = GatedMLP(linear(2 * INNER, SIZE), linear(SIZE, INNER), "silu")
        ones = torch.ones(SIZE, device=DEVICE, dtype=DTYPE)
        norms = (RMSNorm(ones, 1e-6, before.weight) for before in (qkv, mlp.gate_up))
        return cls(qkv, linear(SIZE, HEADS * HEAD_DIM), mlp, *norms)

    def __call__(self, flow: Flow, attended: torch.Tensor, rotation: Rotation, norm: RMSNorm) -> Flow:
        gpu.project_and_store(flow, self.qkv, rotation)
        return self.mlp.add_to(self.out.add_to(flow, attended, self.mlp_norm, None), norm, None)


def rounded(plain: torch.Tensor) -> Coded:
    scales = plain.abs().amax(1, keepdim=True).float() / 448
    codes = (plain.float() / scales).to(torch.float8_e4m3fn).view(torch.uint8)
    return Coded.of("fp8", codes, scales, None, plain.shape[1], quantizes_inputs=True)


def microseconds(run: Callable[[], object], times: int) -> float:
    """Of one of so many that `run` queues."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, warmup=8, rep=30, return_mode="median") / times * 1e3


def time_layers(layers: list[Layer], num_rows: int) -> float:
    residual = torch.randn(num_rows, SIZE, device=DEVICE).to(DTYPE)
    attended = torch.randn(num_rows, HEADS * HEAD_DIM, device=DEVICE).to(DTYPE)
    cache = torch.zeros(2, num_rows // 16 + 1, 16, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    cos_sin = torch.randn(num_rows, HEAD_DIM, device=DEVICE)
    rotation = Rotation(HEADS, cos_sin, None, None, 0.0, cache, torch.arange(num_rows, device=DEVICE))

    def run() -> None:
        flow = Flow(residual, layers[0].input_norm)
        for index in range(4):
            norm = layers[(index + 1) % 2].input_norm
            flow = layers[index % 2](flow, attended, rotation, norm)

    return microseconds(run, 4)


def time_kernels(num_rows: int) -> dict[str, float]:
    x, residual = (torch.randn(num_rows, SIZE, device=DEVICE).to(DTYPE) for _ in range(2))
    sums = torch.randn(num_rows, 2 * INNER, device=DEVICE).to(DTYPE)
    inner = torch.randn(num_rows, INNER, device=DEVICE).to(DTYPE)
    norm = RMSNorm(torch.ones(SIZE, device=DEVICE, dtype=DTYPE), 1e-6)
    rows, outs = torch.rand(num_rows, 1, device=DEVICE), torch.rand(1, SIZE, device=DEVICE)
    scaled, whole = Product(x, rows, outs, None), Product(sums, None, None, None)
    kernels: dict[str, Callable[[], object]] = {
        "add + norm": lambda: elementwise.add_rms_norm(x, residual, norm.weight, norm.eps),
        "scale + add + norm + FP8": lambda: fp8_rows.add_normed(scaled, residual, norm),
        "gated": lambda: elementwise.gated(sums, "silu"),
        "gated + FP8": lambda: fp8_rows.gated(whole, x, "silu"),
        "gated + FP8 by 128": lambda: fp8_rows.gated(whole, x, "silu", 128),
        "FP8 of 3584": lambda: fp8_rows.quantize(x),
        "FP8 of 18944": lambda: fp8_rows.quantize(inner),
        "scale": lambda: fp8.finished(Product(x, rows, outs, None), DTYPE),
    }

    def repeated(kernel: Callable[[], object]) -> Callable[[], object]:
        return lambda: [kernel() for _ in range(8)]

    return {name: microseconds(repeated(kernel), 8) for name, kernel in kernels.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = {coded: [Layer.random(coded) for _ in range(2)] for coded in (False, True)}
    usual = {name: getattr(fp8, name) for each in VARIANTS.values() for name in each}
    fp8_rows_at_most = vector.FP8_ROWS
    results: list[dict[str, object]] = []
    print(f"{'a layer, us':12}", *(f"{variant:>8}" for variant in options.variants))
    for num_rows in options.rows:
        line = []
        for variant in options.variants:
            for name, value in {**usual, **VARIANTS[variant]}.items():
                setattr(fp8, name, value)
            vector.FP8_ROWS = 0 if variant == "16 bits" else fp8_rows_at_most
            us = time_layers(layers[variant != "bf16"], num_rows)
            line.append(us)
            results.append({"rows": num_rows, "variant": variant, "layer_us": us})
        print(f"{num_rows:12}", *(f"{us:8.1f}" for us in line), flush=True)
    for num_rows in (64, 256, 4096):
        for name, us in time_kernels(num_rows).items():
            results.append({"rows": num_rows, "kernel": name, "us": us})
            print(f"{num_rows:5} rows {name:26} {us:7.1f} us", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"card": torch.cuda.get_device_name(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
