"""Times attention over keys and values in bf16 and in codes, on a GPU: python benchmarks/kv_cache.py --output FILE

Of each number of sequences and context: microseconds, bytes of keys, values and scales a second, and how many times as
fast as bf16. Layers' caches are taken in turn, so that no second-level cache holds them. `--tilings` tries others than
the kernels' own, for decodes of the kernels that are not Hopper's alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton

from ingle.kernels.batch import Batch, KvCache, StepInputs, query_block
from ingle.kernels.gpu import attention, decode_codes
from ingle.kernels.gpu.heads import DecodeTiling
from ingle.kernels.options import AttentionOptions
from ingle.kv import KvGroup, KvSpec

DEVICE = torch.device("cuda")
KINDS = ("bfloat16", "int8", "fp8_e4m3", "fp8_e5m2")
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 28, 4, 128, 16
DECODES = ((1, 1000), (1, 12000), (1, 128000), (4, 4000), (16, 1000), (16, 12000), (64, 2000), (256, 500))
PROMPTS = ((4, 2048), (1, 16384))
DECODE_TILINGS = (
    (64, 1, 2, 8, None), (64, 1, 2, 6, None), (32, 1, 2, 9, None), (32, 1, 2, 12, 168), (64, 2, 2, 5, None),
    (64, 2, 2, 6, 168), (128, 2, 2, 4, None), (128, 4, 2, 3, 168), (128, 4, 2, 2, None), (256, 4, 2, 2, None),
)  # fmt: skip
PROMPT_TILINGS = ((128, 4, None), (64, 4, 168), (64, 4, 200))
_COPIED_BYTES = 250 << 20


def batch_of(lengths: list[int], *, prompts: bool) -> tuple[Batch, int]:
    """Over shuffled pages; also their number."""
    pages_of = [-(-length // PAGE_SIZE) for length in lengths]
    order = 1 + torch.randperm(sum(pages_of), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = torch.zeros(len(lengths), max(pages_of), dtype=torch.int32)
    for row, pages in enumerate(order.split(pages_of)):
        table[row, : len(pages)] = pages
    starts = [0, *itertools.accumulate(lengths)] if prompts else list(range(len(lengths) + 1))
    size = query_block(HEAD_DIM)
    blocks = [(seq, starts[seq] + at) for seq, length in enumerate(lengths) for at in range(0, length, size)]
    empty, kv_lengths = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.tensor(lengths, device=DEVICE)
    inputs = StepInputs(*[empty] * len(StepInputs._fields))._replace(
        slots=torch.arange(len(lengths), device=DEVICE),
        kv_lengths=kv_lengths,
        decode_lengths=kv_lengths,
        query_starts=torch.tensor(starts, device=DEVICE),
        query_blocks=torch.tensor(blocks, device=DEVICE).view(-1),
        num_query_blocks=torch.tensor([len(blocks)], device=DEVICE),
    )
    num_decodes, num_blocks = (0, len(blocks)) if prompts else (len(lengths), 0)
    return Batch(inputs, empty, (empty,), (table.to(DEVICE),), num_decodes, num_blocks, []), 1 + sum(pages_of)


def caches_of(kind: str, num_pages: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    spec = KvSpec((KvGroup((0,), None),), 2, KV_HEADS, HEAD_DIM, kind)
    found = []
    for _ in range(count):
        raw = torch.zeros(1, 2, num_pages, spec.side_bytes(PAGE_SIZE), dtype=torch.uint8, device=DEVICE)
        cache = KvCache.over(spec, raw, PAGE_SIZE)
        if cache.scales is None:
            cache.pages.normal_()
        else:
            cache.pages.view(torch.uint8).random_(0, 120)
            cache.scales.fill_(0.01)
        found.append((cache.pages[0], None if cache.scales is None else cache.scales[0]))
    return found


def time_of(kind: str, lengths: list[int], *, prompts: bool) -> dict[str, float]:
    batch, num_pages = batch_of(lengths, prompts=prompts)
    spec = KvSpec((KvGroup((0,), None),), 2, KV_HEADS, HEAD_DIM, kind)
    num_bytes = sum(lengths) * spec.layer_bytes
    caches = caches_of(kind, num_pages, 1 if prompts else max(2, -(-_COPIED_BYTES // num_bytes)))
    q = torch.randn(sum(lengths) if prompts else len(lengths), HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        for cache, scales in caches:
            attention.paged_attention(q, cache, batch, AttentionOptions(HEAD_DIM**-0.5), scales)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    ms = triton.testing.do_bench(graph.replay, warmup=3, rep=20, return_mode="median") / len(caches)
    if prompts:
        flops = sum(2 * HEADS * HEAD_DIM * length * (length + 1) for length in lengths)
        return {"us": ms * 1e3, "tflop_per_s": flops / ms / 1e9}
    return {"us": ms * 1e3, "gb_per_s": num_bytes / ms / 1e6}


@contextmanager
def tiling(*shape: int | None) -> Iterator[None]:
    """Of a decode: a `DecodeTiling`."""
    found = DecodeTiling(*shape)
    with (
        mock.patch.object(attention, "_hopper", lambda *args: None),
        mock.patch.object(attention, "_decode_tiling", lambda *args: found),
        mock.patch.object(decode_codes, "tiling", lambda *args: found),
    ):
        yield


@contextmanager
def prompt_tiling(keys: int, warps: int, registers: int | None) -> Iterator[None]:
    with mock.patch.object(
        attention, "_prefill_tiling", lambda q, coded: attention._PrefillTiling(keys, warps, registers)
    ):
        yield


def tilings(kinds: list[str]) -> Iterator[tuple[str, bool, tuple[int | None, ...]]]:
    """Kind, whether of prompts, and what `tiling` or `prompt_tiling` are given."""
    for kind in kinds:
        yield from ((kind, False, shape) for shape in DECODE_TILINGS)
        yield from ((kind, True, shape) for shape in PROMPT_TILINGS)


def try_tilings(kinds: list[str], ready: tuple[int, int] | None) -> list[dict[str, object]]:
    """With `ready` (i, n), only compiles every n-th from the i-th on: to be done beside others."""
    results = []
    for index, (kind, prompts, shape) in enumerate(tilings(kinds)):
        if ready is not None and index % ready[1] != ready[0]:
            continue
        shapes = PROMPTS[:1] if prompts else ((16, 12000), (1, 12000), (256, 500))
        figures = {}
        try:
            with prompt_tiling(*shape) if prompts else tiling(*shape):
                for count, length in shapes if ready is None else shapes[:1]:
                    found = time_of(kind, [length] * count, prompts=prompts)
                    figures |= {f"{name} {count} x {length}": figure for name, figure in found.items()}
        except Exception as error:  # what a device lacks registers or memory for
            print(kind, shape, str(error)[:80])
            continue
        results.append({"kind": kind, "prompts": prompts, "tiling": shape, **figures})
        if ready is None:
            told = (f"{name} {figure:.0f}" for name, figure in figures.items())
            print(kind, "prompts" if prompts else "decodes", shape, *told, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tilings", action="store_true", help="and nothing else")
    parser.add_argument("--ready", nargs=2, type=int, help="I N: compile every N-th tiling, from the I-th on")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    if options.ready:
        try_tilings(options.kinds, tuple(options.ready))
        return
    results: list[dict[str, object]] = []
    for count, length in () if options.tilings else DECODES:
        figures = {kind: time_of(kind, [length] * count, prompts=False) for kind in options.kinds}
        base = figures[options.kinds[0]]["us"]
        for kind, found in figures.items():
            results.append({"sequences": count, "context": length, "kind": kind, **found})
        print(f"{count:4} x {length:6}", *(
            f"{kind} {f['us']:8.1f} us {f['gb_per_s']:5.0f} GB/s x{base / f['us']:.2f}" for kind, f in figures.items()
        ), flush=True)  # fmt: skip
    for count, length in () if options.tilings else PROMPTS:
        figures = {kind: time_of(kind, [length] * count, prompts=True) for kind in options.kinds}
        for kind, found in figures.items():
            results.append({"prompts": count, "length": length, "kind": kind, **found})
        print(f"{count:4} prompts of {length:6}", *(
            f"{kind} {f['us']:8.1f} us {f['tflop_per_s']:5.0f} TFLOP/s" for kind, f in figures.items()
        ), flush=True)  # fmt: skip
    if options.tilings:
        results += try_tilings(options.kinds, None)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
