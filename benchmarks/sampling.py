"""Times what a GPU does between logits and tokens, as a CUDA graph: PYTHONPATH=src python benchmarks/sampling.py

256 rows of a vocabulary of 151,936 by default. Prints JSON: milliseconds of a step's sampling, and how many of its
tokens are those of plain PyTorch (a few may differ, where a draw falls between two tokens' masses).
"""

from __future__ import annotations

import argparse
import json

import torch
import triton

from ingle.kernels import gpu, reference_sampling
from ingle.kernels.sampling import (
    FREQUENCY,
    MIN_P,
    NUM_BIASES,
    PROMPT_FLAG,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Adjustments,
    Features,
    SamplingTables,
    all_allowed,
)

DEVICE = torch.device("cuda")


def tables(num_rows: int, vocab_size: int, **values: float) -> SamplingTables:
    made = SamplingTables.allocate(num_rows + 1, vocab_size, DEVICE)
    made.ints[:, 0] = torch.arange(num_rows + 1)
    for name, value in values.items():
        if name == "top_k":
            made.ints[:, TOP_K] = int(value)
        elif name == "biases":
            made.ints[:, NUM_BIASES] = int(value)
        else:
            column = {"temperature": TEMPERATURE, "top_p": TOP_P, "min_p": MIN_P, "repetition": REPETITION,
                      "frequency": FREQUENCY}[name]  # fmt: skip
            made.floats[:, column] = value
    made.adjustments = Adjustments.allocate(num_rows + 1, vocab_size, DEVICE)
    seen = torch.randint(vocab_size, (num_rows + 1, 600), device=DEVICE)
    made.adjustments.counts.scatter_(1, seen, PROMPT_FLAG + 1)
    made.adjustments.bias_ids[:] = torch.randperm(vocab_size, device=DEVICE)[: made.adjustments.bias_ids.shape[1]]
    made.adjustments.biases[:] = 2.0
    made.masks = all_allowed(num_rows + 1, vocab_size, DEVICE)
    made.masks[:, ::3] = 0x55555555
    return made


CUT = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
CASES: dict[str, tuple[Features, dict[str, float]]] = {
    "greedy": (Features(), {}),
    "drawn": (Features(), {"temperature": 0.8}),
    "top-k 50": (Features(filtered=True), {"temperature": 0.8, "top_k": 50}),
    "top-p 0.9": (Features(filtered=True), {"temperature": 0.8, "top_p": 0.9}),
    "min-p 0.05": (Features(filtered=True), {"temperature": 0.8, "min_p": 0.05}),
    "top-k 50, top-p 0.9": (Features(filtered=True), CUT),
    "repetition 1.1, top-k 50, top-p 0.9": (Features(filtered=True, adjusted=True), {"repetition": 1.1, **CUT}),
    "the same, 300 biases": (Features(filtered=True, adjusted=True), {"repetition": 1.1, "biases": 300, **CUT}),
    "the same, masks": (
        Features(filtered=True, adjusted=True, masked=True), {"repetition": 1.1, "biases": 300, **CUT}
    ),
    "drawn, 5 log probabilities": (Features(num_logprobs=5), {"temperature": 0.8}),
    "drawn, 20 log probabilities": (Features(num_logprobs=20), {"temperature": 0.8}),
    "greedy, 5 log probabilities": (Features(num_logprobs=5), {}),
}  # fmt: skip


def measure(logits: torch.Tensor, features: Features, values: dict[str, float]) -> dict[str, float]:
    num_rows, vocab_size = logits.shape
    slots = torch.arange(num_rows, device=DEVICE)
    positions = slots + 700
    made = tables(num_rows, vocab_size, **values)
    assert made.adjustments is not None
    before = made.adjustments.counts.clone()
    ours = gpu.sample(logits, slots, positions, made, features)
    made.adjustments.counts.copy_(before)
    theirs = reference_sampling.sample(logits, slots, positions, made, features)
    result = {"same_tokens": int((ours.token_ids == theirs.token_ids).sum())}
    if ours.logprobs is not None:
        expected = reference_sampling.logprobs(logits, ours.token_ids, ours.logprobs.token_ids.shape[1] - 1)
        result["logprob_error"] = float((ours.logprobs.values - expected.values).abs().max())
        result["same_ranks"] = int((ours.logprobs.ranks == expected.ranks).sum())
    del theirs, before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.sample(logits, slots, positions, made, features)
    result["ms"] = round(triton.testing.do_bench(graph.replay, warmup=20, rep=100, return_mode="median"), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--spread", type=float, default=2.5, help="standard deviation of the logits")
    args = parser.parse_args()
    torch.manual_seed(0)
    for rows in args.rows:
        for dtype in args.dtypes:
            logits = (torch.randn(rows, args.vocab, device=DEVICE) * args.spread).to(getattr(torch, dtype))
            for name, (features, values) in CASES.items():
                found = measure(logits, features, values)
                print(json.dumps({"rows": rows, "dtype": dtype, "case": name, **found}), flush=True)


if __name__ == "__main__":
    main()
