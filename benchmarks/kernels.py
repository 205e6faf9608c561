"""Times the GPU kernels one by one against the memory bandwidth they could reach: python benchmarks/kernels.py

Decode attention over even and ragged lengths, several buffers in turn so that no cache holds the input; prefill
attention over whole prompts; a mixture of experts, routing included, over rows that choose theirs at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
import triton

from ingle.kernels import gpu
from ingle.kernels.batch import Batch, StepInputs, query_block
from ingle.kernels.gpu import attention
from ingle.kernels.options import AttentionOptions, RouterConfig

DEVICE = torch.device("cuda")
MIXTURES = {
    "qwen3-30b-a3b": (RouterConfig(128, 8, norm_topk_prob=True), 2048, 768),
    "mixtral-8x7b": (RouterConfig(8, 2, norm_topk_prob=True), 4096, 14336),
}
"""Router, hidden size, intermediate size of an expert."""


def decode_batch(lengths: list[int], page_size: int, generator: torch.Generator) -> tuple[Batch, int]:
    """Decoding sequences over shuffled pages; also the number of pages."""
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = 1 + sum(pages_of)
    order = iter((1 + torch.randperm(num_pages - 1, generator=generator)).tolist())
    table = torch.zeros(len(lengths), max(pages_of), dtype=torch.int32)
    for row, count in enumerate(pages_of):
        table[row, :count] = torch.tensor([next(order) for _ in range(count)], dtype=torch.int32)
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    kv_lengths = torch.tensor(lengths, device=DEVICE)
    inputs = StepInputs(*[empty] * len(StepInputs._fields))._replace(
        slots=torch.arange(len(lengths), device=DEVICE), kv_lengths=kv_lengths, decode_lengths=kv_lengths
    )
    return Batch(inputs, empty, empty, table.to(DEVICE), len(lengths), 0, []), num_pages


def time_decode(lengths: list[int], heads: int, kv_heads: int, head_dim: int, page_size: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    batch, num_pages = decode_batch(lengths, page_size, generator)
    shape = (2, num_pages, page_size, kv_heads, head_dim)
    num_bytes = 2 * sum(lengths) * kv_heads * head_dim * 2
    copies = max(2, -(-200_000_000 // num_bytes))
    caches = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    q = torch.randn(len(lengths), heads, head_dim, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        for cache in caches:
            attention.paged_attention(q, cache, batch, AttentionOptions(head_dim**-0.5))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    ms = triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / copies
    return {"us": ms * 1e3, "gb_per_s": num_bytes / ms / 1e6}


def time_prefill(lengths: list[int], heads: int, kv_heads: int, head_dim: int, page_size: int) -> dict:
    """Whole prompts of these lengths, nothing cached before them."""
    generator = torch.Generator().manual_seed(0)
    batch, num_pages = decode_batch(lengths, page_size, generator)
    starts = [0, *itertools.accumulate(lengths)]
    blocks = [
        (seq, starts[seq] + offset)
        for seq, length in enumerate(lengths)
        for offset in range(0, length, query_block(head_dim))
    ]
    batch.inputs = batch.inputs._replace(
        query_starts=torch.tensor(starts, device=DEVICE),
        query_blocks=torch.tensor(blocks, device=DEVICE).view(-1),
        num_query_blocks=torch.tensor([len(blocks)], device=DEVICE),
    )
    batch.num_decodes, batch.num_blocks = 0, len(blocks)
    cache = torch.randn(2, num_pages, page_size, kv_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(sum(lengths), heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    ms = triton.testing.do_bench(
        lambda: attention.paged_attention(q, cache, batch, AttentionOptions(head_dim**-0.5)),
        warmup=5,
        rep=30,
        return_mode="median",
    )
    flops = sum(4 * heads * head_dim * length * (length + 1) / 2 for length in lengths)
    return {"us": ms * 1e3, "tflop_per_s": flops / ms / 1e9}


def time_experts(num_rows: int, router: RouterConfig, hidden: int, inner: int) -> dict:
    """Router scores to sum: bytes are those of the experts that are chosen, once, whatever the rows."""
    copies = 8 if num_rows <= 256 else 1
    scores = [torch.randn(num_rows, router.num_experts, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(num_rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    gate_up = torch.randn(router.num_experts, 2 * inner, hidden, device=DEVICE, dtype=torch.bfloat16)
    down = torch.randn(router.num_experts, hidden, inner, device=DEVICE, dtype=torch.bfloat16)
    touched = sum(gpu.route(logits, None, router)[0].unique().numel() for logits in scores) / copies

    def run() -> None:
        for logits in scores:
            gpu.experts(x, *gpu.route(logits, None, router), gate_up, down, "silu")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    ms = triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / copies
    parameters = 3 * hidden * inner
    return {
        "us": ms * 1e3,
        "gb_per_s": touched * parameters * 2 / ms / 1e6,
        "tflop_per_s": 2 * num_rows * router.top_k * parameters / ms / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ragged = torch.randint(100, 2048, (256,), generator=torch.Generator().manual_seed(1)).tolist()
    cases = {
        "1 x 400": [400],
        "1 x 4000": [4000],
        "36 x 300": [300] * 36,
        "256 x 260": [260] * 256,
        "256 ragged": ragged,
    }
    models = {"qwen3-0.6b": (16, 8, 128), "qwen2-7b": (28, 4, 128)}
    results = []
    for model, (heads, kv_heads, head_dim) in models.items():
        for name, lengths in cases.items():
            figures = time_decode(lengths, heads, kv_heads, head_dim, 16)
            results.append({"kernel": "decode attention", "model": model, "case": name, **figures})
            print(f"{model:12} decode  {name:12} {figures['us']:8.1f} us {figures['gb_per_s']:8.0f} GB/s")
        for name, lengths in {"4 x 2048": [2048] * 4, "16 x 512": [512] * 16}.items():
            figures = time_prefill(lengths, heads, kv_heads, head_dim, 16)
            results.append({"kernel": "prefill attention", "model": model, "case": name, **figures})
            print(f"{model:12} prefill {name:12} {figures['us']:8.1f} us {figures['tflop_per_s']:8.0f} TFLOP/s")
    for model, (router, hidden, inner) in MIXTURES.items():
        for num_rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192):
            figures = time_experts(num_rows, router, hidden, inner)
            results.append({"kernel": "experts", "model": model, "case": str(num_rows), **figures})
            print(
                f"{model:14} experts {num_rows:5} rows {figures['us']:8.1f} us {figures['gb_per_s']:6.0f} GB/s "
                f"{figures['tflop_per_s']:6.1f} TFLOP/s"
            )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
