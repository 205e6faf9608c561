from __future__ import annotations

from collections.abc import Sequence

import pytest

from ingle import facts
from ingle.channel import EngineInfo


def info(stored: dict[str, int], kept: Sequence[str] = (), expanded: Sequence[str] = ()) -> EngineInfo:
    return EngineInfo(
        max_model_len=4096, vocab_size=32000, max_num_seqs=64, num_pages=257, page_size=16, device="cpu",
        dtype="float16", kv_dtype="float16", product_dtype="bfloat16", factors=["16-bit integers", "bfloat16"],
        family="llama", writes_text=True, hidden_size=576,
        kernels="ingle's for AVX2", num_parameters=134_515_008,
        stored_types=stored, kept_types=list(kept), expanded_types=list(expanded), weight_bytes=269 << 20,
        kv_cache_bytes=3 << 30, notices=[], timings_s={},
    )  # fmt: skip


HOW = " on cpu, multiplied as 16-bit integers and bfloat16; kernels: ingle's for AVX2"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (info({"BF16": 10}), f"stored as BF16 100%; 0.26 GiB of weights{HOW}"),
        (info({"Q4_K": 9, "Q6_K": 1}, expanded=["Q4_K", "Q6_K"]), f"weights (Q4_K and Q6_K expanded at load){HOW}"),
        (info({"Q4_0": 9, "F32": 1}, ["Q4_0"]), f"Q4_0 90%, F32 10%; 0.26 GiB of weights (Q4_0 kept as stored){HOW}"),
        (info({"Q4_0": 9, "TQ1_0": 1}, ["Q4_0"], ["TQ1_0"]), "(Q4_0 kept as stored, TQ1_0 expanded at load)"),
        (info({}), "stored as random numbers"),
    ],
)  # fmt: skip
def test_how_weights_are_stored_and_held(told: EngineInfo, words: str) -> None:
    assert words in facts.loaded(told)


def test_one_line_says_all() -> None:
    line = facts.started(info({"F16": 1}), {"temperature": 0.6, "top_k": 20})
    assert line.startswith("llama, 134.5 M parameters, stored as F16 100%; ")
    assert line.endswith(
        "context 4096 tokens, 257 pages of 16 (3.00 GiB in float16); the model's sampling defaults: "
        "temperature 0.6, top_k 20"
    )


@pytest.mark.parametrize(("number", "words"), [(12, "12"), (1200, "1.2 k"), (7_240_000_000, "7.2 B")])
def test_counts(number: int, words: str) -> None:
    assert facts.count(number) == words


@pytest.mark.parametrize(("number", "words"), [(500, "0.5 KiB"), (50 << 20, "50.00 MiB"), (1 << 30, "1.00 GiB")])
def test_sizes(number: int, words: str) -> None:
    assert facts.size(number) == words
