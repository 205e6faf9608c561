"""Engines whose keys and values are held in codes of a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.memory import plan_memory
from ingle.errors import ConfigError, IngleError
from ingle.kv import CODES, KvGroup, KvSpec
from ingle.request import EngineRequest, SamplingParams
from ingle.text.load import load_tokenizer
from tests.kernels.coded_kv import KINDS
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, engine_for, engine_logits, greedy, random_prompt, restrict, run, save_checkpoint
from tests.text import corpora

NEAR = {"int8": 0.01, "fp8_e4m3": 0.05, "fp8_e5m2": 0.08}
"""Norm of what logits differ by from those of a cache of float32, over their own norm."""
FAMILIES = {"llama": ("llama", {}), "gemma3": CHECKPOINTS["gemma3"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_checkpoint(tmp_path_factory.mktemp(name), model_type, **overrides)
        for name, (model_type, overrides) in FAMILIES.items()
    }


def test_what_a_token_takes() -> None:
    """128 bytes and a scale of 4 in place of 256, of each head's key and value."""
    assert KINDS == CODES
    for kind in CODES:
        spec = KvSpec((KvGroup((0, 1, 2), None),), 2, 4, 128, kind)
        assert spec.token_bytes == 3 * 2 * 4 * (128 + 4)
        assert spec.page_bytes(16) == 16 * spec.token_bytes == 3 * 2 * spec.side_bytes(16)


@pytest.mark.parametrize("cpu_kernels", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "kind"), [("llama", "int8"), ("gemma3", "fp8_e4m3"), ("llama", "fp8_e5m2")])
def test_logits_are_near_those_of_floats(family: str, kind: str, cpu_kernels: str, folders: dict[str, Path]) -> None:
    prompt = random_prompt(1, 150)
    engines = [
        engine_for(folders[family], block_size=8, cpu_kernels=cpu_kernels, kv_cache_dtype=dtype)
        for dtype in ("auto", kind)
    ]
    exact, ours = (engine_logits(engine, prompt) for engine in engines)
    assert 1e-5 < (ours - exact).norm() / exact.norm() < NEAR[kind]
    same = (ours.argmax(-1) == exact.argmax(-1)).float().mean()
    assert same > (0.97 if kind == "int8" else 0.85)


@pytest.mark.parametrize(
    ("family", "kind", "cpu_kernels"),
    [("gemma3", "int8", "auto"), pytest.param("llama", "fp8", "torch", marks=pytest.mark.slow)],
)
def test_batches_chunks_prefixes_and_preemption_change_nothing(
    family: str, kind: str, cpu_kernels: str, folders: dict[str, Path]
) -> None:
    """A key's codes are its own: as one prompt read at once gives them, so do chunks of it, beside whatever others."""
    alone = engine_for(folders[family], block_size=8, cpu_kernels=cpu_kernels, kv_cache_dtype=kind)
    tight = restrict(alone, num_pages=120 if family == "gemma3" else 40, max_num_batched_tokens=24, max_num_seqs=6)
    start = random_prompt(0, 40)
    prompts = {str(i): start[: 8 * (i % 5)] + random_prompt(i + 1, 5 + 7 * i) for i in range(8)}
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = {name: greedy(alone, prompt, 12) for name, prompt in prompts.items()}
    for _ in range(2):  # the second time over prefixes of the first
        assert run(tight, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()]) == expected
    if family == "gemma3":  # whose windows gave the prompt's first pages back
        return
    assert collect(tight, [EngineRequest("again", prompts["7"], params)])["again"][0].num_cached_tokens > 0


def test_chunks_write_the_bytes_of_a_prompt_read_at_once(folders: dict[str, Path]) -> None:
    prompt, caches = random_prompt(3, 96), []
    for chunk in (96, 17):
        whole = engine_for(folders["llama"], block_size=8, kv_cache_dtype="int8", max_num_batched_tokens=chunk)
        greedy(whole, prompt, 1)
        pages, table = whole.worker.device.pages(), whole.worker.device.page_tables[0]  # type: ignore[attr-defined]
        slot = int((table[:, :12].astype(bool).sum(1)).argmax())
        out = pages.buffer(12)
        pages.read([int(page) for page in table[slot, :12]], out)
        caches.append(torch.from_numpy(out.copy()).view(12, 2, 2, -1))
    codes = [cache[..., : 8 * 2 * 16].view(torch.int8).int() for cache in caches]
    assert ((codes[0] - codes[1]).abs() <= 1).all(), "as products of other sizes round"
    assert (codes[0] == codes[1]).float().mean() > 0.995


def test_of_a_model_that_is_transformers_code(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "olmo2", num_key_value_heads=1)
    prompt = random_prompt(1, 90)
    exact, ours = (engine_logits(engine_for(folder, kv_cache_dtype=dtype), prompt) for dtype in ("auto", "int8"))
    assert 1e-5 < (ours - exact).norm() / exact.norm() < NEAR["int8"]


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_the_memory_plan_counts_scales(dtype: str, folders: dict[str, Path]) -> None:
    config = EngineConfig.of(str(folders["llama"]), kv_cache_dtype=dtype, dtype="float32", device="cpu",
                             kv_cache_memory="1MiB")  # fmt: skip
    engine, info = build_engine(config, folders["llama"])
    a_token = {"auto": 16 * 4, "int8": 16 + 4}[dtype] * 2 * 2 * 2
    assert info.kv_dtype == {"auto": "float32", "int8": "int8"}[dtype] and info.dtype == "float32"
    assert engine.facts.kv.token_bytes == a_token
    assert info.num_pages == (1 << 20) // (a_token * info.page_size)
    decoder = engine.facts.model
    memory = plan_memory(config, decoder, engine.facts.kv, on_gpu=False, budget=1 << 20, free=None)
    assert memory.kv_cache_bytes == memory.num_pages * a_token * info.page_size


def test_latents_are_refused_by_name(tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS["deepseek-v2-lite"]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    with pytest.raises(IngleError, match=r"--kv-cache-dtype fp8_e4m3: latent attention .*; leave the flag out"):
        engine_for(folder, kv_cache_dtype="fp8")


@pytest.mark.parametrize("value", ["q8_0", "fp16", ""])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"kv_cache_dtype .* is not one of auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2, int8"
    ):
        EngineConfig.of("x", kv_cache_dtype=value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str, dtype: str, tmp_path: Path) -> None:
    """Logits near those of floats; and in CUDA graphs, in chunks and beside others what a request gets alone."""
    folder = save_checkpoint(tmp_path, "llama", head_dim=32)
    options = {"device": "cuda", "dtype": dtype, "block_size": 8}
    prompt = random_prompt(1, 150)
    exact, ours = (
        engine_logits(engine_for(folder, kv_cache_dtype=each, **options), prompt).float() for each in ("auto", kind)
    )
    assert (ours - exact).norm() / exact.norm() < NEAR[kind] + (0.02 if dtype == "bfloat16" else 0)
    if dtype == "float32":
        on_cpu = engine_logits(engine_for(folder, kv_cache_dtype=kind, block_size=8), prompt)
        assert (ours.cpu() - on_cpu).norm() / on_cpu.norm() < 5e-3, "but for codes of numbers between two"
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    requests = [EngineRequest(str(i), random_prompt(i, 20 + 31 * i), params) for i in range(5)]
    engine = engine_for(folder, kv_cache_dtype=kind, max_num_batched_tokens=48, **options)
    together = run(engine, requests)
    eager = engine_for(folder, kv_cache_dtype=kind, enforce_eager=True, **options)
    alone = {request.id: greedy(eager, request.prompt_token_ids, 12) for request in requests}
    same = [a == b for name in alone for a, b in zip(alone[name], together[name], strict=True)]
    assert together == alone if dtype == "float32" else sum(same) > 0.6 * len(same)


@pytest.mark.slow
def test_perplexity_of_real_weights(smollm2_gguf: Path) -> None:
    """SmolLM2 135M: next tokens' probabilities, and how far they are from those of a cache of float32."""
    ids = load_tokenizer(smollm2_gguf).encode("\n".join(corpora.SENTENCES))[:600]
    limits = {"kv_cache_memory": "128MiB", "max_model_len": 1024, "max_num_batched_tokens": 1024}
    following, exact = torch.tensor(ids[1:])[:, None], None
    for kind, (perplexity_within, far) in {"auto": (0, 0), "int8": (0.01, 3e-3), "fp8": (0.03, 2e-2)}.items():
        engine = engine_for(smollm2_gguf, kv_cache_dtype=kind, **limits)
        logprobs = engine_logits(engine, ids)[:-1].double().log_softmax(-1)
        exact = logprobs if exact is None else exact
        means = [each.gather(1, following).mean() for each in (exact, logprobs)]
        assert abs(float((means[0] - means[1]).exp()) - 1) <= perplexity_within
        assert float((exact.exp() * (exact - logprobs)).sum(-1).mean()) <= far
